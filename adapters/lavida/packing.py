r"""How LaViDa's pictures become tokens, as its configuration and its packing code have it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import Size, Tiling, token_count, view_count
from captum_dcam.adapters.common.anyres import grids as grids_of
from captum_dcam.errors import InputError
from captum_dcam.model.layout import Grid

#: how packing treats pictures of a model without tiles
SINGLE = ("tensor", "list")
POOLING = ("bilinear", "average", "max")


def pools(model: Any) -> bool:
    """Whether upstream halves tokens; it reads NOT_ALWASY_DO_2DPOOL once, when it is imported."""
    for cls in type(model).__mro__:
        if "get_2dPool" in vars(cls):
            return bool(getattr(sys.modules[cls.__module__], "ALWASY_DO_2DPOOL", True))
    return True


@dataclass(frozen=True)
class Packing:
    r"""Pictures of a model.

    Args:
        model (nn.Module): of the family.
        image_processor (object): its ``image_mean`` fills padded squares.
        single (str): ``tensor`` or ``list``, see :class:`LavidaAdapter`.
    """

    model: Any
    image_processor: Any
    single: str

    def __post_init__(self) -> None:
        if self.single not in SINGLE:
            raise InputError(f"single is {self.single!r}: expected one of {SINGLE}")
        given = getattr(self.image_processor, "crop_size", None)
        height = given.get("height") if isinstance(given, dict) else None
        side = self.model.get_vision_tower().image_size
        if height is not None and height != side:
            raise InputError(
                f"the image processor cuts {height} px, the model's vision tower takes {side} px: "
                "give the image processor that load_pretrained_model returns for this checkpoint"
            )

    def tiling(self, pictures: int) -> Tiling:
        """How pictures are cut: several have no tiles, as in the authors' evaluation."""
        config, tower = self.model.config, self.model.get_vision_tower()
        aspect = getattr(config, "image_aspect_ratio", None)
        tile, patches, patch = tower.image_size, tower.num_patches_per_side, tower.config.patch_size
        red, green, blue = (int(m * 255) for m in self.image_processor.image_mean)
        pins, most = (), None
        if aspect not in (None, "square") and pictures == 1:
            pins, most = llava.cutting_of(config, tile)
        side, cell = patches, float(patch)
        if pools(self.model) and (pins or self.single == "list"):
            side = self._pooled(patches)
            cell = patch * patches / side if side * 2 > patches else 2.0 * patch
        base = "pad" if aspect == "pad" or pictures > 1 else "stretch"
        return Tiling(tile, side, cell, pins, base, (red, green, blue), most)

    def _pooled(self, patches: int) -> int:
        mode = getattr(self.model.config, "mm_spatial_pool_mode", None)
        if mode not in POOLING:
            raise InputError(
                f"the configuration's mm_spatial_pool_mode is {mode!r}: expected one of {POOLING}, "
                "as the family's checkpoints have (bilinear)"
            )
        return -(-patches // 2) if mode == "bilinear" else patches // 2

    def tokens(self, size: Size, tiling: Tiling) -> int:
        """Tokens of one picture in the sequence; a pooled single view is followed by a newline."""
        merge = getattr(self.model.config, "mm_patch_merge_type", "flat")
        newline = not tiling.pinpoints and self.single == "list" and "unpad" in merge
        return token_count(size, tiling) + newline

    def grids(self, sizes: Sequence[Size], starts: Sequence[int]) -> tuple[Grid, ...]:
        """All grids of a request, in sequence order."""
        tiling = self.tiling(len(sizes))
        return tuple(
            grid
            for number, (size, start) in enumerate(zip(sizes, starts, strict=True))
            for grid in grids_of(size, start, tiling, number)
        )

    def place(self, ids: Sequence[int], sizes: Sequence[Size]) -> llava.Packed:
        """Where text and pictures lie in the packed sequence."""
        tiling = self.tiling(len(sizes))
        return llava.packed(ids, [self.tokens(s, tiling) for s in sizes])

    def arguments(self, pixels: Tensor, sizes: Tensor) -> dict[str, Any]:
        r"""Arguments of the family's packing.

        Args:
            pixels (Tensor): (B, K, 3, S, S), the views of all pictures.
            sizes (Tensor): (B, n, 2), the pictures' (W, H).
        """
        tiling = self.tiling(sizes.shape[1])
        wh = [(int(w), int(h)) for w, h in sizes.flatten(0, 1).tolist()]
        images: Any = pixels.flatten(0, 1)
        if tiling.pinpoints:
            images = list(images.split([view_count(s, tiling) for s in wh]))
        elif self.single == "list":
            images = list(images)
        return {"images": images, "image_sizes": wh, "modalities": ["image"] * len(pixels)}
