"""What can be said of a model family without a model of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checkpoint:
    r"""Depths of a published model, for those who have not loaded it.

    Args:
        name (str): on the hub.
        blocks (int): transformer blocks.
        deepest (int, optional): deepest usable block. Default: the last but one
        recommended (int, optional): block used when none is named. Default: a third of the depth
    """

    name: str
    blocks: int
    deepest: int | None = None
    recommended: int | None = None

    @property
    def deepest_block(self) -> int:
        return last_but_one(self.blocks) if self.deepest is None else self.deepest

    @property
    def recommended_block(self) -> int:
        rule = min(self.deepest_block, third_of(self.blocks))
        return rule if self.recommended is None else self.recommended


@dataclass(frozen=True)
class Facts:
    r"""What can be said of a family without a model of it.

    Args:
        checkpoints (tuple of Checkpoint): published ones that its adapter runs.
        package (str, optional): name by which the authors' package is imported. Default: None,
            none is needed
        install (str, optional): the line that installs it.
        transformers (str, optional): versions that ``load`` accepts, as pip writes ranges.
            Default: those that this library is tested with
        remote_code (bool): the model's code comes with its checkpoints, and runs only where
            ``trust_remote_code=True`` allows it.
        feasible (str, optional): which calls hold the image, where the regime does not say it all.
        notes (tuple of str): defaults of the family's own code that surprise.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    package: str | None = None
    install: str | None = None
    transformers: str = ">=5.0"
    remote_code: bool = False
    feasible: str | None = None
    notes: tuple[str, ...] = ()


def last_but_one(blocks: int) -> int:
    """Of ``blocks``, the deepest with a path from image tokens to the response."""
    return blocks - 2


def third_of(blocks: int) -> int:
    """A third of the depth, as the paper's block 10 of 32."""
    return round(blocks * 10 / 32)
