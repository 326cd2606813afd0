r"""How LaViDa's Dream decodes: its settings, recording it, and one step with gradients.

Dream predicts position p at p - 1 and has a cache object, and its first token is the argmax of the
prefill's last row. LLaDA's part is shared with LaViDa-O.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.common.holes import placing
from captum_dcam.adapters.common.llada import (
    GEN_LENGTH,
    STEPS,
    Llada,
    Recorder,
    check_steps,
    shared_arguments,
    steps_of,
)
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.settings import (
    Setting,
    Settings,
    count,
    need_generator,
    number,
    one_of,
    share,
)
from captum_dcam.errors import InputError
from captum_dcam.model.guard import eager
from captum_dcam.model.trajectory import Given

SETTINGS = Settings(
    "LaViDa-Dream",
    {
        "gen_length": GEN_LENGTH,
        **STEPS,
        "alg": Setting("entropy", one_of("origin", "maskgit_plus", "topk_margin", "entropy")),
        "alg_temp": Setting(0.0, number),
        "top_p": Setting(0.95, share, none=True),
        "top_k": Setting(50, count, none=True),
    },
    refused={"remasking": "its counterpart here is alg"},
)


def checked(
    given: dict[str, Any], cached: bool, generator: torch.Generator | None
) -> dict[str, Any]:
    """The settings, checked before any work is done; the whole canvas is one block."""
    made = SETTINGS.read(given)
    drawn = made["temperature"] > 0 or made["alg_temp"] > 0 or made["alg"] == "origin"
    need_generator(drawn, generator)
    made["block_length"] = made["gen_length"]
    each = check_steps(made)
    left = made["gen_length"] - cached  # the prefill commits a token
    if made["schedule"] is not None and each > left:
        raise InputError(
            f"{each} steps with schedule {made['schedule']!r}: LaViDa-Dream fails when there are "
            f"more steps than the {left} tokens that the prefill leaves; give fewer steps, a "
            "longer gen_length, or no schedule"
        )
    return made


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

    @property
    def confidence(self) -> Tensor:
        out = super().confidence.clone()
        if self._first is not None:
            chosen = self._first.double().softmax(-1).gather(-1, self.tokens[:, :1])
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
    parts = ("model.layers", "model.embed_tokens", "lm_head")
    attention = "self_attn"
    recorder = DreamRecorder
    keeps_cached = False  # the cache is one object that all blocks fill: outputs cannot replace it

    def checked(
        self, given: dict[str, Any], cached: bool, generator: torch.Generator | None
    ) -> dict[str, Any]:
        return checked(given, cached, generator)

    def arguments(self, made: dict[str, Any], cached: bool, mask_id: int) -> dict[str, Any]:
        out = {**shared_arguments(made, cached), "steps": steps_of(made)}
        out |= {name: made[name] for name in ("alg", "alg_temp", "top_p", "top_k")}
        if made["step_ratio"] is not None:
            out |= {"steps": made["gen_length"], "step_ratio": made["step_ratio"]}
        return out

    def start(
        self, given: Given, made: dict[str, Any], prefix: int, mask_id: int
    ) -> dict[str, Any]:
        """A first position that is to be filled is the prefill's, which sees no given word."""
        left = int((~given.at).sum()) - (not prefix and not bool(given.at[0, 0]))
        if made["schedule"] is not None and steps_of(made) > left:
            raise InputError(
                f"{steps_of(made)} steps with schedule {made['schedule']!r} for {left} holes: "
                "LaViDa-Dream fails when there are more steps than masks; give fewer steps, or no "
                "schedule"
            )
        return {"generation_tokens_hook_func": placing(given, prefix)}

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
        with eager():
            yield


#: language model by the name of the variant
LANGUAGES: dict[str, type[Llada]] = {"llada": Llada, "dream": Dream}
