r"""Decoders of others that make their own canvas of masks, started with given tokens in it.

Their loops fill whatever is masked, so nothing of them changes but the canvas: where they make one
that ends in masks, of ids or of the mask's embedding, the given tokens are put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_dcam.errors import InputError
from captum_dcam.model.trajectory import Given

#: what makes a canvas: of ids, or of the mask's embedding, alone or behind the prompt's
MAKING = (torch.full, Tensor.repeat, torch.cat)


class _Canvases(TorchFunctionMode):
    """Puts given tokens into what is made for a prompt of P and an answer of T tokens."""

    def __init__(self, given: Given, prompt: int, mask_id: int, words: nn.Module) -> None:
        super().__init__()
        self._given, self._prompt = given, prompt
        self._mask, self._words = mask_id, words

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in MAKING or not isinstance(out, Tensor) or out.ndim not in (2, 3):
            return out
        length, ids = self._given.tokens.shape[1], out.ndim == 2
        if out.shape[1] not in (length, self._prompt + length):
            return out
        tokens, at = (x.to(out.device) for x in (self._given.tokens, self._given.at[0]))
        mask = tokens.new_tensor([self._mask])
        if not ids:
            mask, tokens = self._words(mask), self._words(tokens)
        end = out[:, out.shape[1] - length :]
        if (
            end.shape[2:] == mask.shape[1:]
            and end.dtype == mask.dtype
            and bool((end == mask).all())
        ):
            end[:, at] = tokens[:, at]
        return out


@contextmanager
def started(given: Given | None, prompt: int, mask_id: int, words: nn.Module) -> Iterator[None]:
    r"""Inside the context a decoder's canvas of masks has the given tokens in it.

    Args:
        given (Given or None): (1, T), as long as the decoder's answer; None: nothing changes.
        prompt (int): P, tokens of the prompt.
        mask_id (int): of the mask token.
        words (nn.Module): embeds ids.
    """
    if given is None:
        yield
        return
    with _Canvases(given, prompt, mask_id, words):
        yield


def placing(given: Given | None, prompt: int) -> Callable[[Any, Tensor, Any], Tensor]:
    """The hook on tokens of Dream's ``diffusion_generate``: at its beginning the given tokens are
    put behind a prompt of P tokens."""

    def hook(step: int | None, x: Tensor, _logits: Any) -> Tensor:
        if step is None and given is not None:
            x = x.clone()
            x[:, prompt:] = given.tokens.where(given.at, x[:, prompt:])
        return x

    return hook


def check_over(given: Given | None, steps: int, block: int, name: str, family: str) -> None:
    """Raise where a block's step may write more tokens than it has masks, over given ones."""
    if given is None or steps >= block or not bool(given.at.any()):
        return
    raise InputError(
        f"{name} is {steps} for blocks of {block} tokens, some of which are given: where fewer are "
        f"masked than a step of {family} writes, it writes over others; give {name}={block}, one "
        "token per step"
    )
