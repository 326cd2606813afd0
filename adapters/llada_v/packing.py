r"""How LLaDA-V's pictures become tokens, as its configuration and its packing code have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.packing import Packing, check_tiles


@dataclass(frozen=True)
class LladaVPacking(Packing):
    """Every picture becomes a base view and a mosaic; without canvases a padded base view alone."""

    def __post_init__(self) -> None:
        check_tiles(self.model, self.image_processor)
        self.tiling(1)

    def tiling(self, pictures: int) -> Tiling:
        tower = self.model.get_vision_tower()
        tile, side = int(tower.image_size), int(tower.num_patches_per_side)
        pinpoints, most = llava.cutting_of(self.model.config, tile)
        base, cell = "stretch" if pinpoints else "pad", float(tower.config.patch_size)
        return Tiling(tile, side, cell, pinpoints, base, self.fill, most)

    def newline(self, tiling: Tiling) -> bool:
        """A base view alone is followed by one."""
        return not tiling.pinpoints

    def one_view(self, images: Tensor) -> Any:
        return list(images.split(1))
