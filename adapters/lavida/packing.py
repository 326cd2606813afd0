r"""How LaViDa's pictures become tokens, as its configuration and its packing code have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.packing import Packing, check_tiles, pools
from captum_dcam.errors import InputError

#: how packing treats pictures of a model without tiles
SINGLE = ("tensor", "list")
POOLING = ("bilinear", "average", "max")


@dataclass(frozen=True)
class LavidaPacking(Packing):
    r"""Pictures of a model.

    Args:
        model, image_processor: as in :class:`~captum_dcam.adapters.common.packing.Packing`.
        single (str): ``tensor`` or ``list``, see :class:`LavidaAdapter`.
    """

    single: str

    def __post_init__(self) -> None:
        if self.single not in SINGLE:
            raise InputError(f"single is {self.single!r}: expected one of {SINGLE}")
        check_tiles(self.model, self.image_processor)

    def tiling(self, pictures: int) -> Tiling:
        """How pictures are cut: several have no tiles, as in the authors' evaluation."""
        config, tower = self.model.config, self.model.get_vision_tower()
        aspect = getattr(config, "image_aspect_ratio", None)
        tile, patches, patch = tower.image_size, tower.num_patches_per_side, tower.config.patch_size
        pins, most = (), None
        if aspect not in (None, "square") and pictures == 1:
            pins, most = llava.cutting_of(config, tile)
        side, cell = patches, float(patch)
        if pools(self.model) and (pins or self.single == "list"):
            side = self._pooled(patches)
            cell = patch * patches / side if side * 2 > patches else 2.0 * patch
        base = "pad" if aspect == "pad" or pictures > 1 else "stretch"
        return Tiling(tile, side, cell, pins, base, self.fill, most)

    def _pooled(self, patches: int) -> int:
        mode = getattr(self.model.config, "mm_spatial_pool_mode", None)
        if mode not in POOLING:
            raise InputError(
                f"the configuration's mm_spatial_pool_mode is {mode!r}: expected one of {POOLING}, "
                "as the family's checkpoints have (bilinear)"
            )
        return -(-patches // 2) if mode == "bilinear" else patches // 2

    def newline(self, tiling: Tiling) -> bool:
        """A pooled single view is followed by one."""
        merge = getattr(self.model.config, "mm_patch_merge_type", "flat")
        return not tiling.pinpoints and self.single == "list" and "unpad" in merge

    def one_view(self, images: Tensor) -> Any:
        return images if self.single == "tensor" else list(images)
