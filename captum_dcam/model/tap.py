r"""The tap: image tokens of a transformer block as feature maps (B, D, H, W).

The hooked block's output is opened, its image tokens pass through :class:`SpatialTap`, an ordinary
submodule, and are put back. Captum's and pytorch-grad-cam's layer methods can hook that submodule
as they hook a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.errors import InputTypeError, NotFiniteError
from captum_dcam.model.layout import Layout

#: a function of one feature map (B, D, H, W) and its grid's index
Edit = Callable[[Tensor, int], Tensor]


class SpatialTap(nn.Module):
    """Identity on feature maps; ``edit`` may replace them (ablations). While ``leaves`` is a list,
    the states of all tokens of the block become leaves of the graph, and are put there; ``parts``
    counts the calls meanwhile that ran a part of the answer alone, behind an earlier call's cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.edit: Edit | None = None
        self.leaves: list[Tensor] | None = None
        self.parts = 0

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Leaves are collected while the context is open."""
        self.leaves, self.parts = [], 0
        try:
            yield
        finally:
            self.leaves = None

    def leaf(self, hidden: Tensor) -> Tensor:
        """The states as a leaf where leaves are collected, else as they are."""
        if self.leaves is None or not torch.is_grad_enabled():
            return hidden
        self.leaves.append(hidden.detach().requires_grad_())
        return self.leaves[-1]

    def forward(self, *grids: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, D, h, w) for one grid, a tuple of them for several."""
        if self.edit is not None:
            grids = tuple(self.edit(grid, i) for i, grid in enumerate(grids))
        return grids[0] if len(grids) == 1 else grids


def finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """The values; NotFiniteError where they are NaN or infinite. What a decoder has ruled out may
    be minus infinity, see :func:`captum_dcam.model.forward.finite_logits`."""
    if not bool(values.detach().isfinite().all()):
        raise not_finite(what, dtype)
    return values


def not_finite(what: str, dtype: torch.dtype) -> NotFiniteError:
    """The error about numbers of a type, and what to do."""
    advice = (
        "check that the checkpoint is whole and its weights finite, and try dtype=torch.float32; "
        "quantised weights: another quantisation"
    )
    if dtype == torch.float16:
        advice = (
            "float16 overflows beyond 65504; load the model with dtype=torch.bfloat16 or float32"
        )
    name = str(dtype).removeprefix("torch.")
    return NotFiniteError(f"{what} are NaN or infinite, computed in {name}: {advice}")


def wide(x: Tensor) -> Tensor:
    """Float32, or float64 where it was."""
    return x if x.dtype == torch.float64 else x.float()


def gather(hidden: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Image tokens of a sequence (B, L, D) as feature maps, one (B, D, h, w) per grid."""
    maps = []
    for grid in layout.grids:
        rows = hidden[:, grid.positions.flatten().to(hidden.device)]
        maps.append(rows.transpose(1, 2).unflatten(2, grid.shape))
    return tuple(maps)


def scatter(hidden: Tensor, maps: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Put feature maps back into a sequence: the inverse of :func:`gather`."""
    rows = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
    where = torch.cat([g.positions.flatten() for g in layout.grids]).to(hidden.device)
    return hidden.index_copy(1, where, rows.to(hidden.dtype))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: a tensor, ``(hidden,)``, ``(hidden, anything)``."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise InputTypeError(
            f"the hooked block returned {type(output).__name__}: expected hidden states (B, L, D), "
            "alone or first in a tuple; choose a transformer block as the layer"
        )
    return hidden


def replace_hidden(output: Any, hidden: Tensor | None) -> Any:
    """The block's output with other hidden states, in the same form; None: with none."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on modules inside the context; they are gone afterwards."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tapped(
    block: nn.Module, tap: SpatialTap, layout: Layout, rows: int | None = None
) -> Iterator[None]:
    """Send the block's image tokens through the tap while the context is open.

    Where gradients are wanted and nothing upstream requires them, the feature maps become leaves:
    parameters can stay frozen, and the graph starts here. Only the first ``rows`` of the hooked
    batch hold the image: guided decoding appends unconditional rows, which see none. Default: all
    """

    def open_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if hidden.shape[1] < layout.image_end:
            tap.parts += 1
            return None
        grids = gather(hidden[:rows], layout)
        for grid in grids:
            finite(grid, "the features of the tapped block", hidden.dtype)
        if torch.is_grad_enabled() and (tap.leaves is not None or not hidden.requires_grad):
            grids = tuple(g.detach().requires_grad_() for g in grids)
        hidden = tap.leaf(hidden)
        out = tap(*grids)
        maps = out if isinstance(out, tuple) else (out,)
        opened = scatter(hidden[:rows], maps, layout)
        if rows is not None and rows < len(hidden):
            opened = torch.cat((opened, hidden[rows:]))
        return replace_hidden(output, opened)

    with hooked([(block, open_output)]):
        yield


def opened(blocks: Iterable[nn.Module], tap: SpatialTap) -> AbstractContextManager[None]:
    """Make the states that blocks return leaves of the tap while the context is open; no image
    tokens are among them."""

    def open_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replace_hidden(output, tap.leaf(hidden_of(output)))

    return hooked((block, open_output) for block in blocks)


@contextmanager
def recorded(blocks: list[nn.Module], keep: bool) -> Iterator[tuple[list[int], list[list[Any]]]]:
    """Record the last block's sequence length at every call, and with ``keep`` all outputs.

    Yields:
        lengths (one per call) and outputs (per call one per block); every call adds to both.
    """
    lengths: list[int] = []
    outputs: list[list[Any]] = []
    current: list[Any] = []

    def note(index: int) -> Callable[..., None]:
        last = index == len(blocks) - 1

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if keep:
                # below the tap only what a block hands to a cache is needed, not its hidden states
                current.append(output if last else replace_hidden(output, None))
            if last:
                lengths.append(hidden_of(output).shape[1])
                outputs.append(current.copy())
                current.clear()

        return hook

    with hooked((block, note(i)) for i, block in enumerate(blocks)):
        yield lengths, outputs


@contextmanager
def skipped(blocks: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Let ``blocks`` return recorded outputs without computing them, while the context is open."""

    def stand_in(output: Any) -> Callable[..., Any]:
        kept = output[0] if isinstance(output, tuple) else output

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            return replace_hidden(output, hidden) if kept is None else output

        return forward

    own = [vars(block).get("forward") for block in blocks]  # accelerate's, where it spreads a model
    for block, output in zip(blocks, outputs, strict=True):
        block.forward = stand_in(output)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
