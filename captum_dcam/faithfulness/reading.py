r"""What the tests of this folder are given, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.methods.edited import one_example
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target
from captum_dcam.refine.checks import check_maps

#: maps of targets: one (N, h, w) per grid
Explain = Callable[[DenoisingForward, tuple[Target, ...]], tuple[Tensor, ...]]


def check_counts(least: int = 1, **counts: int) -> None:
    """ValueError for what is no whole number of at least ``least``."""
    for name, value in counts.items():
        checks.whole(name, value, least)


def flat_maps(
    forward: DenoisingForward, maps: Iterable[Tensor], targets: Sequence[Target], caller: str
) -> Tensor:
    """Maps (N, h, w), one per grid, as rows (N, tokens) float64 on the CPU; checked."""
    shapes = one_example(forward).layout.shapes
    given = tuple(maps)
    for one in given:
        check_maps(one, caller, non_negative=False)
    expected = [(len(targets), *shape) for shape in shapes]
    if [tuple(m.shape) for m in given] != expected:
        raise InputError(
            f"maps have shapes {[tuple(m.shape) for m in given]}: expected {expected}, one (N, h, "
            "w) for each grid of image tokens, N targets"
        )
    return torch.cat([m.detach().cpu().double().flatten(1) for m in given], dim=1)
