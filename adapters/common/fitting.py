"""Does a processor fit its model: what several families check, in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from captum_dcam.errors import ProcessorError


def misfit(processor: str, model: str) -> ProcessorError:
    """The error about a processor and a model of different checkpoints."""
    return ProcessorError(
        f"processor and model do not fit: {processor}, {model}; load both from one checkpoint"
    )


def check_vocabulary(tokenizer: Any, embeddings: int, needed: Mapping[str, int]) -> None:
    r"""Raise for the tokenizer of another checkpoint.

    Args:
        tokenizer (object): of the processor.
        embeddings (int): ids that the model embeds.
        needed (mapping): ids that the model gives a meaning to, by what that is: ``mask``.

    Raises:
        ProcessorError: more ids than embeddings, or an id that the tokenizer does not have.
    """
    count = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if count > embeddings:
        raise misfit(f"the tokenizer has {count} tokens", f"the model {embeddings} embeddings")
    for what, number in needed.items():
        if not _has(tokenizer, number):
            raise misfit(
                f"the tokenizer, of {count} tokens, has none with the id {number}",
                f"the model's {what} token has it",
            )


def _has(tokenizer: Any, number: int) -> bool:
    """Whether an id is a token's; one of somebody's own may not tell."""
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is None:
        return True
    try:
        return convert(number) is not None
    except (IndexError, OverflowError):  # sentencepiece's
        return False
