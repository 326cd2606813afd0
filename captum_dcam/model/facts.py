"""What a model family declares, and what is known of it without a model; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from captum_dcam.registry import Registry


@dataclass(frozen=True)
class Checkpoint:
    r"""Depths of a published model, which are known without loading it.

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
class FamilyFacts:
    r"""What is known of a family without a model of it.

    Args:
        checkpoints (tuple of Checkpoint): published ones that its adapter runs.
        package (str, optional): name by which the authors' package is imported. Default: None,
            none is needed
        install (str, optional): the line that installs it.
        transformers (str, optional): versions that its model runs with, as pip writes ranges;
            ``load`` and ``wrap`` refuse others. Default: all that this library runs with
        remote_code (bool): the model's code comes with its checkpoints, and runs only where
            ``trust_remote_code=True`` allows it.
        feasible (str, optional): which calls hold the image, where the cache alone does not tell.
        notes (tuple of str): surprising defaults of the family's own code.
        decodings (mapping): settings of a generation by the name of who uses them: ``demo`` (the
            authors' demo), ``paper`` (their evaluation).
        turns (tuple of str): how a question is written, as the authors do: from the user's role to
            where the answer begins, with ``{}`` for the question; one for each kind of checkpoint.
            The conversation is rendered by the tokenizer's own template, which may be another.
        rotary (tuple of float): bases of the rotary frequencies that published checkpoints have;
            a replay with wrong ones equals a generation with the same wrong ones.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    package: str | None = None
    install: str | None = None
    transformers: str = ">=4.39"
    remote_code: bool = False
    feasible: str | None = None
    notes: tuple[str, ...] = ()
    decodings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    turns: tuple[str, ...] = ()
    rotary: tuple[float, ...] = ()


#: turns that several families' authors write
LLADA_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def last_but_one(blocks: int) -> int:
    """Of ``blocks``, the deepest with a path from image tokens to the response."""
    return blocks - 2


def third_of(blocks: int) -> int:
    """A third of the depth, as the paper's block 10 of 32."""
    return round(blocks * 10 / 32)


class ModelFamily:
    r"""What a family declares: an adapter does, and where its folder has ``facts.py``, a class
    there, from which the adapter inherits, and which ``captum-dcam models`` reads alone."""

    family: ClassVar[str]
    caches: ClassVar[tuple[str, ...]] = ("prefix", "none")
    #: several examples can run in one batch
    batches: ClassVar[bool] = True
    #: an example may show several images
    several_images: ClassVar[bool] = True
    #: a :class:`~captum_dcam.model.prompts.Video` may stand in an image's place
    takes_video: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = None


F = TypeVar("F", bound=type[ModelFamily])
#: what was declared without its adapter so far, by name
FAMILIES: Registry[type[ModelFamily]] = Registry("model family")


def declare(cls: F) -> F:
    """Class decorator of ``facts.py``: what the family of this folder declares."""
    return FAMILIES.register(cls.family)(cls)
