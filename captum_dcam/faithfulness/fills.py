r"""What stands in the image where image tokens were removed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import ndimage
from torch import Tensor

from captum_dcam.errors import MethodError
from captum_dcam.faithfulness.reading import check_choice, one_example
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.captum_common import baseline_of, case_of, pixel_owners, token_size
from captum_dcam.model.forward import DenoisingForward

#: the mean colour, a Gaussian blur of the image, or a smooth continuation of what is left
BASELINES = ("mean", "blur", "inpaint")
#: standard deviation of the blur as a share of the image's shorter side
BLUR = 0.1
#: relaxations at every resolution of the inpainting
SWEEPS = 16

#: removed tokens (R, N) bool to pixels (R, …)
Fill = Callable[[Tensor], Tensor]


def pixel_fill(forward: DenoisingForward, baseline: str) -> Fill:
    r"""A function that removes image tokens from the bound example's image.

    ``mean``: the mean colour of each image or tile. ``blur``: the image after a Gaussian blur
    of :data:`BLUR`; large objects keep their colour. ``inpaint``: inside the removed region every
    pixel is the mean of its neighbours (a harmonic function), so no edge gives the region away; a
    image of which nothing is left becomes its mean colour. Pixels that belong to no token stay.

    Args:
        forward (DenoisingForward): bound, one example.
        baseline (str): one of :data:`BASELINES`.

    Returns:
        callable: removed tokens (R, N) bool to pixels (R, …) in float32 (float64 stays).

    Raises:
        MethodError: the family does not tell which token a pixel belongs to, or ``blur`` and
            ``inpaint`` are asked for where pixels are no image.
    """
    check_choice("baseline", baseline, BASELINES)
    task = AttributionTask(forward, ())
    owners = pixel_owners(task)[0]
    if baseline != "mean" and token_size(owners[None], task.shapes) is None:
        raise MethodError(
            f"baseline {baseline!r} needs rows and columns of pixels, but the pixel tensor of "
            f"{forward.adapter.family} {tuple(owners.shape)} does not end with them: use "
            "baseline='mean'"
        )
    request = one_example(forward)
    mean = baseline_of(case_of(task, 0, 0), "mean")
    pixels = request.pixels.detach().to(mean)
    inside = owners >= 0
    still = _blurred(pixels, inside) if baseline == "blur" else mean

    def fill(removed: Tensor) -> Tensor:
        # the last column stands for pixels of no token, which owners call -1
        padded = torch.nn.functional.pad(removed.to(owners.device), (0, 1))
        hidden = padded[:, owners]
        content = still
        if baseline == "inpaint":
            content = harmonic(pixels.expand(hidden.shape), inside & ~hidden, mean)
        return torch.where(hidden, content, pixels)

    return fill


def harmonic(values: Tensor, known: Tensor, fallback: Tensor, sweeps: int = SWEEPS) -> Tensor:
    r"""Fill unknown pixels so that each is the mean of its four neighbours (Laplace's equation).

    From coarse to fine: every resolution starts from the one below and is relaxed a few times, so
    the result is close to harmonic at every scale at the cost of some passes over the image.

    Args:
        values (Tensor): (…, H, W).
        known (Tensor): (…, H, W) bool.
        fallback (Tensor): broadcastable; used for images (H, W) of which nothing is known.
        sweeps (int): relaxations per resolution.

    Returns:
        Tensor: (…, H, W); known pixels as they were.
    """
    planes = values.reshape(-1, 1, *values.shape[-2:])
    mask = known.expand(values.shape).reshape(planes.shape)
    filled = _level(planes, mask.to(planes.dtype), sweeps).reshape(values.shape)
    nothing = ~known.flatten(-2).any(-1)[..., None, None]
    return torch.where(nothing, fallback, torch.where(known, values, filled))


def _level(planes: Tensor, weight: Tensor, sweeps: int) -> Tensor:
    """One resolution of :func:`harmonic`: planes (P, 1, H, W), weight 1 where known, else 0."""
    height, width = planes.shape[-2:]
    if height > 1 or width > 1:
        # an axis of one pixel is not halved any more
        window = min(2, height), min(2, width)
        even = (0, width % window[1], 0, height % window[0])
        value, share = (
            torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, even), window)
            for x in (planes * weight, weight)
        )
        coarse = value / share.masked_fill(share == 0, 1)
        coarse = _level(coarse, (share > 0).to(planes.dtype), sweeps)
        start = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    else:
        start = planes
    known = weight > 0
    filled = torch.where(known, planes, start)
    if bool(known.all()) or (height == 1 and width == 1):
        return filled
    for _ in range(sweeps):
        around = torch.nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
        mean = (
            around[..., 2:, 1:-1]
            + around[..., :-2, 1:-1]
            + around[..., 1:-1, 2:]
            + around[..., 1:-1, :-2]
        ) / 4
        filled = torch.where(known, planes, mean)
    return filled


def _blurred(pixels: Tensor, inside: Tensor) -> Tensor:
    """Gaussian blur of each (H, W), of the pixels that belong to a token only."""
    sigma = BLUR * min(pixels.shape[-2:])

    def blur(values: Tensor) -> Tensor:
        planes = values.double().cpu().numpy()
        flat = planes.reshape(-1, *planes.shape[-2:])
        out = ndimage.gaussian_filter(flat, (0, sigma, sigma), mode="nearest")
        return torch.from_numpy(out).reshape(values.shape).to(pixels)

    weight = blur(inside.expand(pixels.shape).to(pixels.dtype))
    return torch.where(inside, blur(pixels * inside) / weight.clamp_min(1e-6), pixels)
