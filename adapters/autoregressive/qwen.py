r"""Images and videos of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

Images are as :mod:`captum_dcam.adapters.common.qwen` has them; the frames of a video are resized
together, and used as they are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.qwen import Qwen
from captum_dcam.adapters.common.visuals import Region, Seen, Visual

#: frames per second of a video whose rate is not known, as in the families' processors
FPS = 24.0


class Qwen2(Qwen):
    """Qwen2-VL."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    #: pixels of one frame at least and at most, where no video processor says so
    video_size: ClassVar[tuple[int, int]] = (128 * 28 * 28, 28 * 28 * 768)

    def video(self, visual: Visual, frames: Sequence[Image.Image]) -> Seen:
        vision = self.config.vision_config
        step, patch = vision.temporal_patch_size, vision.patch_size
        height, width = self.frame_size(len(visual.frames), *visual.size)
        parts = []
        for frame in frames:
            small = frame.resize((width, height), Image.Resampling.BICUBIC)
            one = self.image_processor(images=[small], do_resize=False, return_tensors="pt")
            # the image processor repeats an image in all temporal places: take one of them
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


class Qwen25(Qwen2):
    """Qwen2.5-VL: temporal positions of videos follow the clock."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        out = super().inputs(pixels, input_ids, extras)
        if "video_grid_thw" in out:
            seconds = self.config.vision_config.temporal_patch_size / FPS
            out["second_per_grid_ts"] = [seconds] * len(out["video_grid_thw"])
        return out


class Qwen3(Qwen2):
    """Qwen3-VL: a video is one span per group of frames behind its time as text; no system text."""

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


class Qwen35(Qwen3):
    """Qwen3.5: most blocks have linear attention, with a state in place of keys and values. It is
    asked to answer without thinking, as its chat template can do it."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
    one_length: ClassVar[str | None] = "linear attention reads padding, too"
    template_options: ClassVar[dict[str, Any]] = {"enable_thinking": False}

    def frame(self, turns: Sequence[str], system: bool) -> str:
        return f"{super().frame(turns, system)}<think>\n\n</think>\n\n"


def fitted(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, step: int = 1
) -> tuple[int, int]:
    r"""The size, a multiple of ``factor``, nearest to a frame's whose area is within bounds.

    Args:
        height, width (int): of the frame.
        factor (int): pixels of a token's side.
        least, most (int): pixels, of all ``frames`` together.
        frames (int, optional): that share the bounds. Default: 1
        step (int, optional): frames per group; their number is rounded to it. Default: 1
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
