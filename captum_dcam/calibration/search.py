r"""Coordinate descent over small grids: one parameter after another until none gains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from captum_dcam.calibration.parameters import Values

#: a gain below a hundredth of a point of F3 is none
LEAST_GAIN = 1e-4
MOST_SWEEPS = 8
#: parameter name and the values at hand → what to try
Candidates = Callable[[str, Values], Iterable[float | None]]


@dataclass(frozen=True)
class Step:
    """One change that gained: the parameter, what it was and became, the objective after it."""

    name: str
    before: float | None
    after: float | None
    objective: float


@dataclass(frozen=True)
class SearchResult:
    r"""What a search ended with.

    Args:
        values (dict): every parameter.
        start, objective (float): at the start and at the end.
        steps (tuple of Step): the changes in order.
        sweeps (int): how often all parameters were tried; the last sweep changed nothing, unless
            :data:`MOST_SWEEPS` were made.
    """

    values: Values
    start: float
    objective: float
    steps: tuple[Step, ...]
    sweeps: int


def coordinate_descent(
    start: Values,
    candidates: Candidates,
    objective: Callable[[Values], float],
    *,
    least_gain: float = LEAST_GAIN,
    most_sweeps: int = MOST_SWEEPS,
    say: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    r"""Raise an objective by changing one parameter at a time. Draws nothing.

    The parameters are taken in the order of ``start``. Each is set to the candidate with the
    highest objective (the first of equal ones) if that gains at least ``least_gain`` over the
    value at hand, which stays otherwise. Sweeps go on until one changes nothing. The result is a
    local optimum: no single parameter can be bettered within its candidates.

    Args:
        start (dict): parameters by name.
        candidates (callable): what to try for a parameter, given the values at hand.
        objective (callable): of all values; higher is better.
        least_gain (float, optional): what counts as a gain. Default: :data:`LEAST_GAIN`
        most_sweeps (int, optional): Default: :data:`MOST_SWEEPS`
        say (callable, optional): is told the sweep, the parameter and the objective.
    """
    values, steps = dict(start), []
    first = best = objective(values)
    sweep = 0
    for sweep in range(1, most_sweeps + 1):
        changed = False
        for name in start:
            say(f"sweep {sweep}, {name}, {best:.4f}")
            tried = [
                (objective({**values, name: value}), value)
                for value in candidates(name, values)
                if value != values[name]
            ]
            top = max((found for found, _ in tried), default=best)
            if top < best + least_gain:
                continue
            value = next(value for found, value in tried if found == top)
            steps.append(Step(name, values[name], value, top))
            values[name], best, changed = value, top, True
        if not changed:
            break
    return SearchResult(values, first, best, tuple(steps), sweep)
