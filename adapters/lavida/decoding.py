r"""How LaViDa's Dream decodes: recording it, and one step with gradients.

Dream predicts position p at p - 1 and has a cache object, and its first token is the argmax of the
prefill's last row. LLaDA's part is shared with LaViDa-O.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.llada import Llada, Recorder, shared_arguments, steps_of
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.lavida import settings


@dataclass
class DreamRecorder(Recorder):
    """Position p is predicted at p - 1, and behind a cache the first token is taken from the
    prefill before the first step."""

    _first: Tensor | None = None

    def score(self, logits: Tensor) -> None:
        if not self.canvases:
            self._first = logits[:, -1]  # the prefill's
            return
        super().score(torch.cat((logits[:, :1], logits[:, :-1]), dim=1))

    def sureness(self, tokens: Tensor) -> Tensor:
        out = self.confidence.clone()
        if self._first is not None:
            chosen = self._first.double().softmax(-1).gather(-1, tokens[:, :1])
            out[:, :1] = chosen.float().cpu()
        return out


@dataclass(frozen=True)
class Prefilled(Prefix):
    """A prefix behind Dream's prefill; ``kind`` is the class of its cache."""

    kind: Any = None


class Dream(Llada):
    """The language model Dream."""

    shift = 1
    mask_id = 151666
    stop_ids = (151643, 151645)
    attention = "self_attn"

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.model.layers)

    @property
    def words(self) -> nn.Module:
        return self.model.model.embed_tokens

    @property
    def head(self) -> nn.Module:
        return self.model.lm_head

    def checked(
        self, given: dict[str, Any], cached: bool, generator: torch.Generator | None
    ) -> dict[str, Any]:
        return settings.checked(given, cached, generator)

    def arguments(self, made: dict[str, Any], cached: bool, mask_id: int) -> dict[str, Any]:
        out = {**shared_arguments(made, cached), "steps": steps_of(made)}
        out |= {name: made[name] for name in ("alg", "alg_temp", "top_p", "top_k")}
        if made["step_ratio"] is not None:
            out |= {"steps": made["gen_length"], "step_ratio": made["step_ratio"]}
        return out

    def recorder(self, mask_id: int, length: int) -> Recorder:
        return DreamRecorder(mask_id, length=length)

    def keeps(self, cached: bool) -> bool:
        # the cache is one object that all blocks fill: their outputs cannot stand in for it
        return not cached

    def prefilled(self, prefix: Prefix) -> Prefix:
        out = self.model.forward_dream(
            None, None, None, inputs_embeds=prefix.embeds, use_cache=True
        )
        held = out.past_key_values
        pairs = tuple(held.past_key_values[i] for i in range(len(self.blocks)))
        return Prefilled(prefix.embeds, pairs, out.logits[:, -1], type(held))

    def step_logits(self, prefix: Prefix, canvas: Tensor) -> Tensor:
        embeds, held = self.joined(prefix, canvas), None
        if isinstance(prefix, Prefilled):
            held = prefix.kind()
            held.past_key_values = dict(enumerate(prefix.cache))
        out = self.model.forward_dream(None, None, None, inputs_embeds=embeds, past_key_values=held)
        if isinstance(prefix, Prefilled):
            return torch.cat((prefix.last[:, None], out.logits[:, :-1]), dim=1)
        return out.logits[:, -canvas.shape[1] - 1 : -1]

    def unembedded(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Dream's blocks are compiled, anew for every length and mode of gradients, with other
        rounding."""
        with torch.compiler.set_stance("force_eager"):
            yield


#: language model by the name of the variant
LANGUAGES: dict[str, type[Llada]] = {"llada": Llada, "dream": Dream}
