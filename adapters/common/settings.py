r"""Settings of a generation: which a family has, what each may be, and what is said of mistakes.

>>> made = Settings("Toy", {
...     "gen_length": Setting(8, length, also="max_new_tokens"),
...     "remasking": Setting("random", one_of("random", "margin")),
... })
>>> made.read({"max_new_tokens": 4})
{'gen_length': 4, 'remasking': 'random'}
>>> made.read({"remasking": "best"})
Traceback (most recent call last):
captum_dcam.errors.InputError: remasking is 'best': expected one of ('random', 'margin')
>>> made.read({"top_k": 3})
Traceback (most recent call last):
captum_dcam.errors.SettingError: unknown setting 'top_k' of Toy. Known: gen_length, remasking; \
max_new_tokens means gen_length

Rules of one family alone stay in the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from captum_dcam import checks
from captum_dcam.errors import InputError, SettingError, near

#: raises InputError unless the setting of that name may have that value
Check = Callable[[str, Any], None]
#: tokens or steps that no answer has: more of them would only be waited for
MOST = 100_000


# -- what a setting may be ------------------------------------------------------------------------


def _expected(name: str, value: Any, what: str) -> InputError:
    return InputError(f"{name} is {value!r}: expected {what}")


def count(name: str, value: Any, why: str = "") -> None:
    """A whole number of at least 1, and no more than any model could take."""
    if checks.whole(name, value, why=why) > MOST:
        raise _expected(name, value, f"a whole number of at most {MOST}")


def length(name: str, value: Any) -> None:
    """The tokens of an answer."""
    count(name, value, ", the canvas needs at least one token")


def real(fits: Callable[[Any], bool], what: str) -> Check:
    """A real number that fits; ``what`` is expected, where ``{name}`` stands for the setting."""

    def check(name: str, value: Any) -> None:
        found = checks.as_real(value)
        if found is None or not fits(found):
            raise _expected(name, value, what.format(name=name))

    return check


number = real(lambda value: 0 <= value < 2**63, "a finite number, 0 or more")
share = real(lambda value: 0 < value <= 1, "a share in (0, 1], 0 < {name} <= 1")
inside = real(lambda value: 0 < value < 1, "a number between 0 and 1")


def one_of(*known: Any) -> Check:
    """One of some values."""

    def check(name: str, value: Any) -> None:
        if value not in known:
            raise _expected(name, value, f"one of {known}")

    return check


# -- a family's settings --------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    r"""One setting.

    Args:
        default (optional): the value where none is given. Default: None
        check (callable, optional): what it may be; None, where that is the default, is let pass.
        also (str, optional): another name for it.
        none (bool, optional): None may be given. Default: where it is the default
    """

    default: Any = None
    check: Check | None = None
    also: str | None = None
    none: bool = False


@dataclass(frozen=True)
class Settings:
    r"""All settings of a family.

    Args:
        family (str): its name in messages.
        known (mapping): name → :class:`Setting`.
        refused (mapping, optional): name → why it is none of them, or what to give instead.
        unknown (str, optional): why no other one is taken.
        others (bool, optional): further settings are passed on as they are. Default: False
    """

    family: str
    known: Mapping[str, Setting]
    refused: Mapping[str, str] = field(default_factory=dict)
    unknown: str | None = None
    others: bool = False

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        r"""All settings by name, with defaults; in the order of ``known``.

        Raises:
            SettingError: a setting that the family does not have.
            InputError: two names of one setting, or a value that cannot be.
        """
        out = dict(given)
        for name, setting in self.known.items():
            if setting.also in out:
                if out.get(name) is not None:
                    raise InputError(
                        f"{setting.also} and {name} mean the same, they are two names of one "
                        "setting: give one of them"
                    )
                out[name] = out.pop(setting.also)
        if not self.others:
            for name in out:
                if name not in self.known:
                    raise SettingError(self._unknown(name))
        made = {name: out.pop(name, setting.default) for name, setting in self.known.items()}
        for name, setting in self.known.items():
            empty = made[name] is None and (setting.none or setting.default is None)
            if setting.check is not None and not empty:
                setting.check(name, made[name])
        return {name: checks.plain(value) for name, value in {**made, **out}.items()}

    def _unknown(self, name: str) -> str:
        why = self.refused.get(name, self.unknown)
        also = [f"{s.also} means {n}" for n, s in self.known.items() if s.also is not None]
        hint = near(name, self.known).partition(" Known: ")[0]  # their order says more
        reason = "" if why is None else f": {why}"
        return (
            f"unknown setting {name!r} of {self.family}{reason}{hint} Known: "
            f"{'; '.join((', '.join(self.known), *also))}"
        )


# -- what several families have ------------------------------------------------------------------

#: of decoders that fill blocks of the canvas in steps
BLOCKS = {"block_length": Setting(None, count), "steps": Setting(None, count)}
TEMPERATURE = {"temperature": Setting(0.0, number)}
#: of decoders with classifier-free guidance, as LLaDA's
GUIDED = {
    **BLOCKS,
    **TEMPERATURE,
    "cfg_scale": Setting(0.0, number),
    "remasking": Setting("low_confidence", one_of("low_confidence", "random")),
}


def read_guided(
    settings: Settings, given: Mapping[str, Any], generator: torch.Generator | None, tokens: str
) -> dict[str, Any]:
    """Settings of a decoder that has :data:`GUIDED`; by default it takes one step per token.

    ``tokens`` is the setting that holds the canvas's length.
    """
    made = settings.read(given)
    made["steps"] = made[tokens] if made["steps"] is None else made["steps"]
    in_blocks(made, tokens)
    need_generator(made["temperature"] > 0 or made["remasking"] == "random", generator)
    return made


def in_blocks(made: dict[str, Any], tokens: str = "gen_length") -> int:
    r"""Check ``block_length`` and ``steps``, and fill in the first: the whole canvas by default.

    Args:
        made (dict): settings; ``steps`` None is not checked.
        tokens (str, optional): the setting that holds the canvas's length.

    Returns:
        int: the number of blocks.
    """
    total, block, steps = made[tokens], made["block_length"], made["steps"]
    block = made["block_length"] = total if block is None else block
    if total % block:
        raise InputError(f"{tokens} {total} is not a multiple of block_length {block}")
    blocks = int(total // block)
    if steps is not None and (steps < blocks or steps % blocks):
        raise InputError(
            f"steps is {steps}: expected a positive multiple of the {blocks} blocks ({tokens} "
            f"{total} / block_length {block})"
        )
    return blocks


def need_generator(random: bool, generator: torch.Generator | None) -> None:
    """Raise where random numbers are drawn, and nobody said from what."""
    if random and generator is None:
        raise InputError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
