r"""How LaViDa-O's pictures become tokens: views behind a strided convolution."""

from __future__ import annotations

from dataclasses import dataclass

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.packing import Packing, check_tiles, pools
from captum_dcam.errors import InputError

BASES = ("pad", "stretch")


@dataclass(frozen=True)
class LavidaOPacking(Packing):
    r"""Pictures of LaViDa-O: every one becomes a base view and a mosaic.

    Args:
        model, image_processor: as in :class:`~captum_dcam.adapters.common.packing.Packing`.
        base (str): ``pad``, the picture in a padded square (the authors set DEBUG_FIX_PADDING), or
            ``stretch``
    """

    base: str

    def __post_init__(self) -> None:
        check_tiles(self.model, self.image_processor)
        if self.base not in BASES:
            raise InputError(f"base is {self.base!r}: expected one of {BASES}")
        if pools(self.model):
            raise InputError(
                "upstream pools pictures a second time and fails, unless the environment has "
                "NOT_ALWASY_DO_2DPOOL=1 when its package llava is imported: set it and start anew"
            )

    def tiling(self, pictures: int) -> Tiling:
        inner, tower = self.model.model, self.model.get_vision_tower()
        tile, patches, patch = tower.image_size, tower.num_patches_per_side, tower.config.patch_size
        stride = int(getattr(inner.vision_resampler, "stride", 1))
        pinpoints, most = llava.cutting_of(self.model.config, tile)
        base = self.base if pinpoints else "pad"
        side, cell = patches // stride, float(patch * stride)
        return Tiling(tile, side, cell, pinpoints, base, self.fill, most)

    def newline(self, tiling: Tiling) -> bool:
        """A single view is followed by one."""
        return not tiling.pinpoints and "unpad" in getattr(
            self.model.config, "mm_patch_merge_type", "flat"
        )
