r"""How sure is a mean? Percentile bootstrap, seeded, for many columns at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import result_dtype, working_dtype

_RESAMPLED_AT_ONCE = 2**20


class BootstrapInterval(NamedTuple):
    r"""A mean and its percentile interval, each (...): the values' shape without the last axis."""

    mean: Tensor
    low: Tensor
    high: Tensor


def bootstrap_ci(
    values: Tensor, generator: torch.Generator, n: int = 1000, level: float = 0.95
) -> BootstrapInterval:
    r"""The mean over the last axis, with a percentile bootstrap interval.

    Images are drawn with replacement, the same images for every leading index, so that the rows of
    a table are resampled together. The same generator state gives the same interval. One image, or
    images that all score the same, give an interval of width 0.

    Args:
        values (Tensor): (..., N), floating point, finite: N images' scores.
        generator (torch.Generator): the only source of randomness; any device.
        n (int): how many resamples. Default: 1000.
        level (float): coverage, between 0 and 1. Default: 0.95.

    Returns:
        BootstrapInterval: ``mean``, ``low``, ``high``, each (...).

    Raises:
        ValueError: no image, NaN or infinite scores, ``n`` below 1, ``level`` not in (0, 1).
    """
    _check(values, n, level)
    return _interval(values, level, lambda scores: _resampled_means(scores, generator, n))


def paired_bootstrap(
    first: Tensor, second: Tensor, generator: torch.Generator, n: int = 1000, level: float = 0.95
) -> BootstrapInterval:
    r"""The mean of ``first - second`` on the same images, with its interval.

    An interval that leaves out 0 says that one method beats the other beyond chance; two intervals
    of :func:`bootstrap_ci` that overlap do not say the opposite.

    Args:
        first (Tensor): (..., N), one method's scores.
        second (Tensor): the other's on the same N images in the same order, same shape.
        generator (torch.Generator): the only source of randomness.
        n (int): how many resamples. Default: 1000.
        level (float): coverage, between 0 and 1. Default: 0.95.

    Returns:
        BootstrapInterval: of the difference, each (...).

    Raises:
        ValueError: different shapes, or as in :func:`bootstrap_ci`.
    """
    _check(first, n, level)
    _check(second, n, level)
    if first.shape != second.shape:
        raise InputError(
            f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}: expected the "
            f"same images in the same order; keep the images that both methods have scored"
        )
    return bootstrap_ci(first - second, generator, n, level)


def cluster_bootstrap(
    values: Tensor, images: Tensor, generator: torch.Generator, n: int = 1000, level: float = 0.95
) -> BootstrapInterval:
    r"""The mean over words, with an interval that resamples whole images.

    Words of one image are not independent: their masks, the answer and the state that was read are
    the same. So images are drawn with replacement, each with all its words, and the mean of a
    resample is the sum over its words divided by their number.

    Args:
        values (Tensor): (..., N), floating point, finite: one score per word.
        images (Tensor): (N,) int64, the image of every word.
        generator (torch.Generator): the only source of randomness.
        n (int): how many resamples. Default: 1000.
        level (float): coverage, between 0 and 1. Default: 0.95.

    Returns:
        BootstrapInterval: ``mean``, ``low``, ``high``, each (...).

    Raises:
        ValueError: as in :func:`bootstrap_ci`; images that are not one whole number per word.

    Source:
        Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    _check(values, n, level)
    own, count = _owners(images.to(values.device), tuple(values.shape))

    def resampled(scores: Tensor) -> Tensor:
        # A ratio of means of resamples: sums over words, by the number of words.
        words = own.bincount(minlength=count).to(scores.dtype)
        sums = scores.new_zeros((*scores.shape[:-1], count)).index_add_(-1, own, scores)
        both = _resampled_means(torch.cat((sums.reshape(-1, count), words[None])), generator, n)
        return (both[:-1] / both[-1]).reshape(*scores.shape[:-1], n)

    return _interval(values, level, resampled)


def resampled_weights(
    images: Tensor, words: int, generator: torch.Generator, n: int = 1000, level: float = 0.95
) -> Tensor:
    r"""How often each word is in each resample of images: for statistics that are no means.

    Args:
        images (Tensor): (words,) int64, the image of every word.
        words (int): how many.
        generator, n, level: as in :func:`cluster_bootstrap`.

    Returns:
        Tensor: (n, words) float64 on the CPU.

    Raises:
        ValueError: as in :func:`cluster_bootstrap`.
    """
    _check(torch.zeros(words, dtype=torch.float64), n, level)
    own, count = _owners(images, (words,))
    drawn = torch.cat([c.cpu() for c in _counts(count, generator, n)])
    return drawn.double()[:, own.cpu()]


def _owners(images: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """The number of each word's image, from 0, and how many images there are."""
    if images.dtype != torch.long or images.shape != shape[-1:]:
        raise InputError(
            f"images are {images.dtype} {tuple(images.shape)} and values {tuple(shape)}: "
            "expected int64, one image's number for each of the N words"
        )
    _, own = images.unique(return_inverse=True)
    return own, int(own.max()) + 1


def _interval(
    values: Tensor, level: float, resampled: Callable[[Tensor], Tensor]
) -> BootstrapInterval:
    """The mean of values (..., N), between quantiles of ``resampled(scores)`` (..., n)."""
    scores = values.detach().to(working_dtype(values.device))
    # Counted from the first score, so that equal scores give exactly that score.
    origin = scores[..., 0]
    scores = scores - origin[..., None]
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=scores.dtype)
    low, high = torch.quantile(resampled(scores), tail.to(scores.device), dim=-1)
    out = result_dtype(values)
    return BootstrapInterval(*((origin + x).to(out) for x in (scores.mean(-1), low, high)))


def _resampled_means(scores: Tensor, generator: torch.Generator, n: int) -> Tensor:
    """Means (..., n) of n resamples of scores (..., N)."""
    images = scores.shape[-1]
    counts = _counts(images, generator, n)
    return torch.cat([scores @ c.to(scores).T / images for c in counts], -1)


def _counts(images: int, generator: torch.Generator, n: int) -> Iterator[Tensor]:
    """How often each of the images is drawn in each of n resamples, (rows, images) int64, some
    rows at once; by the images alone, so that no draw depends on what is resampled."""
    at_once = max(1, _RESAMPLED_AT_ONCE // images)
    for start in range(0, n, at_once):
        rows = min(at_once, n - start)
        drawn = torch.randint(images, (rows, images), generator=generator, device=generator.device)
        row = images * torch.arange(rows, device=drawn.device)[:, None]
        counts = torch.bincount((drawn + row).flatten(), minlength=rows * images)
        yield counts.reshape(rows, images)


def _check(values: Tensor, n: int, level: float) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"values are {kind}: expected a tensor of floats (..., N)")
    if values.ndim < 1 or values.shape[-1] == 0:
        raise InputError(
            f"values have shape {tuple(values.shape)}: expected (..., N) with one score per image"
        )
    if not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        raise InputError(
            f"values of shape {tuple(values.shape)} hold {count} NaN or infinite scores: leave "
            f"those images out, for every method alike, and report how many there were"
        )
    if n < 1 or not 0 < level < 1:
        raise InputError(f"n is {n} and level {level}: expected n ≥ 1 and level between 0 and 1")
