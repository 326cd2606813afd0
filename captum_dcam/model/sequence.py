r"""The whole sequence of one state: hidden states of any block, and which positions are text.

With a prefix cache the prefix's states come from the prefill and the response's from the step;
without a cache one call gives both. Here they are put together, in the order of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.tap import hidden_of, hooked, replace_hidden
from captum_dcam.model.words import answer_token_texts


@dataclass(frozen=True)
class TextTokens:
    r"""The text of a request and its answer, K tokens: the prompt's, then the T of the answer.

    Args:
        positions (Tensor): (K,) int64 positions in the hooked sequence.
        ids (Tensor): (K,) int64 token ids.
        token_texts (tuple of str): their text, with a leading blank where a word begins; empty for
            stop tokens.
        prompt (int): number of the prompt's tokens among them.
    """

    positions: Tensor
    ids: Tensor
    token_texts: tuple[str, ...]
    prompt: int

    def __len__(self) -> int:
        return len(self.positions)


def text_tokens(forward: DenoisingForward, example: int = 0) -> TextTokens:
    """Text tokens of the bound request's prompt and of its answer."""
    positions, ids = forward.adapter.prompt_tokens(forward.request, example)
    answer = forward.trajectory.tokens[example].cpu()
    start = forward.request.layout.prefix_length
    every = torch.cat((ids.cpu(), answer))
    return TextTokens(
        torch.cat((positions.cpu(), torch.arange(start, start + len(answer)))),
        every,
        answer_token_texts(forward.adapter, every.tolist()),
        len(ids),
    )


def prompt_dialogue(forward: DenoisingForward, example: int = 0) -> Tensor:
    """(number of the prompt's text tokens,) bool: which of them the prompt itself says, and not
    the chat template (:attr:`captum_dcam.model.adapter.Request.dialogue`)."""
    positions, _ = forward.adapter.prompt_tokens(forward.request, example)
    return forward.request.dialogue[example, positions.cpu()]


def image_positions(forward: DenoisingForward) -> Tensor:
    """Positions (N,) of all image tokens, grid after grid, row by row."""
    return torch.cat([g.positions.flatten() for g in forward.request.layout.grids])


def split_grids(values: Tensor, forward: DenoisingForward) -> tuple[Tensor, ...]:
    """Values (…, N) of all image tokens as maps (…, h, w), one per grid."""
    shapes = forward.request.layout.shapes
    parts = values.split([h * w for h, w in shapes], dim=-1)
    return tuple(p.unflatten(-1, s) for p, s in zip(parts, shapes, strict=True))


@contextmanager
def outputs_of(
    blocks: dict[int, nn.Module],
    edit: Callable[[Tensor, int], Tensor] | None = None,
    twins: Sequence[nn.Module] = (),
) -> Iterator[dict[int, list[Tensor]]]:
    """Hidden states (B, L, D) that blocks return, call after call; ``edit`` may replace them.
    ``twins`` are the adapter's ``step_blocks``: a twin counts as the block of the same number."""
    found: dict[int, list[Tensor]] = {index: [] for index in blocks}

    def note(index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            changed = hidden if edit is None else edit(hidden, index)
            found[index].append(changed)
            return output if changed is hidden else replace_hidden(output, changed)

        return hook

    pairs = [*blocks.items(), *((i, twins[i]) for i in blocks if twins)]
    with hooked((block, note(i)) for i, block in pairs):
        yield found


def unkept(forward: DenoisingForward) -> DenoisingForward:
    """The same forward without recorded block outputs: every block is computed again.

    Recorded blocks below the tap hand on what they were given. That is right for the blocks above,
    and wrong for a method that reads these blocks.
    """
    kept = {k: v for k, v in forward.trajectory.kept.items() if k in ("embedded", "stamp")}
    return forward.again(trajectory=replace(forward.trajectory, kept=kept))


def check_single(count: int, length: int) -> None:
    """Raise MethodError where a state of several canvases has more positions than the sequence."""
    if count > length:
        raise MethodError(
            f"the state ran {count} positions for a sequence of {length}: the answer's canvases "
            "are read one after the other in it; choose the score commit or final"
        )


def check_whole(count: int, length: int) -> None:
    """Raise MethodError where a step ran a part of the sequence and read the rest from a cache."""
    if count < length:
        raise MethodError(
            f"a step ran {count} of the sequence's {length} positions and took the others from a "
            "cache, and this method reads all of them in one pass: decode without that cache, or "
            "choose a method that follows gradients"
        )


def padded(rows: Tensor, length: int) -> Tensor:
    """Rows (L, …) of a sequence that may not be complete yet, with zeros for the rest.

    Families that write several canvases one after the other have no states of later canvases.
    """
    check_single(len(rows), length)
    return torch.cat((rows, rows.new_zeros(length - len(rows), *rows.shape[1:])))


def hidden_states(
    forward: DenoisingForward,
    block: int,
    step: int,
    edit: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Hidden states of a whole sequence of one example (batch 1), and the response's logits.

    Args:
        forward (DenoisingForward): bound, batch 1.
        block (int): whose output; negative counts from the end.
        step (int): of the generation; ``trajectory.steps`` for the visible answer.
        edit (callable, optional): replaces the outputs, call by call (to make leaves of them).

    Returns:
        tuple: hidden (L, D), the prefix first, then the response; logits (T, V).
    """
    fresh = unkept(forward)
    blocks, twins = fresh.adapter.blocks, fresh.adapter.step_blocks
    index = range(len(blocks))[block]
    with outputs_of({index: blocks[index]}, edit, twins) as found:
        logits = fresh.replay(torch.tensor([0]), torch.tensor([step]))
    hidden = torch.cat([h[0] for h in found[index]])
    length = forward.request.layout.prefix_length + logits.shape[1]
    return padded(hidden, length) if twins else hidden, logits[0]
