r"""Settings of LaViDa's two decoders, and what their own ``generate`` is called with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from captum_dcam.errors import InputError, InputTypeError

#: ways of choosing what a step commits: LLaDA's ``remasking`` (upstream spells ``entrophy``)
REMASKING = ("low_confidence", "random", "entropy", "margin")
#: Dream's ``alg``
ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
SCHEDULES = (None, "linear", "cosine", "shift", "logit_normal")


@dataclass(frozen=True)
class Settings:
    """Settings of a generation; see :meth:`LavidaAdapter.generate`."""

    gen_length: int = 64
    block_length: int | None = None
    steps: int | None = None
    step_ratio: float | None = None
    temperature: float = 0.0
    schedule: str | None = None
    shift: float | None = None
    remasking: str = "low_confidence"
    alg: str = "entropy"
    alg_temp: float = 0.0
    top_p: float | None = 0.95
    top_k: int | None = 50

    @property
    def random(self) -> bool:
        """Whether the generation draws random numbers."""
        return self.temperature > 0 or self.alg_temp > 0 or "random" in (self.remasking, self.alg)


ONLY = {
    "llada": ("block_length", "remasking"),
    "dream": ("alg", "alg_temp", "top_p", "top_k"),
}


def checked(
    given: dict[str, Any], variant: str, cached: bool, generator: torch.Generator | None
) -> Settings:
    """The settings, checked before any work is done."""
    given = dict(given)
    if "max_new_tokens" in given:  # the family's own name
        if "gen_length" in given:
            raise InputError("gen_length and max_new_tokens are two names of one setting: give one")
        given["gen_length"] = given.pop("max_new_tokens")
    other = "dream" if variant == "llada" else "llada"
    known = [n for n in Settings.__dataclass_fields__ if n not in ONLY[other]]
    for name in given:
        if name not in known:
            own = "alg" if name == "remasking" else "remasking"
            hint = f"; its counterpart here is {own}" if name in ("remasking", "alg") else ""
            raise InputTypeError(
                f"unknown setting {name!r} of LaViDa-{variant.capitalize()}{hint}. Known: "
                f"{', '.join(known)}"
            )
    made = Settings(**given)
    if variant == "dream" and made.alg == "origin":
        made = replace(made, remasking="random")  # it draws which tokens it commits
    length = made.gen_length
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"gen_length is {length!r}: the canvas needs at least one token")
    for name, allowed in (
        ("remasking", REMASKING),
        ("alg", ALGORITHMS),
        ("schedule", SCHEDULES),
    ):
        value = getattr(made, name)
        if value not in allowed:
            raise InputError(f"{name} is {value!r}: expected one of {allowed}")
    if made.shift is not None and (made.schedule != "shift" or made.shift <= 0):
        raise InputError(
            f"shift is {made.shift} with schedule {made.schedule!r}: it is a positive setting of "
            "schedule='shift' (0.33 in the authors' evaluation)"
        )
    if made.random and generator is None:
        raise InputError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
    made = replace(made, block_length=_block_length(made, variant))
    _check_steps(made, variant, cached)
    return made


def _block_length(made: Settings, variant: str) -> int:
    block = made.block_length
    if variant == "dream":
        return made.gen_length
    if block is None:
        return made.gen_length
    if block < 1 or made.gen_length % block:
        raise InputError(f"gen_length {made.gen_length} is not a multiple of block_length {block}")
    return block


def _check_steps(made: Settings, variant: str, cached: bool) -> None:
    """Raise for numbers of steps with which the family fails, or decodes nothing."""
    assert made.block_length is not None
    blocks = made.gen_length // made.block_length
    if made.steps is not None and made.step_ratio is not None:
        raise InputError(
            f"steps {made.steps} and step_ratio {made.step_ratio}: give one of them, both say how "
            "many steps there are"
        )
    if made.steps is not None and (made.steps < blocks or made.steps % blocks):
        raise InputError(
            f"steps is {made.steps}: expected a positive multiple of the {blocks} blocks "
            f"(gen_length {made.gen_length} / block_length {made.block_length})"
        )
    if made.step_ratio is not None and not 0 < made.step_ratio <= 1:
        raise InputError(f"step_ratio is {made.step_ratio}: expected 0 < step_ratio <= 1")
    each = steps_of(made) // blocks
    if each < 1:
        raise InputError(
            f"step_ratio {made.step_ratio} of a block of {made.block_length} tokens is no step: "
            f"give at least {1 / made.block_length:g}"
        )
    if each > made.block_length:
        raise InputError(
            f"{each} steps for a block of {made.block_length} tokens: expected at most one step a "
            "token"
        )
    first = 1 if variant == "dream" and cached else 0  # Dream's prefill commits a token
    if made.schedule is not None and each > made.block_length - first:
        raise InputError(
            f"{each} steps with schedule {made.schedule!r}: LaViDa-Dream fails when there are more "
            f"steps than the {made.block_length - first} tokens that the prefill leaves; give "
            "fewer steps, a longer gen_length, or no schedule"
        )


def steps_of(made: Settings) -> int:
    """Denoising steps in all."""
    assert made.block_length is not None
    if made.steps is not None:
        return made.steps
    ratio = 1.0 if made.step_ratio is None else made.step_ratio
    return made.gen_length // made.block_length * int(made.block_length * ratio)


def arguments(made: Settings, variant: str, cached: bool) -> dict[str, Any]:
    """Keyword arguments of the family's own ``generate``."""
    assert made.block_length is not None
    out: dict[str, Any] = {
        "max_new_tokens": made.gen_length,
        "temperature": made.temperature,
        "prefix_lm": cached,
        "schedule": made.schedule,
        "schedule_kwargs": {} if made.shift is None else {"shift": made.shift},
    }
    if variant == "dream":
        out |= {"steps": steps_of(made), "alg": made.alg, "alg_temp": made.alg_temp}
        out |= {"top_p": made.top_p, "top_k": made.top_k}
        if made.step_ratio is not None:
            out |= {"steps": made.gen_length, "step_ratio": made.step_ratio}
        return out
    out["block_length"] = made.block_length
    out["remasking"] = "entrophy" if made.remasking == "entropy" else made.remasking
    if made.step_ratio is not None:
        out["step_ratio"] = made.step_ratio
    elif made.steps is not None:  # upstream ignores its own argument of that name
        out["step_per_block"] = made.steps * made.block_length // made.gen_length
    return out
