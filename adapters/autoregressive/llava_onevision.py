r"""Images and videos of LLaVA-OneVision.

An image alone is cut as :mod:`captum_dcam.adapters.common.onevision` has it. Of several images each
is one view, padded to a square with the processor's mean colour, and followed by a newline token.
The frames of a video are one view each, squashed; their tokens are pooled to half as many a side,
and one newline token follows the last frame's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common import anyres
from captum_dcam.adapters.common.onevision import OneVision
from captum_dcam.adapters.common.visuals import Region, Seen, Visual, region
from captum_dcam.errors import InputError


class LlavaOnevision(OneVision):
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    videos_last: ClassVar[bool] = True
    extra_names: ClassVar[tuple[str, ...]] = ("image_sizes", "video_frames")
    video_token: ClassVar[str | None] = "<video>"
    placeholders: ClassVar[tuple[str, str]] = ("<image>", "<video>")

    @property
    def image_ids(self) -> tuple[int, ...]:
        return (self.image_id, int(self.config.video_token_id))

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {**super().spare(), "video_frames": (0, 1)}

    def check_shown(self, visuals: Sequence[Visual]) -> None:
        frames = sorted({len(v.frames) for v in visuals if v.video})
        if len(frames) > 1:
            raise InputError(
                f"the videos have {frames} frames: {self.model_types[0]} takes videos of equally "
                "many together; give as many frames of each, or explain them one by one"
            )

    def see(self, visual: Visual) -> Seen:
        if visual.video:
            return self._video(visual)
        if visual.alone:
            return super().see(visual)
        size, tiling = visual.frames[0].size, replace(self.tiling, pinpoints=(), base="pad")
        (grid,) = anyres.grids(size, 0, tiling)
        where = Region(grid.x_edges, grid.y_edges, visual.size, visual.first, behind=1)
        pixels = self._views(visual.frames)
        owners = anyres.owners(size, tiling)[:, None].expand(pixels.shape)
        sizes = torch.tensor([visual.size])
        text = self.image_token * where.tokens
        return Seen(pixels, owners, (where,), text, {"image_sizes": sizes})

    def _views(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, 3, S, S): each image as one view. The processor cuts an image that is alone."""
        given = list(images) if len(images) > 1 else [images[0]] * 2
        return self.image_processor(images=[given], return_tensors="pt")["pixel_values"][
            : len(images), 0
        ]

    def _video(self, visual: Visual) -> Seen:
        tiling, count = self.tiling, len(visual.frames)
        squashed = [f.resize((tiling.tile,) * 2, Image.Resampling.BICUBIC) for f in visual.frames]
        pixels, side = self._views(squashed), math.ceil(tiling.side / 2)
        seen = tiling.side * tiling.cell / tiling.tile  # what is left of a patch is cut off
        plain = region(visual, (side, side), (0, 0, visual.size[1] * seen, visual.size[0] * seen))
        regions = tuple(
            replace(plain, image=visual.first + frame, behind=int(frame == count - 1))
            for frame in range(count)
        )
        place = torch.arange(tiling.tile) / (tiling.side * tiling.cell) * side
        row = torch.where(place < side, place.floor().long(), -1)
        first = torch.arange(count).view(-1, 1, 1) * side**2
        one = row[:, None] * side + row
        owners = torch.where((row[:, None] >= 0) & (row >= 0), one + first, -1)
        text = (self.video_token or "") * sum(r.tokens for r in regions)
        extras = {"video_frames": torch.tensor([[count]])}
        return Seen(pixels, owners[:, None].expand(pixels.shape), regions, text, extras)

    def turn(self, role: str, content: str) -> str:
        shown = re.match(f"(?:{'|'.join(self.placeholders)})*", content)
        end = shown.end() if shown else 0
        return f"<|im_start|>{role} {content[:end]}\n{content[end:]}<|im_end|>"

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        sizes, frames = extras["image_sizes"], extras["video_frames"]
        count, views, out = sizes.shape[1], sizes.shape[1], {}
        if count == 1:
            height, width = sizes[0, 0].tolist()
            views = anyres.view_count((width, height), self.tiling)
        if count:
            out["pixel_values"] = pixels[:, :views].flatten(0, 1)
            out["image_sizes"] = sizes.flatten(0, 1)
            out["batch_num_images"] = torch.full((len(sizes),), count, device=sizes.device)
        if frames.shape[1]:
            each = (-1, int(frames[0, 0]))
            out["pixel_values_videos"] = pixels[:, views:].flatten(0, 1).unflatten(0, each)
        return out
