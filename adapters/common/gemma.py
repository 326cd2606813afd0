r"""Images and the prompt format of Gemma 4 and of what is built on it.

The image is resized, not cropped, so that a whole number of image tokens covers it, and cut into
patches: a fixed number of rows, the last of which are padding. One image token is the mean of
``pooling_kernel_size``² patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.visuals import Family, Seen, Visual, region


class Gemma(Family):
    """How Gemma 4 prepares images; videos are not taken."""

    any_size: ClassVar[bool] = True
    extra_names: ClassVar[tuple[str, ...]] = ("image_position_ids",)
    image_token: ClassVar[str] = "<|image|>"
    placeholders: ClassVar[tuple[str, str]] = ("<|image|>", "")

    def check(self) -> None:
        names = ("patch_size", "pooling_kernel_size")
        ours = tuple(getattr(self.config.vision_config, name) for name in names)
        theirs = tuple(getattr(self.image_processor, name, None) for name in names)
        if theirs != ours:
            raise misfit(
                f"the image processor has (patch, pooling kernel) size {theirs}",
                f"the model {ours}",
            )

    @property
    def marker_ids(self) -> tuple[int, ...]:
        return (*self.image_ids, self.config.boi_token_id, self.config.eoi_token_id)

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {"image_position_ids": (0, 0, 2)}

    def see(self, visual: Visual) -> Seen:
        out = self.image_processor(images=[visual.frames[0]], return_tensors="pt")
        pixels, at = out["pixel_values"], out["image_position_ids"]
        kernel = self.config.vision_config.pooling_kernel_size
        wide, high = ((at[0].amax(0) + 1) // kernel).tolist()
        owners = at[0, :, 1] // kernel * wide + at[0, :, 0] // kernel
        owners = owners.masked_fill((at[0] < 0).any(1), -1)
        marks = (self.config.boi_token_id, self.config.eoi_token_id)
        start, end = map(self.tokenizer.convert_ids_to_tokens, marks)
        return Seen(
            pixels,
            owners[None, :, None].expand_as(pixels),
            (region(visual, (high, wide)),),
            start + self.image_token * (high * wide) + end,
            {"image_position_ids": at},
        )

    def turn(self, role: str, content: str) -> str:
        return f"<|turn>{'model' if role == 'assistant' else role}\n{content}<turn|>\n"

    def frame(self, turns: Sequence[str], system: bool) -> str:
        return "".join((self.tokenizer.bos_token, *turns, "<|turn>model\n"))

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        return {
            "pixel_values": pixels.flatten(0, 1),
            "image_position_ids": extras["image_position_ids"].flatten(0, 1),
            "mm_token_type_ids": (input_ids == self.config.image_token_id).to(torch.int64),
        }
