r"""A live line on a terminal: images done, rate, time left, what is running, failures."""

from __future__ import annotations

from tqdm import tqdm


class Progress:
    """What the harness tells about its work; this one does nothing with it."""

    def begin(self, total: int, done: int, failed: int) -> None:
        """``total`` images in this shard, ``done`` stored already, ``failed`` of these failed."""

    def say(self, text: str) -> None:
        """What is being done."""

    def image(self, failed: bool) -> None:
        """One more image is stored."""

    def end(self) -> None:
        """Nothing more comes."""


class Silent(Progress):
    """Tells nobody."""


class Live(Progress):
    r"""A bar on stderr; nothing where stderr is no terminal.

    Args:
        label (str, optional): what stands before it, such as the shard.
        position (int, optional): line of the bar, where several processes share a terminal.
    """

    def __init__(self, label: str = "evaluate", position: int = 0) -> None:
        self.label, self.position, self.failed = label, position, 0
        self._bar: tqdm | None = None

    def begin(self, total: int, done: int, failed: int) -> None:
        self.failed = failed
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=self.label,
            unit="image",
            disable=None,
            dynamic_ncols=True,
            position=self.position,
            smoothing=0.1,
        )

    def say(self, text: str) -> None:
        if self._bar is not None:
            failures = f"{self.failed} failed, " if self.failed else ""
            self._bar.set_postfix_str(f"{failures}{text}")

    def image(self, failed: bool) -> None:
        self.failed += failed
        if self._bar is not None:
            self._bar.update()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
