r"""How far long work is: what takes more than five seconds on some model takes ``progress``.

``True`` shows a bar on stderr, a function receives every part's name before it begins, and an
object of a class derived from :class:`Progress` receives everything. Where nobody knows the number
of parts, passes through the model's first block are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from captum_dcam.errors import InputTypeError
from captum_dcam.shown import harmless

if TYPE_CHECKING:
    from captum_dcam.model.adapter import Adapter


class Progress:
    """What is told about work; this one does nothing with it."""

    def begin(self, total: int | None, done: int = 0, failed: int = 0) -> None:
        """``total`` parts (None: nobody knows), ``done`` already, ``failed`` of these failed."""

    def say(self, text: str) -> None:
        """What is being done."""

    def image(self, failed: bool = False) -> None:
        """One more part, such as an image, is done."""

    def tick(self) -> None:
        """One more pass through the model begins."""

    def end(self) -> None:
        """Nothing more comes."""


class Silent(Progress):
    """Tells nobody."""


class Live(Progress):
    r"""A bar on stderr.

    Args:
        label (str, optional): what stands before it, such as the shard.
        position (int, optional): line of the bar, where several processes share a terminal.
        unit (str, optional): what a part is. Default: ``"image"``
        always (bool, optional): also where stderr is no terminal, as in a notebook. Default: False
    """

    def __init__(
        self,
        label: str = "evaluate",
        position: int = 0,
        unit: str = "image",
        always: bool = False,
    ) -> None:
        self.label, self.position, self.failed = harmless(label), position, 0
        self.unit, self.always = unit, always
        self._bar: tqdm | None = None

    def begin(self, total: int | None, done: int = 0, failed: int = 0) -> None:
        self.failed = failed
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=self.label,
            unit=self.unit if total is not None else "pass",
            disable=False if self.always else None,
            dynamic_ncols=True,
            position=self.position,
            smoothing=0.1,
        )

    def say(self, text: str) -> None:
        if self._bar is not None:
            failures = f"{self.failed} failed, " if self.failed else ""
            self._bar.set_postfix_str(f"{failures}{harmless(text)}")

    def image(self, failed: bool = False) -> None:
        self.failed += failed
        if self._bar is not None:
            self._bar.update()

    def tick(self) -> None:
        if self._bar is not None:
            self._bar.update(1 if self._bar.total is None else 0)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Told(Progress):
    """Hands names of parts to a function."""

    def __init__(self, told: Callable[[str], Any]) -> None:
        self._told = told

    def say(self, text: str) -> None:
        self._told(text)


#: True, a function of a part's name, or an object that receives everything; None and False: nobody
ProgressLike = bool | Callable[[str], Any] | Progress | None


def as_progress(given: ProgressLike, label: str, unit: str = "image") -> Progress:
    r"""What ``progress=`` stands for.

    Raises:
        InputTypeError: none of :data:`ProgressLike`.
    """
    if isinstance(given, Progress):
        return given
    if given is None or isinstance(given, bool):
        return Live(label, unit=unit, always=True) if given else Silent()
    if not callable(given):
        raise InputTypeError(
            f"progress is {given!r}: expected True, a function of a part's name, or a Progress"
        )
    return _Told(given)


@contextmanager
def watched(
    adapter: Adapter,
    given: ProgressLike,
    label: str,
    total: int | None = None,
    unit: str = "image",
) -> Iterator[Progress]:
    """Progress of work on a model that is held: of ``total`` parts, or of the passes it makes."""
    progress = as_progress(given, label, unit)
    if isinstance(progress, Silent):
        yield progress
        return
    progress.begin(total)
    try:
        with adapter.blocks[0].register_forward_pre_hook(lambda *_: progress.tick()):
            yield progress
    finally:
        progress.end()
