r"""Images and videos of InternVL (the ``-hf`` checkpoints): tiles, and a thumbnail behind them.

The image is squashed to the canvas of tiles whose shape is nearest to its own. With more than one
tile a thumbnail of the whole image follows. A frame of a video is one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.visuals import Family, Region, Seen, Visual, region
from captum_dcam.errors import MissingPackageError


class InternVL(Family):
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    video_token: ClassVar[str | None] = "<video>"
    placeholders: ClassVar[tuple[str, str]] = ("<IMG_CONTEXT>\n", "<video>\n")

    def check(self) -> None:
        size, vision = self.image_processor.size, self.config.vision_config
        theirs, ours = (size["height"], size["width"]), tuple(vision.image_size)
        if theirs != ours:
            raise misfit(
                f"the image processor makes tiles of {theirs} (height, width)",
                f"the vision tower takes {ours}",
            )

    @property
    def _side(self) -> tuple[int, int]:
        """(h, w) image tokens of a tile."""
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        high, wide = (
            int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return high, wide

    def see(self, visual: Visual) -> Seen:
        # the processors' default for images; the image processor's own is no tiles
        tiles = {"crop_to_patches": not visual.video}
        out = self.image_processor(images=list(visual.frames), return_tensors="pt", **tiles)
        pixels = out["pixel_values"]
        if visual.video:
            regions = tuple(
                replace(region(visual, self._side), image=visual.first + i)
                for i in range(len(visual.frames))
            )
        else:
            regions = self._tiles(visual)
        if len(regions) != len(pixels):
            raise MissingPackageError(
                f"an image of {visual.size} (height, width) has {len(pixels)} tiles: expected "
                f"{len(regions)}; is this a transformers version with another choice of tiles?"
            )
        high, wide = self._side
        rows = torch.arange(pixels.shape[-2]) * high // pixels.shape[-2]
        columns = torch.arange(pixels.shape[-1]) * wide // pixels.shape[-1]
        one = rows[:, None] * wide + columns
        first = torch.arange(len(pixels)).view(-1, 1, 1, 1) * (high * wide)
        return Seen(
            pixels, (first + one).expand_as(pixels), regions, self._text(visual, regions), {}
        )

    def _tiles(self, visual: Visual) -> tuple[Region, ...]:
        """Tiles row by row, then the thumbnail if there is more than one."""
        from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as tiling

        (height, width), p = visual.size, self.image_processor
        columns, rows = 1, 1
        if p.max_patches > 1:
            tile = (p.size["height"], p.size["width"])
            columns, rows = tiling.get_optimal_tiled_canvas(
                visual.size, tile, p.min_patches, p.max_patches
            )
        x = [c * width / columns for c in range(columns + 1)]
        y = [r * height / rows for r in range(rows + 1)]
        boxes = [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(rows) for c in range(columns)]
        if len(boxes) > 1:
            boxes.append((0, 0, width, height))
        return tuple(region(visual, self._side, box) for box in boxes)

    def _text(self, visual: Visual, regions: Sequence[Region]) -> str:
        high, wide = self._side
        one = self.image_token * (high * wide)
        if not visual.video:
            return f"{self._mark('start')}{one * len(regions)}{self._mark('end')}"
        return "\n".join(
            f"Frame{i + 1}: {self._mark('start')}{one}{self._mark('end')}"
            for i in range(len(regions))
        )

    def _mark(self, which: str) -> str:
        """The token before or behind image tokens."""
        default = {"start": "<img>", "end": "</img>"}[which]
        return getattr(self.tokenizer, f"{which}_image_token", default)

    def turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    def frame(self, turns: Sequence[str], system: bool) -> str:
        return f"{''.join(turns)}<|im_start|>assistant\n"
