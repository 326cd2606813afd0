r"""Thresholds without labels: as many maps beyond each as the paper reports.

The bounds of DACG (Eq. 7) and of SICD's gate are numbers about a map's mean, spread and skewness,
and another model's maps have others: on the embedded model almost every map takes one branch. What
carries over is the *share* of the maps that a branch is meant for.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from captum_dcam.calibration.chain import Chain
from captum_dcam.calibration.parameters import Stages, Values, with_values
from captum_dcam.errors import CalibrationError
from captum_dcam.evaluation.published import published
from captum_dcam.refine import DACG, DACG_BRANCHES, SICD

#: fewer maps cannot show a share of 5 %, that of the smallest branch
LEAST_MAPS = 20


def paper_routing() -> MappingProxyType[str, float]:
    """Shares of DACG's branches at the paper's bounds (Table 6, row 0.22)."""
    found = {}
    for name in DACG_BRANCHES:
        share = published("Diffusion-CAM 6", "0.22", name)
        assert share is not None
        found[name] = share / 100
    return MappingProxyType(found)


def cut(values: Tensor, count: float, *, below: bool = False) -> float:
    r"""A threshold with ``count`` of the values beyond it, or as near to it as ties allow.

    It is the number of fewest digits near the middle between the two values that it parts. No value
    beyond: the outermost value itself. All beyond: a number past the other end. Of two equally
    near counts the smaller wins.

    Args:
        values (Tensor): (N,) float64, N at least 1.
        count (float): how many should lie beyond, 0 to N.
        below (bool, optional): beyond means below, not above. Default: False
    """
    ordered = values.sort(descending=not below).values
    n = len(ordered)
    outer, inner = ordered[:-1], ordered[1:]
    # a cut after the k-th value is one only where the next value is another
    allowed = torch.ones(n + 1, dtype=torch.bool)
    allowed[1:n] = outer != inner
    sizes = torch.arange(n + 1, dtype=torch.float64)
    away = (sizes - count).abs().masked_fill(~allowed, float("inf"))
    k = int(away.argmin())
    if k == 0:
        return float(ordered[0])
    last = float(ordered[-1])
    if k == n:
        return last + abs(last) / 2 + 0.01 if below else last - abs(last) / 2 - 0.01
    return _between(*sorted((float(ordered[k - 1]), float(ordered[k]))))


def _between(low: float, high: float) -> float:
    """The middle, rounded to as few significant digits as still part the two."""
    middle = (low + high) / 2
    for digits in range(2, 16):
        rounded = float(f"{middle:.{digits}g}")
        if low < rounded < high:
            return rounded
    return middle


def fit_routing(chain: Chain, stages: Stages) -> Values:
    r"""DACG's three bounds and SICD's two, from the maps alone.

    DACG: in the order in which the branches are tested, each bound is the :func:`cut` that gives
    its branch the paper's share of *all* maps, among the maps that no branch before it took: first
    ``high_std`` (22.1 % of the maps above it), then ``high_mean`` (19.3 %), then ``low_mean``
    (53.4 % below it); 5.2 % are left. The maps are taken as they come to DACG, after the stages
    before it.

    SICD's gate, "high variance / skewness" in the paper's words and without numbers or ratios
    there: the share that DACG calls high variance, 22.1 %, above ``gate_std``, and as many above
    ``gate_skewness``, among maps as they come to SICD after the fitted DACG. So the gate touches
    22.1 to 44.2 % of the maps, by how much the two overlap.

    AKD's window, DACG's percentiles, CBA's weights and SICD's weights say what to *do* with a map.
    Nothing in unlabelled maps identifies them: they stay as they are.

    Args:
        chain (Chain): with the maps.
        stages (tuple of Refinement): the preset's; DACG or SICD may be missing.

    Returns:
        dict: the fitted parameters by name.

    Raises:
        CalibrationError: neither DACG nor SICD, or fewer than :data:`LEAST_MAPS` maps.
    """
    total, wanted = len(chain.collection), paper_routing()
    if total < LEAST_MAPS:
        raise CalibrationError(
            f"{total} maps from {len(chain.collection.ids)} images: expected at least "
            f"{LEAST_MAPS}, because the smallest branch takes 5 %: give more images (--limit)"
        )
    found: Values = {}
    if any(isinstance(s, DACG) for s in stages):
        known = chain.statistics(stages, DACG)
        std, mean = known["std"], known["mean"]
        high_std = _bound(std, wanted["high_var"] * total)
        rest = mean[std <= high_std]
        high_mean = _bound(rest, wanted["high_mean"] * total)
        rest = rest[rest <= high_mean]
        low_mean = _bound(rest, wanted["low_mean"] * total, below=True)
        found |= {
            "dacg.high_std": high_std,
            "dacg.high_mean": high_mean,
            "dacg.low_mean": low_mean,
        }
    if any(isinstance(s, SICD) for s in stages):
        known = chain.statistics(with_values(stages, found), SICD)
        count = wanted["high_var"] * total
        found["sicd.gate_std"] = _bound(known["std"], count)
        found["sicd.gate_skewness"] = _bound(known["skewness"], count)
    if not found:
        raise CalibrationError(
            "the preset has neither DACG nor SICD, whose bounds unlabelled images can fit: start "
            "from 'default' or 'paper', or give labels (--labels)"
        )
    return found


def _bound(values: Tensor, count: float, below: bool = False) -> float:
    """:func:`cut`, at least 0 as bounds are; earlier branches may have left less than the share."""
    if not len(values):
        return 0.0
    return max(0.0, cut(values, min(count, float(len(values))), below=below))
