r"""Images of Dream-VL, and its prompts with images in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.qwen import Qwen
from captum_dcam.adapters.common.visuals import Seen, Visual


class DreamVL(Qwen):
    """Qwen2-VL's images and format, without vision markers around them: so image tokens have
    text positions (mRoPE is inactive), and several images stand in one run."""

    model_types: ClassVar[tuple[str, ...]] = ("dream-vl",)
    placeholders: ClassVar[tuple[str, str]] = ("<|image_pad|>", "<|video_pad|>")

    @property
    def needed(self) -> dict[str, int]:
        return {"mask": int(self.config.mask_token_id)}

    def video(self, visual: Visual, frames: Sequence[Image.Image]) -> Seen:
        out = self.image_processor(images=None, videos=[list(frames)], return_tensors="pt")
        pixels, grid = out["pixel_values_videos"], out["video_grid_thw"]
        return self._seen(visual, pixels, grid, "video_grid_thw")

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        out = super().inputs(pixels, input_ids, extras)
        del out["mm_token_type_ids"]  # Dream-VL counts positions by the ids
        return out


class Dimple(DreamVL):
    """With vision markers around images, so that their tokens have places of their own."""

    model_types: ClassVar[tuple[str, ...]] = ("dimple",)
    placeholders: ClassVar[tuple[str, str]] = Qwen.placeholders


@dataclass(frozen=True, kw_only=True)
class Prompt(Prefix):
    r"""Embedded prompts of R rows.

    Args:
        embeds (Tensor): (R, P, D), images in their places.
        ids (Tensor): (R, P), from which positions are counted.
        mask (Tensor): (R, P) int64, 0 at padding.
        grids (tuple of Tensor): (R, n, 3) of images, (R, m, 3) of videos: patches along time,
            height and width.
    """

    ids: Tensor
    mask: Tensor
    grids: tuple[Tensor, Tensor]


def embedded(
    model: Any, ids: Tensor, mask: Tensor, extras: dict[str, Tensor], parts: dict
) -> Prompt:
    r"""The prompt of one example, as the model's forward embeds it.

    Args:
        model (nn.Module): Dream-VL.
        ids, mask (Tensor): (1, P).
        extras (dict): ``image_grid_thw`` and ``video_grid_thw``, (1, n, 3) each.
        parts (dict): from :meth:`DreamVL.inputs`.
    """
    embeds = model.get_input_embeddings()(ids)
    config, grids = model.config, (extras["image_grid_thw"], extras["video_grid_thw"])
    image = "pixel_values", "image_grid_thw", config.image_token_id, "get_image_features"
    video = "pixel_values_videos", "video_grid_thw", config.video_token_id, "get_video_features"
    for value, grid, token, features in (image, video):
        if value in parts:
            if hasattr(model, "img_projector"):  # Dimple
                pixels = parts[value].to(model.visual.get_dtype())
                seen = model.visual(pixels, grid_thw=parts[grid]).to(embeds.dtype)
                seen = model.img_projector(seen)
            else:
                seen = torch.cat(getattr(model, features)(parts[value], parts[grid]))
                seen = model.projector(seen.to(embeds.dtype))
            where = (ids == token)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, seen)
    return Prompt(embeds, ids=ids, mask=mask, grids=grids)


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of several examples as rows of one."""
    parts = zip(*((p.embeds, p.ids, p.mask, *p.grids) for p in prompts), strict=True)
    embeds, ids, mask, images, videos = (torch.cat(part) for part in parts)
    return Prompt(embeds, ids=ids, mask=mask, grids=(images, videos))
