r"""Images of LLaDA-V, and videos of VidLaDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.common import anyres
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.packing import Packing, check_tiles, cutting_of
from captum_dcam.adapters.common.visuals import Visual
from captum_dcam.errors import InputError
from captum_dcam.model.layout import Grid

#: what VidLaDA's evaluation writes into the configuration before it loads a checkpoint
VIDEO = {
    "mm_spatial_pool_stride": 2,
    "mm_spatial_pool_mode": "bilinear",
    "mm_newline_position": "grid",
}


@dataclass(frozen=True)
class LladaVPacking(Packing):
    """Every image becomes a base view and a mosaic; without canvases a padded base view alone."""

    def __post_init__(self) -> None:
        check_tiles(self.model, self.image_processor)
        self.tiling(1)

    def tiling(self, pictures: int) -> Tiling:
        tower = self.model.get_vision_tower()
        tile, side = int(tower.image_size), int(tower.num_patches_per_side)
        pinpoints, most = cutting_of(self.model.config, tile)
        base, cell = "stretch" if pinpoints else "pad", float(tower.config.patch_size)
        return Tiling(tile, side, cell, pinpoints, base, self.fill, most)

    def newline(self, tiling: Tiling) -> bool:
        """A base view alone is followed by one."""
        return not tiling.pinpoints

    def one_view(self, images: Tensor) -> Any:
        return list(images.split(1))


@dataclass(frozen=True)
class VideoPacking(LladaVPacking):
    """A video is one sign: every frame is one grid, stretched to the tower's square, its tokens
    halved, a newline behind every row. Images are LLaDA-V's.

    A visual's size is (W, H, frames), 0 frames for an image."""

    @property
    def frame(self) -> Tiling:
        """How a frame is cut."""
        tower = self.model.get_vision_tower()
        patches = int(tower.num_patches_per_side)
        side = (patches + 1) // 2
        cell = patches * float(tower.config.patch_size) / side
        return Tiling(int(tower.image_size), side, cell)

    def sizes(self, visuals: Sequence[Visual]) -> list[Any]:
        if any(v.video for v in visuals):
            check_video(self.model.config)
        return [(*v.frames[0].size, len(v.frames) if v.video else 0) for v in visuals]

    def shown(self, visuals: Sequence[Visual]) -> Tensor:
        read = self.image_processor.preprocess
        return torch.cat(
            [
                read(list(v.frames), return_tensors="pt")["pixel_values"][None]
                if v.video
                else self.views(v.frames)
                for v in visuals
            ],
            dim=1,
        )

    def owners_of(self, size: Any, tiling: Tiling) -> Tensor:
        *size, frames = size
        if not frames:
            return super().owners_of(size, tiling)
        one, tokens = anyres.owners(size, self.frame), self.frame.side**2
        return torch.cat([torch.where(one >= 0, one + n * tokens, -1) for n in range(frames)])

    def grids_of(self, size: Any, start: int, tiling: Tiling, number: int) -> tuple[Grid, ...]:
        *size, frames = size
        if not frames:
            return super().grids_of(size, start, tiling, number)
        side = self.frame.side
        (one,) = anyres.grids(size, 0, self.frame)
        steps = torch.arange(side)
        at = start + steps[:, None] * (side + 1) + steps
        return tuple(
            replace(one, positions=at + n * side * (side + 1), image=number + n)
            for n in range(frames)
        )

    def count_of(self, size: Any, tiling: Tiling) -> int:
        *size, frames = size
        side = self.frame.side
        return frames * side * (side + 1) if frames else super().count_of(size, tiling)

    def arguments(self, pixels: Tensor, sizes: Tensor) -> dict[str, Any]:
        tiling, shown = self.tiling(sizes.shape[1]), sizes.flatten(0, 1).tolist()
        counts = [frames or anyres.view_count((w, h), tiling) for w, h, frames in shown]
        return {
            "images": list(pixels.flatten(0, 1).split(counts)),
            "image_sizes": [(w, h) for w, h, _ in shown],
            "modalities": ["video" if frames else "image" for *_, frames in shown],
        }


@contextmanager
def unnoted(inner: Any) -> Iterator[None]:
    """VidLaDA's packing leaves in the model where its frames lay; nothing reads it, and it goes."""
    name = "input_image_idx"
    before = {name: vars(inner)[name]} if name in vars(inner) else {}
    try:
        yield
    finally:
        vars(inner).pop(name, None)
        vars(inner).update(before)


def check_video(config: Any) -> None:
    """InputError where the configuration packs videos in another way than VidLaDA's evaluation."""
    has = {name: getattr(config, name, None) for name in VIDEO}
    merge = str(getattr(config, "mm_patch_merge_type", "flat"))
    if has != VIDEO or getattr(config, "add_faster_video", False) or merge[:7] != "spatial":
        raise InputError(
            f"the model's configuration has {has} and mm_patch_merge_type {merge!r}: videos need "
            f"{VIDEO}, as the authors' evaluation has them; give load_pretrained_model "
            f"overwrite_config={VIDEO}"
        )
