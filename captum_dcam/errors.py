"""Exceptions that name the value, what was expected, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InfeasibleStepError(ValueError):
    """The chosen call's hooked states do not hold the image, or have no path to the logits."""


class LayerError(ValueError):
    """The chosen block does not exist, or its image states cannot influence the answer."""


class TargetError(ValueError):
    """The word, position or token to explain is not in the answer."""


class UnknownNameError(KeyError):
    """A name that no registry holds."""

    def __str__(self) -> str:
        return str(self.args[0])


class SettingError(TypeError, ValueError):
    """A setting that what is called by name does not have; names those it has."""


class WeightsError(ValueError):
    """A weight file or folder that is damaged or belongs to another model."""


class RemoteCodeError(PermissionError):
    """Python code inside a checkpoint would have to run, and was not allowed to."""


class MethodError(ValueError):
    """A method that cannot run on this model, or lacks what it needs; says what."""


class BudgetExhaustedError(RuntimeError):
    """A method's budget is spent."""


class ExplanationError(ValueError):
    """A saved explanation that cannot be read."""


def near(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'? Known: …"`` for an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"{hint} Known: {', '.join(names)}"
