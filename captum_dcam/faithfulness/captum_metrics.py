r"""Captum's infidelity and max-sensitivity, called so that they hold for maps of image tokens.

Captum's ``infidelity`` wants attributions of the inputs' shape; ``sensitivity_max`` draws its noise
from numpy's global state, wants a tuple of attributions, and runs without gradients. Here maps are
spread over pixels, noise comes from a generator, and a word is an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice

import torch
from captum import metrics
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.faithfulness.reading import Explain, check_counts, flat_maps
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.captum_common import pixel_owners
from captum_dcam.methods.edited import one_example, pixel_fill, read, with_pixels
from captum_dcam.metrics._checks import working_dtype
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.progress import ProgressLike, watched
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target


@holding
def infidelity(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    *,
    baseline: str = "mean",
    score: Score = "commit",
    samples: int = 32,
    generator: torch.Generator | None = None,
    chunk: int = 8,
    progress: ProgressLike = None,
) -> Tensor:
    r"""How badly the map predicts the fall of the word's logit when squares are removed.

    .. math:: E_I [(\beta\, I^T \Phi - (f(x) - f(x - I)))^2]

    :math:`I` removes a random square of image tokens; :math:`\Phi` shares a token's value equally
    among its pixels' elements; :math:`\beta` is the best factor (``normalize=True``), so the scale
    of a map does not matter. A map of zeros predicts nothing and scores the mean squared fall. The
    sign of a map does not matter either, since β may be negative.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words; a word's value is the sum of its tokens' logits.
        maps (iterable of Tensor): one (N, h, w) per grid, signed.
        baseline (str, optional): see :func:`captum_dcam.methods.edited.pixel_fill`.
            Default: ``"mean"``
        score (str or int, optional): state at which a token is read, or the step's number.
            Default: ``"commit"``
        samples (int, optional): squares, the same for all words. Default: 32
        generator (torch.Generator, optional): draws them. Default: one with seed 0
        chunk (int, optional): images per forward pass. Default: 8
        progress (bool, callable or Progress, optional): True shows a bar of the model's passes, see
            :mod:`captum_dcam.model.progress`. Default: nothing

    Returns:
        Tensor: (N,) float64, at least 0, in squared logits; lower is better.

    Raises:
        MethodError: pixels cannot be edited in this family.

    Source:
        Yeh et al., On the (in)fidelity and sensitivity of explanations, 2019, Eq. 1 and section
        2.3 (square removal); ``captum.metrics.infidelity``.
    """
    check_counts(samples=samples, chunk=chunk)
    forward.trajectory.check_score(score)
    generator = checks.draws("generator", generator) or torch.Generator().manual_seed(0)
    request = one_example(forward)
    rows = flat_maps(forward, maps, targets, "infidelity")
    owners = pixel_owners(AttributionTask(forward, ()))[0]
    fill = pixel_fill(forward, baseline)
    removed = torch.stack([_square(request.layout.shapes, generator) for _ in range(samples)])
    owned = owners.flatten().cpu()
    elements = owned[owned >= 0].bincount(minlength=rows.shape[1]).clamp_min(1)
    shared = torch.nn.functional.pad(rows / elements, (0, 1))
    # wide, because a map may be spread over 100,000 elements
    inputs = request.pixels.detach().to(working_dtype(request.pixels.device))
    found = []
    with watched(forward.adapter, progress, "infidelity"):
        for row, target in zip(shared, targets, strict=True):
            drawn = iter(removed)

            def value(pixels: Tensor, target: Target = target) -> Tensor:
                wanted = [(r, target) for r in range(len(pixels))]
                copies = with_pixels(forward, pixels)
                return read(copies, wanted, score=score, value="logit", chunk=chunk).to(pixels)

            def perturb(repeated: Tensor, drawn: Iterator[Tensor] = drawn) -> tuple[Tensor, Tensor]:
                part = torch.stack(list(islice(drawn, len(repeated))))
                mask = torch.nn.functional.pad(part.to(owners.device), (0, 1))[:, owners]
                # 1 where something was removed, because maps are attributions and not gradients
                return mask.to(repeated), fill(part).to(repeated)

            attributions = row.to(inputs)[owners][None]
            found.append(
                metrics.infidelity(
                    value,
                    perturb,
                    inputs,
                    attributions,
                    n_perturb_samples=samples,
                    max_examples_per_batch=min(chunk, samples),
                    normalize=True,
                )
            )
    return torch.cat(found).cpu().double() if found else torch.zeros(0, dtype=torch.float64)


@holding
def sensitivity_max(
    forward: DenoisingForward,
    targets: Sequence[Target],
    explain: Explain,
    *,
    radius: float = 0.02,
    samples: int = 10,
    generator: torch.Generator | None = None,
    progress: ProgressLike = None,
) -> Tensor:
    r"""The largest relative change of the map under small noise on the image.

    .. math:: \max_{\lVert r \rVert_\infty \le \rho}
        \lVert \Phi(x + r) - \Phi(x) \rVert / \lVert \Phi(x) \rVert

    The answer and its steps are held fixed. Each noisy image is explained once for all words.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words.
        explain (callable): ``(forward, targets) -> maps``, one (N, h, w) per grid; should itself be
            deterministic, or its own noise is measured.
        radius (float, optional): ρ, as a share of the range of the pixels' values. Default: 0.02
        samples (int, optional): noisy images. Default: 10
        generator (torch.Generator, optional): draws the noise. Default: one with seed 0
        progress (bool, callable or Progress, optional): True shows a bar of the model's passes, see
            :mod:`captum_dcam.model.progress`. Default: nothing

    Returns:
        Tensor: (N,) float64, at least 0; lower is better. A map of zeros counts with a norm of 1,
        as in Captum.

    Source:
        Yeh et al., 2019, Eq. 2; ``captum.metrics.sensitivity_max``.
    """
    check_counts(samples=samples)
    check_radius(radius)
    if not targets:
        raise InputError("no target is given: expected at least one word")
    generator = checks.draws("generator", generator) or torch.Generator().manual_seed(0)
    pixels = one_example(forward).pixels.detach()
    wide = pixels.to(working_dtype(pixels.device))
    reach = radius * float(wide.max() - wide.min())
    words = tuple(targets)

    def noisy(repeated: Tensor, _radius: float) -> Tensor:
        # one noise for all words, whose rows are the same image
        drawn = torch.rand(pixels.shape, generator=generator, device=generator.device)
        return repeated + reach * (2 * drawn.to(repeated) - 1)

    def explained(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image = (given[0] if isinstance(given, tuple) else given)[:1]
        with torch.enable_grad():  # Captum's metrics run under no_grad
            maps = explain(with_pixels(forward, image), words)
        return (flat_maps(forward, maps, words, "sensitivity_max").contiguous(),)

    repeated = wide.expand(len(words), *pixels.shape[1:])
    with watched(forward.adapter, progress, "sensitivity_max"):
        found = metrics.sensitivity_max(
            explained,
            repeated,
            perturb_func=noisy,
            perturb_radius=radius,
            n_perturb_samples=samples,
            max_examples_per_batch=len(words),
        )
    return found.cpu().double()


def _square(shapes: Sequence[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """A random square of up to half a side (N,) bool, in a grid drawn by its number of tokens."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator, device=generator.device))

    token = draw(sum(h * w for h, w in shapes))
    ends = accumulate(h * w for h, w in shapes)
    chosen = next(i for i, end in enumerate(ends) if token < end)
    h, w = shapes[chosen]
    side = 1 + draw(max(1, min(h, w) // 2))
    y, x = draw(h - side + 1), draw(w - side + 1)
    parts = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    parts[chosen][y : y + side, x : x + side] = True
    return torch.cat([p.flatten() for p in parts])


def check_radius(radius: float) -> None:
    """ValueError for what is no share of the pixels' range."""
    if not 0 < radius < float("inf"):
        raise InputError(f"radius is {radius}: expected a share of the pixels' range, above 0")
