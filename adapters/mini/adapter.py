"""The embedded model: with a prefix cache (as LaViDa) or without one (as LLaDA-V)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common.dialogue import told_apart
from captum_dcam.adapters.common.settings import (
    BLOCKS,
    TEMPERATURE,
    Setting,
    Settings,
    length,
    one_of,
)
from captum_dcam.adapters.common.text import check_prompt, special_texts
from captum_dcam.adapters.common.visuals import Visual, one_size, pixel_cells
from captum_dcam.adapters.mini.facts import MiniFamily
from captum_dcam.errors import InputError, ProcessorError
from captum_dcam.mini import modeling
from captum_dcam.mini.loading import MiniProcessor, load_mini
from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.model.adapter import Adapter, Request, register
from captum_dcam.model.images import as_image
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.prompts import Messages, messages_of, summary
from captum_dcam.model.trajectory import Given, Trajectory

SETTINGS = Settings(
    "mini",
    {
        "gen_length": Setting(32, length, also="max_new_tokens"),
        **BLOCKS,
        **TEMPERATURE,
        "remasking": Setting("low_confidence", one_of(*modeling.REMASKING)),
        "schedule": Setting("linear", one_of(*modeling.SCHEDULES)),
    },
)


#: a share of pale colours of which no scene has half as much, nor any photograph so little
PALE = 0.03
#: a share of vivid colours that every scene has
VIVID = 0.005


def drawn(picture: Image.Image) -> bool:
    """Whether a picture is like a scene: what has a colour at all is vivid, and something is."""
    pixels = np.asarray(picture.convert("RGB").resize((192, 192)).convert("HSV"), dtype=float)
    chroma = pixels[..., 1] * pixels[..., 2] / 255**2
    pale, vivid = (chroma > 0.12) & (chroma < 0.45), chroma > 0.45
    return bool(pale.mean() < PALE and vivid.mean() > VIVID)


@register
class MiniAdapter(MiniFamily, Adapter):
    """Adapter of :class:`captum_dcam.mini.modeling.MiniForMaskedDiffusion`."""

    model_types: ClassVar[tuple[str, ...]] = ("captum_dcam_mini",)
    unfillable: ClassVar[str] = ""
    model: MiniForMaskedDiffusion

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        super().__init__(model, processor, cache)
        if not isinstance(processor, MiniProcessor):
            raise ProcessorError(
                f"processor is a {type(processor).__name__}: expected a MiniProcessor, which "
                "load_mini returns with the model"
            )
        config = self.model.config
        size, words = processor.image_processor.size, len(processor.tokenizer)
        found, wanted = (size, processor.grid, words), (config.image_size, config.grid)
        if found != (*wanted, config.vocab_size):
            raise ProcessorError(
                f"processor and model do not fit: images of {size} px, {processor.grid} tokens "
                f"per row and {words} words, the model has {config.image_size} px, {config.grid} "
                f"and {config.vocab_size}; load both from one folder"
            )

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        cache: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> MiniAdapter:
        """Load the packaged weights (``source`` None or ``"mini"``), or a folder like them; there
        is no code in it to trust."""
        if revision is not None:
            raise InputError(
                f"revision={revision!r}: the embedded model lies in the package or in a folder, "
                "which have none"
            )
        return cls(*load_mini(None if source in (None, "mini") else source, **options), cache)

    @staticmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model belongs to this family."""
        return isinstance(model, MiniForMaskedDiffusion)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset((self.model.config.eos_token_id, self.model.config.pad_token_id))

    @property
    def mask_id(self) -> int:
        return self.model.config.mask_token_id

    def encode(self, text: str) -> list[int]:
        return self.processor.tokenizer(text)["input_ids"]

    def warning(self, pictures: Sequence[Image.Image]) -> str:
        if all(map(drawn, pictures)):
            return ""
        return (
            "the embedded model knows drawn scenes of eight shapes in eight colours, and this "
            "picture is none: what it answers, and its maps, mean little; load a model of yours "
            "with --model"
        )

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]) -> Request:
        self.check_request(images, prompts)
        images = [[as_image(i, name=f"image {n}") for n, i in enumerate(own)] for own in images]
        asked = [_messages(p, own) for p, own in zip(prompts, images, strict=True)]
        for messages in asked:
            check_prompt(joined(messages), special_texts(self.processor.tokenizer))
        inputs = self.processor(images, [joined(messages) for messages in asked]).to(self.device)
        sizes = one_size([[(i.height, i.width) for i in pictures] for pictures in images])
        side = self.model.config.grid
        grids = tuple(
            uniform_grid(i * side * side, (side, side), size, i) for i, size in enumerate(sizes)
        )
        return Request(
            inputs["pixel_values"].to(self.dtype),
            (inputs["input_ids"], inputs["attention_mask"]),
            Layout(grids, inputs["input_ids"].shape[1]),
            tuple(summary(p) for p in prompts),
            tuple(tuple(pictures) for pictures in images),
            torch.stack([self._dialogue(m, inputs["input_ids"].shape[1]) for m in asked]),
        )

    def _dialogue(self, messages: Messages, length: int) -> Tensor:
        """(P,) bool: what is said, in front of the one token that ends a prompt."""
        _, said = told_apart(messages, lambda m: self.encode(joined(m)))
        return torch.tensor([*[False] * (length - 1 - len(said)), *said, False])

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        cached = self.cache == "prefix"
        decoded = modeling.generate(
            self.model,
            request.pixels,
            *request.extras,
            prefix_cache=cached,
            generator=generator,
            start=None if given is None else given.canvas(self.mask_id),
            **SETTINGS.read(settings),
        )
        return Trajectory(
            tokens=decoded.tokens,
            states=(decoded.canvases,),
            final_state=(decoded.tokens,),
            commit_step=decoded.commit_step,
            confidence=decoded.confidence,
            cache=self.cache,
            image_end=request.layout.image_end,
            settings=settings,
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> modeling.Prefix:
        input_ids, attention_mask = extras
        return modeling.embed_prefix(self.model, pixels, input_ids, attention_mask)

    def prefill(self, embedded: modeling.Prefix) -> modeling.Prefix:
        return modeling.cache_prefix(self.model, embedded) if self.cache == "prefix" else embedded

    def select(self, memory: modeling.Prefix, index: Tensor) -> modeling.Prefix:
        return memory.select(index)

    def memory_tensors(self, memory: modeling.Prefix) -> list[Tensor]:
        return [t for pair in memory.cache or () for t in pair]

    def replace_memory(self, memory: modeling.Prefix, tensors: Sequence[Tensor]) -> modeling.Prefix:
        new = iter(tensors)
        cache = tuple(
            (next(new) if k.requires_grad else k, next(new) if v.requires_grad else v)
            for k, v in memory.cache or ()
        )
        return replace(memory, cache=cache)

    def denoise(self, memory: modeling.Prefix, *state: Tensor) -> Tensor:
        return modeling.denoise(self.model, memory, state[0])

    def pixel_tokens(self, request: Request) -> Tensor:
        side, size = self.model.config.grid, self.model.config.image_size
        cells = pixel_cells(len(request.layout.grids), side, size // side)
        return cells.expand(1, -1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        input_ids, attention_mask = (e[example] for e in request.extras)
        markers = [self.model.config.image_token_id, self.model.config.answer_token_id]
        text = attention_mask.bool() & ~torch.isin(input_ids, input_ids.new_tensor(markers))
        positions = text.nonzero()[:, 0]
        return positions.cpu(), input_ids[positions].cpu()

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.unembed(hidden)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        words = self.processor.tokenizer.convert_ids_to_tokens(list(ids))
        return [f" {word}" for word in words]


def _messages(prompt: Any, images: Sequence[Image.Image]) -> Messages:
    return messages_of(prompt, [Visual((image,), False, n) for n, image in enumerate(images)])


def joined(messages: Messages) -> str:
    """All text of a prompt: the model was trained on single questions behind their images."""
    parts = (part for message in messages for part in message["content"])
    return " ".join(part["text"] for part in parts if part["type"] == "text")
