"""Exceptions that name the value, what was expected, and the next step.

All of them are a :class:`DcamError`, so that ``except DcamError`` tells what this library refuses
from what goes wrong inside torch, or inside this library. Where Python has a type for the kind of
mistake, it is a second base: ``except ValueError`` catches an :class:`InputError` as well.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class DcamError(Exception):
    """Base of every exception that this library raises on purpose."""


class InputError(DcamError, ValueError):
    """A value that is out of range, or does not fit what else was given."""


class InputTypeError(DcamError, TypeError):
    """A value of another type than expected."""


class WrongTypeError(InputError, InputTypeError):
    """A setting's value of another type than expected."""


class SettingError(DcamError, TypeError, ValueError):
    """A setting that an entry of a registry does not have; names those it has."""


class UnknownNameError(DcamError, KeyError, ValueError):
    """A name that no registry holds."""

    def __str__(self) -> str:
        return str(self.args[0])


class RegistrationError(InputError):
    """A name that belongs to something else already."""


class InfeasibleStepError(InputError):
    """The states of the chosen call do not hold the image, or have no path to the logits."""


class NotFiniteError(InputError):
    """The model's numbers are NaN or infinite; says which, and what to do."""


class LayerError(InputError):
    """The chosen block does not exist, or its image states cannot influence the answer."""


class TargetError(InputError):
    """The word, position or token to explain is not in the answer."""


class WeightsError(InputError):
    """A weight file or folder that is damaged or belongs to another model."""


class ProcessorError(WrongTypeError):
    """A processor of another kind or of another checkpoint than its model."""


class MethodError(InputError):
    """A method that cannot run on this model, or lacks what it needs; says what."""


class SavedError(InputError):
    """Something saved that is damaged, was edited, or is of a version that is not known; base of
    the errors of each kind of saved thing."""


class ExplanationError(SavedError):
    """A saved explanation or comparison that cannot be read."""


class NotBoundError(DcamError, RuntimeError):
    """A forward that has no generation yet; says how to bind one."""


class ReplayError(DcamError, RuntimeError):
    """A replayed step is not the generation's; says how far it is, and what may be the reason."""


class BudgetExhaustedError(DcamError, RuntimeError):
    """A method's budget is spent."""


class MissingPackageError(DcamError, ImportError):
    """A package that is not installed, or of a version that does not fit; says what to install."""


class FileError(DcamError, OSError):
    """A file or folder that is damaged, or cannot be written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that is not there."""


class OccupiedError(FileError, FileExistsError):
    """A folder or file that holds something else, which is not replaced."""


class ForbiddenError(FileError, PermissionError):
    """A folder that may not be written."""


class NoFolderError(FileError, NotADirectoryError):
    """A file where a folder is needed."""


class RemoteCodeError(DcamError, PermissionError):
    """Python code inside a checkpoint would have to run, and was not allowed to."""


class PictureError(InputError):
    """A file that cannot be used as an image."""


class EvaluationError(DcamError, RuntimeError):
    """An image that could not be measured; names it. What was measured before is stored."""


class StoreError(SavedError):
    """A store that is damaged, in use, unfinished, or belongs to another plan."""


class PresetError(SavedError):
    """A preset file that cannot be read; says what is wrong with it."""


class UsageError(InputError):
    """What the user can correct, said for people instead of for programs."""


class CalibrationError(InputError):
    """Images or settings that cannot be fitted; says what to do."""


class ConformanceError(DcamError, AssertionError):
    """An adapter does not keep the protocol; says where, and what was expected."""


#: of more names than these only the near ones are shown
FEW = 16


def folded(name: object) -> str:
    """A name without what people write differently: case, underscores, hyphens and blanks."""
    return re.sub(r"[\s_-]", "", str(name).lower())


def near(name: object, known: Iterable[str], listed: str = "") -> str:
    r"""``"; did you mean 'x'? Known: …"`` for an unknown name; of many known names the near ones.

    Args:
        name (object): what was given.
        known (iterable of str): the names that are taken.
        listed (str, optional): where many are listed, such as a command. Default: nowhere
    """
    names = sorted(known)
    by_key = {folded(each): each for each in names}
    keys = difflib.get_close_matches(folded(name), by_key, n=2)
    if len(names) > FEW:
        keys += [key for key in by_key if len(folded(name)) > 2 and folded(name) in key]
    close = [by_key[key] for key in dict.fromkeys(keys)][:4]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    if len(names) <= FEW:
        return f"{hint} Known: {', '.join(names)}"
    return f"{hint} Known are {len(names)} names{f', which {listed} lists' if listed else ''}"
