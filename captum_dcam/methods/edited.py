r"""Images of which tokens were removed, and words read again on them, the answer held fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError, MethodError
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.captum_common import CaptumArguments, baseline_of, pixel_owners, token_size
from captum_dcam.model.adapter import Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target

#: what a target's value is: the sum of its tokens' logits, the mean of their log-probabilities or
#: probabilities, or the share of them that are the likeliest at their places
VALUES = ("logit", "log_probability", "probability", "likeliest")
#: edits of the pixels, or of the image tokens at the tapped block
WHERE = ("pixels", "tap")
#: the mean colour, a Gaussian blur of the image, or a smooth continuation of what is left
BASELINES = ("mean", "blur", "inpaint")
#: standard deviation of the blur as a share of the image's shorter side
BLUR = 0.1
#: relaxations at every resolution of the inpainting
SWEEPS = 16

#: removed tokens (R, N) bool to pixels (R, …)
Fill = Callable[[Tensor], Tensor]


def one_example(forward: DenoisingForward) -> Request:
    """The bound request, of one example; ValueError otherwise."""
    request = forward.request
    if request.batch != 1:
        raise InputError(
            f"{request.batch} examples are bound: expected one; narrow the forward with "
            "captum_dcam.model.forward.single(forward, example)"
        )
    return request


def with_pixels(forward: DenoisingForward, pixels: Tensor) -> DenoisingForward:
    r"""The bound example R times, with the same answer and other images.

    Args:
        forward (DenoisingForward): bound, one example.
        pixels (Tensor): (R, …), like the request's; cast to its dtype.
    """
    request, same = one_example(forward), [0] * len(pixels)
    return forward.again(
        request=request.rows(same, pixels.to(request.pixels)),
        trajectory=forward.trajectory.rows(same),
    )


def read(
    copies: DenoisingForward,
    wanted: Sequence[tuple[int, Target]],
    *,
    score: Score = "commit",
    value: str = "log_probability",
    chunk: int = 8,
    edited: Callable[[Tensor], AbstractContextManager[None]] | None = None,
) -> Tensor:
    r"""Values of targets on the images of :func:`with_pixels`, each token at its own step.

    Args:
        copies (DenoisingForward): R images with one answer.
        wanted (sequence): pairs of an image's row and a target.
        score (str or int): the state each token is read at.
        value (str): one of :data:`VALUES`.
        chunk (int): rows per forward pass.
        edited (callable, optional): of the rows whose image tokens pass the tap, a context in
            which they are edited.

    Returns:
        Tensor: (len(wanted),) float64, on the CPU.
    """
    assert value in VALUES
    found = [0.0] * len(wanted)
    trajectory, adapter = copies.trajectory, copies.adapter
    reads: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for index, (row, target) in enumerate(wanted):
        for position, token in zip(target.positions, target.token_ids, strict=True):
            step = trajectory.step_of(row, position, score)
            part = (index, position, token, len(target.positions))
            reads.setdefault((row, step), []).append(part)
    everyone = torch.arange(copies.request.batch)
    during = edited or (lambda _rows: nullcontext())
    with torch.no_grad():
        memory: Any = None
        if trajectory.cache == "prefix" and reads:
            with during(everyone):
                memory = copies.prefill()
        keys = sorted(reads)
        for some in (keys[i : i + chunk] for i in range(0, len(keys), chunk)):
            rows, steps = (torch.tensor(column) for column in zip(*some, strict=True))
            if trajectory.cache == "prefix":
                at = rows.to(copies.request.pixels.device)
                logits = copies.step(adapter.select(memory, at), rows, steps)
            else:
                with during(rows):
                    logits = copies.replay(rows, steps)
            for line, key in zip(logits, some, strict=True):
                for index, position, token, length in reads[key]:
                    scores = line[position].cpu().double()
                    if value == "likeliest":
                        own = float(scores.argmax() == token)
                    elif value == "probability":
                        own = float(scores.softmax(-1)[token])
                    elif value == "log_probability":
                        own = float(scores.log_softmax(-1)[token])
                    else:
                        own, length = float(scores[token]), 1
                    found[index] += own / length
    return torch.tensor(found, dtype=torch.float64)


def read_removed(
    forward: DenoisingForward,
    removed: Tensor,
    groups: Tensor,
    wanted: list[tuple[int, Target]],
    baseline: str,
    where: str,
    score: Score,
    chunk: int,
    value: str = "log_probability",
) -> Tensor:
    r"""Values of targets on the bound example's image with groups of image tokens removed.

    Args:
        forward (DenoisingForward): bound, one example.
        removed (Tensor): (R, G) bool, groups; rows that are equal are run once.
        groups (Tensor): (N,) int64, group of every image token; -1 for one that is never removed.
        wanted (sequence): pairs of a row of ``removed`` and a target.
        baseline, where, score, chunk: as in :func:`captum_dcam.faithfulness.deletion`.
        value (str): as in :func:`read`.

    Returns:
        Tensor: (len(wanted),) float64, on the CPU.
    """
    request = one_example(forward)
    distinct, which = removed.unique(dim=0, return_inverse=True)
    hidden = F.pad(distinct, (0, 1))[:, groups]  # the last column: -1
    fill = pixel_fill(forward, baseline) if where == "pixels" else None
    found = torch.zeros(len(wanted), dtype=torch.float64)
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk]
        own = [
            (index, (int(which[row]) - start, target))
            for index, (row, target) in enumerate(wanted)
            if start <= int(which[row]) < start + len(part)
        ]
        same = request.pixels.detach().expand(len(part), *request.pixels.shape[1:])
        copies = with_pixels(forward, same if fill is None else fill(part))
        edit = None if fill is not None else _erasing(copies, part)
        index, pairs = zip(*own, strict=True)
        found[list(index)] = read(copies, pairs, score=score, value=value, chunk=chunk, edited=edit)
    return found


def _erasing(
    copies: DenoisingForward, removed: Tensor
) -> Callable[[Tensor], AbstractContextManager[None]]:
    """Contexts in which removed image tokens (R, N) are the mean token of their grid."""
    shapes = copies.request.layout.shapes

    def during(rows: Tensor) -> AbstractContextManager[None]:
        parts = removed[rows].split([h * w for h, w in shapes], dim=1)

        def erase(features: Tensor, grid: int) -> Tensor:
            mask = parts[grid].view(-1, 1, *shapes[grid]).to(features.device)
            return torch.where(mask, features.mean((-2, -1), keepdim=True), features)

        return copies.edited(erase)

    return during


# -- what stands where image tokens were removed -------------------------------------------------


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
    checks.choice("baseline", baseline, BASELINES)
    task = AttributionTask(forward, ())
    owners = pixel_owners(task)[0]
    if baseline != "mean" and token_size(owners[None], task.shapes) is None:
        raise MethodError(
            f"baseline {baseline!r} needs rows and columns of pixels, but the pixel tensor of "
            f"{forward.adapter.family} {tuple(owners.shape)} does not end with them: use "
            "baseline='mean'"
        )
    mean = baseline_of(CaptumArguments(task, (0, 0)), "mean")
    pixels = task.pixels.detach().to(mean)
    inside = owners >= 0
    still = _blurred(pixels, inside) if baseline == "blur" else mean

    def fill(removed: Tensor) -> Tensor:
        # the last column stands for pixels of no token, which owners call -1
        hidden = F.pad(removed.to(owners.device), (0, 1))[:, owners]
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
        value, share = (F.avg_pool2d(F.pad(x, even), window) for x in (planes * weight, weight))
        coarse = value / share.masked_fill(share == 0, 1)
        coarse = _level(coarse, (share > 0).to(planes.dtype), sweeps)
        start = F.interpolate(coarse, size=(height, width), mode="bilinear")
    else:
        start = planes
    known = weight > 0
    filled = torch.where(known, planes, start)
    if bool(known.all()) or (height == 1 and width == 1):
        return filled
    for _ in range(sweeps):
        around = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        rows, columns = around[..., :, 1:-1], around[..., 1:-1, :]
        total = rows[..., 2:, :] + rows[..., :-2, :] + columns[..., 2:] + columns[..., :-2]
        filled = torch.where(known, planes, total / 4)
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
