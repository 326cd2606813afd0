r"""Images of LLaVA-OneVision, and of what is built on it: a base view, then a mosaic of tiles.

Every row of the mosaic is followed by a newline token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from captum_dcam.adapters.common import anyres
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.visuals import Family, Region, Seen, Visual
from captum_dcam.errors import InputError


class OneVision(Family):
    """How such models prepare images; without a chat template the prompt is Qwen's."""

    #: text of the mask token; None for models without
    mask: ClassVar[str | None] = None
    extra_names: ClassVar[tuple[str, ...]] = ("image_sizes",)
    image_token: ClassVar[str] = "<image>"
    placeholders: ClassVar[tuple[str, str]] = ("<image>\n", "")

    @property
    def image_id(self) -> int:
        """LLaVA-OneVision's configurations have had two names for it."""
        names = ("image_token_id", "image_token_index")
        return int(next(v for n in names if (v := getattr(self.config, n, None)) is not None))

    def check(self) -> None:
        found = self.mask and self.tokenizer.convert_tokens_to_ids(self.mask)
        if self.mask and found in (None, self.tokenizer.unk_token_id):
            raise misfit(f"the tokenizer has no {self.mask}", "the model fills such tokens")
        size = self.image_processor.size
        side = size["height"] if isinstance(size, dict) else size.height
        if side != self.config.vision_config.image_size:
            raise misfit(
                f"the image processor makes tiles of {side} px",
                f"the vision tower takes {self.config.vision_config.image_size}",
            )

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {"image_sizes": (0, 2)}

    @property
    def tiling(self) -> Tiling:
        vision = self.config.vision_config
        ratio = getattr(self.config, "vision_aspect_ratio", "anyres_max_9")
        most = re.fullmatch(r"anyres_max_(\d+)", ratio)
        if most is None:
            raise InputError(
                f"the configuration's vision_aspect_ratio is {ratio!r}: expected anyres_max_N, as "
                "LLaVA-OneVision has it"
            )
        pins = tuple((wide, high) for high, wide in self.config.image_grid_pinpoints)
        side = vision.image_size // vision.patch_size
        return Tiling(vision.image_size, side, vision.patch_size, pins, most=int(most[1]), digits=7)

    def see(self, visual: Visual) -> Seen:
        out = self.image_processor(images=[visual.frames[0]], return_tensors="pt")
        size, tiling = visual.frames[0].size, self.tiling
        pixels = out["pixel_values"][0]
        owners = anyres.owners(size, tiling)[:, None].expand(pixels.shape)
        base, mosaic = (
            Region(g.x_edges, g.y_edges, visual.size, visual.first, newline=newline)
            for g, newline in zip(anyres.grids(size, 0, tiling), (0, 1), strict=True)
        )
        text = self.image_token * (base.tokens + mosaic.tokens)
        sizes = out["image_sizes"].view(1, 2)
        return Seen(pixels, owners, (base, mosaic), text, {"image_sizes": sizes})

    def turn(self, role: str, content: str) -> str:
        return f"<|im_start|>{role}\n{content}<|im_end|>\n"

    def frame(self, turns: Sequence[str], system: bool) -> str:
        return f"{''.join(turns)}<|im_start|>assistant\n"

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        return {"pixel_values": pixels, "image_sizes": extras["image_sizes"].flatten(0, 1)}
