r"""Images of LLaVA-1.5: resized so that the shorter side fits, the centre cropped out.

Pixels outside the crop are seen by no token. The class token is dropped by the model, unless it is
configured to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.visuals import Family, Region, Seen, Visual, edges


class Llava(Family):
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    image_token: ClassVar[str] = "<image>"
    placeholders: ClassVar[tuple[str, str]] = ("<image>\n", "")

    def check(self) -> None:
        vision, crop = self.config.vision_config, self._input_size()
        if crop != (vision.image_size, vision.image_size):
            raise misfit(
                f"the image processor makes images of {crop} (height, width)",
                f"the vision tower takes {vision.image_size} × {vision.image_size}",
            )

    def _input_size(self) -> tuple[int | None, int | None]:
        """(H, W) of the processor's images."""
        p = self.image_processor
        size = p.crop_size if getattr(p, "do_center_crop", False) else p.size
        return _get(size, "height"), _get(size, "width")

    def see(self, visual: Visual) -> Seen:
        pixels = self.image_processor(images=[visual.frames[0]], return_tensors="pt")[
            "pixel_values"
        ]
        patch = self.config.vision_config.patch_size
        high, wide = (n // patch for n in pixels.shape[-2:])
        rows, columns = (torch.arange(n) // patch for n in pixels.shape[-2:])
        owners = rows[:, None] * wide + columns
        owners[rows >= high] = -1  # the tower drops what is left of a patch
        owners[:, columns >= wide] = -1
        keeps = self.config.vision_feature_select_strategy == "full"
        skip = int(keeps and "clip" in self.config.vision_config.model_type)
        where = self._region(visual, (high, wide), patch, skip)
        text = self.image_token * (skip + high * wide)
        return Seen(pixels, owners.expand(pixels.shape), (where,), text, {})

    def _region(self, visual: Visual, shape: tuple[int, int], patch: int, skip: int) -> Region:
        """Undo crop, resizing and padding of every axis."""
        sizes = visual.size
        resized = self._resized(sizes)
        square = getattr(self.image_processor, "do_pad", False)
        found = []
        for axis in (1, 0):
            whole = max(sizes) if square else sizes[axis]
            before = (whole - sizes[axis]) // 2
            start = 0
            if getattr(self.image_processor, "do_center_crop", False):
                size = self._input_size()[axis]
                assert size is not None
                start = (resized[axis] - size) // 2
            scale = whole / resized[axis]
            first, last = start * scale, (start + patch * shape[axis]) * scale
            # what lies outside the image is padding
            found.append((edges(first, last, shape[axis]) - before).clamp(0, sizes[axis]))
        return Region(found[0], found[1], sizes, visual.first, skip)

    def _resized(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """(H, W) between resizing and cropping."""
        p = self.image_processor
        if getattr(p, "do_pad", False):
            sizes = max(sizes), max(sizes)
        if not p.do_resize:
            return sizes
        short = _get(p.size, "shortest_edge")
        if short is None:
            return _get(p.size, "height"), _get(p.size, "width")
        low, high = sorted(sizes)
        long = int(short * high / low)
        return (short, long) if sizes[0] <= sizes[1] else (long, short)

    def turn(self, role: str, content: str) -> str:
        return f"{content} " if role == "system" else f"{role.upper()}: {content} "

    def frame(self, turns: Sequence[str], system: bool) -> str:
        return f"{''.join(turns)}ASSISTANT:"


def _get(size: Any, name: str) -> Any:
    """A value of a size, which is a dict or an object."""
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)
