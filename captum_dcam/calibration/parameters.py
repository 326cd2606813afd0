r"""The settings that are fitted, by flat names such as ``dacg.high_std``, in the search's order.

A set of values is a dict from these names to numbers, or to True and False for a switch.
``akd.k_base`` may be None: AKD is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from captum_dcam.errors import CalibrationError
from captum_dcam.refine import (
    AKD,
    CBA,
    DACG,
    DACG_BRANCHES,
    SICD,
    Affinity,
    NamedRefinement,
    Refinement,
)

Values = dict[str, float | None]
Stages = tuple[Refinement, ...]

#: shares of the calibration maps beyond a threshold that the search tries
SHARES = (0.0, 0.1, 0.221, 0.4, 0.6, 0.8, 1.0)
#: percentiles that it tries for each branch
PERCENTILES = (50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
#: weights of CBA that it tries
_WEIGHTS = {
    "median": (0.0, 0.075, 0.15, 0.3, 0.6, 1.2),
    "quantile": (0.0, 0.075, 0.15, 0.3, 0.6, 1.2),
    "mean": (0.0, 0.1, 0.2, 0.4, 0.8, 1.6),
    "max": (0.0, 0.015, 0.05, 0.1, 0.2, 0.4),
}


@dataclass(frozen=True)
class Parameter:
    r"""One number of one stage.

    Args:
        stage (type): the refinement's class.
        field (str): of it.
        part (int or None): place in a field of several numbers.
        label (str): what the place is called.
        tried (tuple): values of the search.
        statistic (str): of thresholds: ``mean``, ``std`` or ``skewness`` of the maps as they come
            to the stage; then the search tries the values that :data:`SHARES` of maps lie beyond.
        below (bool): whether the maps below the threshold are meant.
        few (tuple): values of a search without masks, in which every value costs forward passes;
            none where it leaves the parameter alone. Insertion sees a map's order alone, so these
            are parameters that change it.
    """

    stage: type[NamedRefinement]
    field: str
    part: int | None = None
    label: str = ""
    tried: tuple[float | None, ...] = ()
    statistic: str = ""
    below: bool = False
    few: tuple[float | None, ...] = ()

    @property
    def name(self) -> str:
        """Flat name."""
        return ".".join(filter(None, (self.stage.name, self.field, self.label)))

    def ends(self, value: float | None, *, labels: bool = True) -> bool:
        """Whether a value is the last that the search tries, so that more might be better."""
        tried = self.tried if labels else self.few
        if not tried or isinstance(value, bool):
            return False
        return value in (tried[0], tried[-1]) and bool(value)


PARAMETERS: dict[str, Parameter] = {
    p.name: p
    for p in (
        Parameter(
            Affinity,
            "power",
            tried=(1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0),
            few=(2.0, 4.0, 6.0, 8.0, 12.0),
        ),
        Parameter(Affinity, "square", tried=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0)),
        Parameter(Affinity, "center", tried=(True, False), few=(True, False)),
        Parameter(AKD, "k_base", tried=(None, 1.5, 3, 5, 7, 11)),
        Parameter(DACG, "high_std", statistic="std"),
        Parameter(DACG, "high_mean", statistic="mean"),
        Parameter(DACG, "low_mean", statistic="mean", below=True),
        *(
            Parameter(DACG, "percentiles", i, label, PERCENTILES)
            for i, label in enumerate(DACG_BRANCHES)
        ),
        *(
            Parameter(CBA, "weights", i, label, tried)
            for i, (label, tried) in enumerate(_WEIGHTS.items())
        ),
        Parameter(CBA, "gamma", tried=(0.0, 0.25, 0.5, 0.75, 1.0)),
        Parameter(SICD, "gate_std", statistic="std"),
        Parameter(SICD, "gate_skewness", statistic="skewness"),
        Parameter(SICD, "omega_rep", tried=(0.0, 0.025, 0.05, 0.1, 0.2)),
        Parameter(SICD, "omega_out", tried=(0.0, 0.01, 0.02, 0.05, 0.1)),
        Parameter(SICD, "lambda_max", tried=(0.25, 0.5, 0.75, 1.0)),
    )
}


def values_of(stages: Sequence[Refinement], *, labels: bool = True) -> Values:
    r"""The parameters that these stages have, in the order of :data:`PARAMETERS`.

    Args:
        stages (sequence of Refinement): the preset's.
        labels (bool, optional): of a fit with masks; False: those that one without takes.
            Default: True

    Raises:
        CalibrationError: no stage that has any, or two of one class.
    """
    found: Values = {}
    for name, parameter in PARAMETERS.items():
        own = [s for s in stages if isinstance(s, parameter.stage)]
        if len(own) > 1:
            raise CalibrationError(
                f"{len(own)} stages are {parameter.stage.name!r}: which of them should be fitted? "
                "Expected each refinement that is fitted at most once"
            )
        if own and (labels or parameter.few):
            value = getattr(own[0], parameter.field)
            found[name] = value if parameter.part is None else value[parameter.part]
    if not found:
        listed = ", ".join(s.describe()["name"] for s in stages) or "none"
        if labels:
            raise CalibrationError(
                f"the preset has no refinement with a setting that is fitted (its stages: "
                f"{listed}): start from 'default' or 'paper'"
            )
        raise CalibrationError(
            f"the preset has no affinity (its stages: {listed}), and a fit without labels searches "
            "affinity's power and center alone, because the fit of thresholds to map shapes of "
            "earlier versions gained nothing. Start from 'default', or give images with masks and "
            "--labels (--dataset folder reads your own)"
        )
    return found


def with_values(stages: Sequence[Refinement], values: Mapping[str, float | None]) -> Stages:
    """The stages with these values; AKD is left out where its value is None."""
    out = []
    for stage in stages:
        changes: dict[str, Any] = {}
        for name, value in values.items():
            parameter = PARAMETERS[name]
            if not isinstance(stage, parameter.stage):
                continue
            if parameter.part is None:
                changes[parameter.field] = value
            else:
                whole = list(changes.get(parameter.field, getattr(stage, parameter.field)))
                whole[parameter.part] = value
                changes[parameter.field] = tuple(whole)
        if changes.get("k_base", 0) is not None:
            out.append(replace(stage, **changes) if changes else stage)  # type: ignore[type-var]
    return tuple(out)
