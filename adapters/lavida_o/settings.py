r"""Settings of LaViDa-O's ``use_fast_dlm``; the others are LLaDA's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from captum_dcam.errors import InputError


@dataclass(frozen=True)
class Fast:
    """Settings of ``use_fast_dlm``: upstream commits all tokens above a rising bar of confidence
    (``factor``), above ``threshold``, or as many a step as the number of steps says (neither)."""

    factor: float | None = 1.0
    threshold: float | None = None


def fast_settings(settings: dict[str, Any], cache: str) -> Fast | None:
    """Take them out of ``settings``; None without ``use_fast_dlm``. Raises what cannot work."""
    wanted = bool(settings.pop("use_fast_dlm", False))
    given = {n: settings.pop(n) for n in ("factor", "threshold") if n in settings}
    if not wanted:
        if given:
            raise InputError(f"{' and '.join(given)}: of use_fast_dlm=True, which was not given")
        return None
    if cache == "prefix":
        raise InputError(
            "use_fast_dlm runs the whole sequence at every block, cache='prefix' only once: "
            "captum_dcam.wrap(model, processor, cache='none')"
        )
    if given.get("threshold") is not None:
        given.setdefault("factor", None)
    made = Fast(**given)
    if made.factor is not None and made.threshold is not None:
        raise InputError("factor and threshold: upstream ignores threshold beside factor; give one")
    for name in ("schedule", "shift", "step_ratio"):
        if settings.get(name) is not None:
            raise InputError(f"{name} has no effect with use_fast_dlm: leave it out")
    if settings.get("remasking", "low_confidence") not in ("low_confidence", "random"):
        raise InputError(
            f"remasking is {settings['remasking']!r}: use_fast_dlm knows low_confidence and random"
        )
    return made


def fast_arguments(options: dict[str, Any], made: Fast, steps: int) -> dict[str, Any]:
    """Arguments of the family's ``generate``, from those of decoding without."""
    out = {
        k: v for k, v in options.items() if k not in ("prefix_lm", "schedule", "schedule_kwargs")
    }
    return {**out, "use_fast_dlm": True, "steps": steps, **vars(made)}
