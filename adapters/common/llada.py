r"""LLaDA behind LLaVA-type packing, as LaViDa and LaViDa-O run it, with a cached prefix or none.

LLaDA predicts position p at position p and hands out keys and values as ``(k, v)`` per block. It
embeds the canvas's ids anew at every step, so a hook on the embedding sees every canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.compat import plain_tables
from captum_dcam.adapters.common.packing import PackedAdapter, Packing
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.recording import CanvasLog, seeded
from captum_dcam.adapters.common.settings import (
    BLOCKS,
    TEMPERATURE,
    Setting,
    Settings,
    in_blocks,
    length,
    need_generator,
    one_of,
    share,
)
from captum_dcam.adapters.common.text import LLADA
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request
from captum_dcam.model.guard import eager
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Given, Trajectory

# -- settings -------------------------------------------------------------------------------------

#: those that do not depend on the language model
STEPS = {
    "steps": BLOCKS["steps"],
    "step_ratio": Setting(None, share),
    **TEMPERATURE,
    "schedule": Setting(None, one_of("linear", "cosine", "shift", "logit_normal")),
    "shift": Setting(),
}
GEN_LENGTH = Setting(64, length, also="max_new_tokens")
#: ways of choosing what a step commits; upstream spells ``entrophy``
REMASKING = ("low_confidence", "random", "entropy", "margin")
SETTINGS = Settings(
    "LaViDa's LLaDA",
    {
        "gen_length": GEN_LENGTH,
        **BLOCKS,
        **STEPS,
        "remasking": Setting("low_confidence", one_of(*REMASKING)),
    },
    refused={"alg": "its counterpart here is remasking"},
)


def check_steps(made: dict[str, Any]) -> int:
    """Steps per block; raises for numbers of steps with which the family fails, or decodes
    nothing. ``block_length`` is filled in."""
    if made["shift"] is not None and (made["schedule"] != "shift" or made["shift"] <= 0):
        raise InputError(
            f"shift is {made['shift']} with schedule {made['schedule']!r}: it is a positive "
            "setting of schedule='shift' (0.33 in the authors' evaluation)"
        )
    if made["steps"] is not None and made["step_ratio"] is not None:
        raise InputError(
            f"steps {made['steps']} and step_ratio {made['step_ratio']}: give one of them, both "
            "say how many steps there are"
        )
    blocks = in_blocks(made)
    block, each = made["block_length"], steps_of(made) // blocks
    if each < 1:
        raise InputError(
            f"step_ratio {made['step_ratio']} of a block of {block} tokens is no step: give at "
            f"least {1 / block:g}"
        )
    if each > block:
        raise InputError(
            f"{each} steps for a block of {block} tokens: expected at most one step per token"
        )
    return each


def steps_of(made: dict[str, Any]) -> int:
    """Denoising steps in all."""
    if made["steps"] is not None:
        return int(made["steps"])
    ratio = 1.0 if made["step_ratio"] is None else made["step_ratio"]
    return int(made["gen_length"] // made["block_length"] * int(made["block_length"] * ratio))


def shared_arguments(made: dict[str, Any], cached: bool) -> dict[str, Any]:
    """Keyword arguments of the family's own ``generate`` that all language models have."""
    return {
        "max_new_tokens": made["gen_length"],
        "temperature": made["temperature"],
        "prefix_lm": cached,
        "schedule": made["schedule"],
        "schedule_kwargs": {} if made["shift"] is None else {"shift": made["shift"]},
    }


# -- decoding -------------------------------------------------------------------------------------


@dataclass
class Recorder(CanvasLog):
    r"""Canvases and logits of a generation, through hooks.

    Args:
        length (int): T, tokens of the canvas.
    """

    length: int = 0

    @contextmanager
    def watching(self, words: nn.Module, head: nn.Module) -> Iterator[None]:
        """Hooks on the embedding of ids and on what gives logits, while the context is open."""

        def embedded(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].ndim == 2:  # the prompt's ids come as one row without a batch
                self.see(args[0][:, -self.length :])

        def scored(_module: nn.Module, _args: Any, output: Any) -> None:
            self.score(output if isinstance(output, Tensor) else output.logits)

        with words.register_forward_pre_hook(embedded), head.register_forward_hook(scored):
            yield

    def score(self, logits: Tensor) -> None:
        """Logits of a run; those of the prefill come before the first canvas."""
        if self.canvases:
            self.read(logits[:, -self.length :])


class Llada:
    r"""The language model: its parts, its settings, and one step of it with gradients.

    Args:
        model (nn.Module): the whole model.
    """

    #: position p is predicted at p - shift
    shift = 0
    mask_id = LLADA.mask
    #: end and padding ids of the published checkpoints
    stop_ids: tuple[int, ...] = (LLADA.eos, LLADA.turn_end)
    #: paths in the model: of its blocks, of what embeds ids, and of what gives logits
    parts = ("model.transformer.blocks", "model.transformer.wte", "model")
    #: where a block computes attention
    attention = "attn_out"
    recorder: type[Recorder] = Recorder
    #: outputs of blocks in a generation with a cached prefix can stand in for those of a replay
    keeps_cached = True

    def __init__(self, model: Any) -> None:
        parts: list[Any] = [model.get_submodule(path) for path in self.parts]
        self.model, (self.blocks, self.words, self.head) = model, parts

    def checked(
        self, given: dict[str, Any], cached: bool, generator: torch.Generator | None
    ) -> dict[str, Any]:
        """The settings, checked before any work is done."""
        made = SETTINGS.read(given)
        check_steps(made)
        need_generator(made["temperature"] > 0 or made["remasking"] == "random", generator)
        return made

    def arguments(self, made: dict[str, Any], cached: bool, mask_id: int) -> dict[str, Any]:
        """Keyword arguments of the family's own ``generate``."""
        out = {**shared_arguments(made, cached), "mask_id": mask_id}
        out["block_length"] = made["block_length"]
        out["remasking"] = made["remasking"].replace("entropy", "entrophy")
        if made["step_ratio"] is not None:
            out["step_ratio"] = made["step_ratio"]
        elif made["steps"] is not None:  # upstream ignores its own argument of that name
            out["step_per_block"] = made["steps"] * made["block_length"] // made["gen_length"]
        return out

    def start(
        self, given: Given, made: dict[str, Any], prefix: int, mask_id: int
    ) -> dict[str, Any]:
        """Keyword arguments by which the family's ``generate`` starts with given tokens, behind
        ``prefix`` others in its canvas; raises for settings with which it fails."""
        return {"draft_tokens": given.canvas(mask_id)}

    def prefilled(self, prefix: Prefix) -> Prefix:
        """Run the blocks over the prefix and keep what steps need of it."""
        out = self.model.model(None, input_embeddings=prefix.embeds, use_cache=True)
        return prefix.filled((k, v) for k, v in out.attn_key_values)

    def joined(self, prefix: Prefix, canvas: Tensor) -> Tensor:
        """Embeddings of a step: of the canvas, and of the prefix where that is not cached."""
        words = self.words(canvas)
        if prefix.cache is not None:
            return words
        return torch.cat((prefix.embeds.to(words.dtype), words), dim=1)

    def step_logits(self, prefix: Prefix, canvas: Tensor) -> Tensor:
        """Logits (R, T, V) of one step: row t predicts canvas position t."""
        past = None if prefix.cache is None else list(prefix.cache)
        embeds = self.joined(prefix, canvas)
        out = self.model.model(None, input_embeddings=embeds, past_key_values=past)
        return out.logits[:, -canvas.shape[1] :]

    def unembedded(self, hidden: Tensor) -> Tensor:
        """Final norm and output head."""
        inner = self.model.model
        parts, config = inner.transformer, inner.config
        normed = parts.ln_f(hidden)
        tied = getattr(config, "weight_tying", False)
        logits = nn.functional.linear(normed, parts.wte.weight) if tied else parts.ff_out(normed)
        return logits / config.d_model**0.5 if getattr(config, "scale_logits", False) else logits

    @contextmanager
    def as_written(self) -> Iterator[None]:
        r"""The model computes as its code reads while the context is open; then all is as before.

        LLaDA's constructor leaves checkpointing of whole blocks on, which cuts hooks off from the
        graph. Its cached positions may stem from ``torch.inference_mode``, and be in no graph.
        """
        inner = self.model.model
        before = getattr(inner, "activation_checkpointing_strategy", None)
        plain_tables(self.model)
        with eager():
            if before is None:
                yield
                return
            inner.set_activation_checkpointing(None)
            try:
                yield
            finally:
                inner.set_activation_checkpointing(before)


# -- the adapter's part ---------------------------------------------------------------------------


class LladaAdapter(PackedAdapter):
    r"""What the adapters of LaViDa and LaViDa-O share. Their own ``draft_tokens``, or Dream's hook
    on tokens, put given tokens into the canvas.

    Args:
        model, processor, cache, system, packing: as in
            :class:`~captum_dcam.adapters.common.packing.PackedAdapter`.
        language (type, optional): of the language model. Default: :class:`Llada`
    """

    unfillable: ClassVar[str] = ""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None,
        system: str | None,
        packing: Callable[..., Packing],
        language: type[Llada] = Llada,
    ) -> None:
        self._language = language(model)  # the checks ask it for the mask's id
        super().__init__(model, processor, cache, system, packing)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self._language.blocks)

    @property
    def mask_id(self) -> int:
        own = getattr(self.model.config, "mask_token_id", None)
        return self._language.mask_id if own is None else int(own)

    @property
    def stop_ids(self) -> frozenset[int]:
        own = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        found = (*self._language.stop_ids, self.mask_id, *own)
        return frozenset(int(i) for i in found if i is not None)

    def attention_module(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self._language.attention)

    def query_position(self, layout: Layout, position: int) -> int:
        return layout.prefix_length + position - self._language.shift

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        """Decode with the family's own ``generate`` and record it; ``given`` (Given, optional):
        tokens that stand in the canvas from the start."""
        language, cached = self._language, self.cache == "prefix"
        made = language.checked(settings, cached, generator)
        log = language.recorder(self.mask_id, length=made["gen_length"])
        options = language.arguments(made, cached, self.mask_id)
        if given is not None:
            prefix = 0 if cached else request.layout.prefix_length
            options |= language.start(given, made, prefix, self.mask_id)
        views = self._packing.arguments(request.pixels, request.extras[1])
        with (
            seeded(generator, self.device),
            language.as_written(),
            log.watching(language.words, language.head),
        ):
            result = self.model.generate(request.extras[0], **views, **options)
        result = getattr(result, "sequences", result)
        tokens = result[:, -made["gen_length"] :].clone()
        log.finish(tokens)
        lengths: tuple[int, ...] = ()
        if cached and not language.keeps_cached:
            lengths = (request.layout.prefix_length, *[made["gen_length"]] * len(log.canvases))
        return self.recorded(request, settings, log, [log.states], [tokens], lengths=lengths)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        prefix = super().embed(pixels, *extras)
        ids, sizes = extras
        wh = [(int(w), int(h)) for w, h in sizes[0].tolist()]
        expected = self._packing.place(ids[0].tolist(), wh)
        if prefix.embeds.shape[1] != expected.length:
            raise InputError(
                f"the model's packing makes {prefix.embeds.shape[1]} tokens of {wh} "
                f"(width × height) where {expected.length} were expected: its configuration or "
                "NOT_ALWASY_DO_2DPOOL has changed since the request was prepared, or its code is "
                "not that of LaViDa"
            )
        return prefix

    def prefill(self, embedded: Prefix) -> Prefix:
        if self.cache == "none":
            return embedded
        with self._language.as_written():
            return self._language.prefilled(embedded)

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        with self._language.as_written():
            return self._language.step_logits(memory, state[0])

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._language.unembedded(hidden)
