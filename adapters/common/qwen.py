r"""Images and prompt format of Qwen2-VL and of what is built on it.

The image is resized to a multiple of ``patch_size · merge_size``, whole; patches are ordered so
that the ``merge_size²`` patches of one image token follow each other. A video is one grid of image
tokens for each ``temporal_patch_size`` frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.visuals import Family, Region, Seen, Visual, region
from captum_dcam.errors import InputError


class Qwen(Family):
    """Shared by all; Qwen2-VL's prompt."""

    any_size: ClassVar[bool] = True
    videos_last: ClassVar[bool] = True
    extra_names: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw")
    image_token: ClassVar[str] = "<|image_pad|>"
    video_token: ClassVar[str | None] = "<|video_pad|>"
    placeholders: ClassVar[tuple[str, str]] = (
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    )
    #: what the format says when a conversation has no system message
    system: ClassVar[str] = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

    def check(self) -> None:
        vision = self.config.vision_config
        ours = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        names = ("patch_size", "merge_size", "temporal_patch_size")
        theirs = tuple(getattr(self.image_processor, name, None) for name in names)
        if theirs != ours:
            raise misfit(
                f"the image processor has (patch, merge, temporal patch) size {theirs}",
                f"the model {ours}",
            )

    @property
    def image_ids(self) -> tuple[int, ...]:
        return (self.config.image_token_id, self.config.video_token_id)

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {"image_grid_thw": (0, 3), "video_grid_thw": (0, 3)}

    def see(self, visual: Visual) -> Seen:
        if visual.video:  # the last frame is repeated where a group lacks one
            missing = -len(visual.frames) % self.config.vision_config.temporal_patch_size
            return self.video(visual, [*visual.frames, *[visual.frames[-1]] * missing])
        out = self.image_processor(images=[visual.frames[0]], return_tensors="pt")
        return self._seen(visual, out["pixel_values"], out["image_grid_thw"], "image_grid_thw")

    def video(self, visual: Visual, frames: Sequence[Image.Image]) -> Seen:
        """A video as tensors, by the frames of whole groups."""
        raise InputError(f"{self.model_types[0]} takes no video")

    def _seen(self, visual: Visual, pixels: Tensor, grid: Tensor, name: str) -> Seen:
        merge = self.config.vision_config.spatial_merge_size
        groups, high, wide = grid[0].tolist()
        plain = region(visual, (high // merge, wide // merge))
        step = self.config.vision_config.temporal_patch_size
        regions = tuple(replace(plain, image=visual.first + step * t) for t in range(groups))
        owners = torch.arange(len(pixels)) // merge**2
        owners = owners[:, None].expand_as(pixels)
        return Seen(pixels, owners, regions, self.text(visual, regions), {name: grid})

    def text(self, visual: Visual, regions: Sequence[Region]) -> str:
        """The image tokens of a visual."""
        count = sum(h * w for h, w in (r.shape for r in regions))
        token = self.video_token if visual.video else self.image_token
        return (token or "") * count

    def turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    def frame(self, turns: Sequence[str], system: bool) -> str:
        start = "" if system else self.system
        return f"{start}{''.join(turns)}<|im_start|>assistant\n"

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        # without the type ids every token gets a text position, silently in some versions
        types = torch.zeros_like(input_ids)
        types[input_ids == self.config.image_token_id] = 1
        types[input_ids == self.config.video_token_id] = 2
        out: dict[str, Any] = {"mm_token_type_ids": types}
        first = 0
        values = ("pixel_values", "pixel_values_videos")
        for grid, value in zip(self.extra_names, values, strict=True):
            if extras[grid].shape[1]:
                count = int(extras[grid][0].prod(-1).sum())
                out[grid] = extras[grid].flatten(0, 1)
                out[value] = pixels[:, first : first + count].flatten(0, 1)
                first += count
        return out


class Stills(Qwen):
    """Images alone, without videos, at text positions."""

    extra_names: ClassVar[tuple[str, ...]] = ("image_grid_thw",)
    video_token: ClassVar[str | None] = None

    @property
    def image_ids(self) -> tuple[int, ...]:
        return (self.image_id,)

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        grid = extras["image_grid_thw"].flatten(0, 1)
        return {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": grid}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What the family keeps on the model between calls (M-RoPE deltas) is as before afterwards."""
    holders = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        yield
    finally:
        for module, value in holders:
            module.rope_deltas = value
