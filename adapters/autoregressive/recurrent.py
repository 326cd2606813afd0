r"""What layers of linear attention (Qwen3.5) cache, so that a gradient reaches through it.

A module of its own: transformers before 5 has no such layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


class Recurrent(LinearAttentionLayer):
    r"""What a layer of linear attention caches, assigned anew by every call.

    transformers' own layer copies into its states, which a gradient through an earlier call needs
    as they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record_past = True  # else a single token is written into the convolution's state

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        before = self.conv_states[state_idx]
        whole = conv_states if before is None else torch.cat((before, conv_states), -1)
        size = conv_kernel_size or whole.shape[-1]
        missing = max(size - whole.shape[-1], 0)
        self.conv_states[state_idx] = nn.functional.pad(whole, (missing, 0))[..., -size:]
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


def hybrid(kinds: Iterable[str]) -> Cache:
    """An empty cache of layers of these kinds."""
    return Cache([Recurrent() if k == "linear_attention" else DynamicLayer() for k in kinds])
