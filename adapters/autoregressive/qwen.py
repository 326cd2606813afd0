r"""Pictures and videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

The picture is resized to a multiple of ``patch_size · merge_size``, whole; patches are ordered so
that the ``merge_size²`` patches of one image token follow each other. A video is one grid of image
tokens for each ``temporal_patch_size`` frames; its frames are used as they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.visuals import Family, Region, Seen, Visual, misfit, region

#: frames a second of a video whose rate is not known, as in the families' processors
FPS = 24.0


class Qwen(Family):
    """Shared by the three; Qwen2-VL's prompt."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
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
    #: pixels of one frame at least and at most, where no video processor says so
    video_size: ClassVar[tuple[int, int]] = (128 * 28 * 28, 28 * 28 * 768)

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
        if visual.video:
            return self._video(visual)
        out = self.image_processor(images=[visual.frames[0]], return_tensors="pt")
        pixels, grid = out["pixel_values"], out["image_grid_thw"]
        return self._seen(visual, pixels, grid, "image_grid_thw")

    def _seen(self, visual: Visual, pixels: Tensor, grid: Tensor, name: str) -> Seen:
        merge = self.config.vision_config.spatial_merge_size
        groups, high, wide = grid[0].tolist()
        plain = region(visual, (high // merge, wide // merge))
        step = self.config.vision_config.temporal_patch_size
        regions = tuple(replace(plain, image=visual.first + step * t) for t in range(groups))
        owners = torch.arange(len(pixels)) // merge**2
        return Seen(
            pixels,
            owners[:, None].expand_as(pixels),
            regions,
            self.text(visual, regions),
            {name: grid},
        )

    def text(self, visual: Visual, regions: Sequence[Region]) -> str:
        """The image tokens of a visual."""
        count = sum(h * w for h, w in (r.shape for r in regions))
        token = self.video_token if visual.video else self.image_token
        return (token or "") * count

    # -- videos ---------------------------------------------------------------------------------

    def _video(self, visual: Visual) -> Seen:
        """Patches of pairs of frames; the last frame is repeated where one is missing."""
        vision = self.config.vision_config
        step, patch = vision.temporal_patch_size, vision.patch_size
        frames = [*visual.frames, *[visual.frames[-1]] * (-len(visual.frames) % step)]
        height, width = self.frame_size(len(visual.frames), *visual.size)
        parts = []
        for frame in frames:
            small = frame.resize((width, height), Image.Resampling.BICUBIC)
            one = self.image_processor(images=[small], do_resize=False, return_tensors="pt")
            # the image processor repeats a picture in all temporal places: take one of them
            parts.append(one["pixel_values"].unflatten(1, (-1, step, patch * patch))[:, :, 0])
        groups = [torch.stack(parts[i : i + step], 2) for i in range(0, len(parts), step)]
        pixels = torch.cat(groups).flatten(1)
        grid = torch.tensor([[len(groups), height // patch, width // patch]])
        return self._seen(visual, pixels, grid, "video_grid_thw")

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which every frame is resized."""
        return fitted(height, width, self._factor, *self._pixels)

    @property
    def _factor(self) -> int:
        vision = self.config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    @property
    def _pixels(self) -> tuple[int, int]:
        """Pixels at least and at most."""
        size = getattr(self.video_processor, "size", None)
        return self.video_size if size is None else (size["shortest_edge"], size["longest_edge"])

    # -- prompt ---------------------------------------------------------------------------------

    def turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    def frame(self, turns: Sequence[str], system: bool) -> str:
        start = "" if system else self.system
        return f"{start}{''.join(turns)}<|im_start|>assistant\n"

    # -- model ----------------------------------------------------------------------------------

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        # without the type ids every token gets a text position, silently in some versions
        types = torch.zeros_like(input_ids)
        types[input_ids == self.config.image_token_id] = 1
        types[input_ids == self.config.video_token_id] = 2
        out: dict[str, Any] = {"mm_token_type_ids": types}
        first = 0
        for grid, value in (
            ("image_grid_thw", "pixel_values"),
            ("video_grid_thw", "pixel_values_videos"),
        ):
            if extras[grid].shape[1]:
                count = int(extras[grid][0].prod(-1).sum())
                out[grid] = extras[grid].flatten(0, 1)
                out[value] = pixels[:, first : first + count].flatten(0, 1)
                first += count
        return out


class Qwen25(Qwen):
    """Qwen2.5-VL: temporal positions of videos follow the clock."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        out = super().inputs(pixels, input_ids, extras)
        if "video_grid_thw" in out:
            seconds = self.config.vision_config.temporal_patch_size / FPS
            out["second_per_grid_ts"] = [seconds] * len(out["video_grid_thw"])
        return out


class Qwen3(Qwen):
    """Qwen3-VL: a video is one span a group of frames, behind the time as text; no system text."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    system: ClassVar[str] = ""
    video_size: ClassVar[tuple[int, int]] = (128 * 32 * 32, 32 * 32 * 768)

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        factor, step = self._factor, self.config.vision_config.temporal_patch_size
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return fitted(height, width, factor, *self._pixels, frames=max(frames, step), step=step)

    def text(self, visual: Visual, regions: Sequence[Region]) -> str:
        if not visual.video:
            return super().text(visual, regions)
        step = self.config.vision_config.temporal_patch_size
        last = len(visual.frames) - 1
        spans = []
        for number, one in enumerate(regions):
            h, w = one.shape
            times = [min(step * number + k, last) / FPS for k in (0, step - 1)]
            spans.append(
                f"<{sum(times) / 2:.1f} seconds><|vision_start|>{'<|video_pad|>' * (h * w)}"
                "<|vision_end|>"
            )
        return "".join(spans)


def fitted(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, step: int = 1
) -> tuple[int, int]:
    r"""The size, a multiple of ``factor``, nearest to a frame's whose area is within bounds.

    Args:
        height, width (int): of the frame.
        factor (int): pixels of a token's side.
        least, most (int): pixels, of all ``frames`` together.
        frames (int, optional): that share the bounds. Default: 1
        step (int, optional): frames a group; their number is rounded to it. Default: 1
    """
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    count = round(frames / step) * step
    if count * high * wide > most:
        beta = math.sqrt(frames * height * width / most)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif count * high * wide < least:
        beta = math.sqrt(least / (frames * height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return high, wide
