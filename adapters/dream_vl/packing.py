r"""Pictures of Dream-VL, and its prompts with pictures in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.qwen import Qwen
from captum_dcam.adapters.common.visuals import Seen, Visual


class DreamVL(Qwen):
    """Qwen2-VL's pictures and format, without vision markers around them: so image tokens have
    text positions (mRoPE is inactive), and several pictures stand in one run."""

    model_types: ClassVar[tuple[str, ...]] = ("dream-vl",)
    placeholders: ClassVar[tuple[str, str]] = ("<|image_pad|>", "<|video_pad|>")

    def video(self, visual: Visual, frames: Sequence[Image.Image]) -> Seen:
        out = self.image_processor(images=None, videos=[list(frames)], return_tensors="pt")
        pixels, grid = out["pixel_values_videos"], out["video_grid_thw"]
        return self._seen(visual, pixels, grid, "video_grid_thw")

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        out = super().inputs(pixels, input_ids, extras)
        del out["mm_token_type_ids"]  # Dream-VL counts positions by the ids
        return out


@dataclass(frozen=True)
class Prompt:
    r"""Embedded prompts of R rows.

    Args:
        embeds (Tensor): (R, P, D), pictures in their places.
        ids (Tensor): (R, P), from which positions are counted.
        mask (Tensor): (R, P) int64, 0 at padding.
        grids (tuple of Tensor): (R, n, 3) of pictures, (R, m, 3) of videos: patches along time,
            height and width.
    """

    embeds: Tensor
    ids: Tensor
    mask: Tensor
    grids: tuple[Tensor, Tensor]

    def select(self, index: Tensor) -> Prompt:
        """Rows ``index`` (R,)."""
        grids = (self.grids[0][index], self.grids[1][index])
        return Prompt(self.embeds[index], self.ids[index], self.mask[index], grids)


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
    for value, grid, token, features in (
        ("pixel_values", "image_grid_thw", model.config.image_token_id, model.get_image_features),
        (
            "pixel_values_videos",
            "video_grid_thw",
            model.config.video_token_id,
            model.get_video_features,
        ),
    ):
        if value in parts:
            seen = torch.cat(features(parts[value], parts[grid])).to(embeds.dtype)
            where = (ids == token)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, model.projector(seen))
    return Prompt(embeds, ids, mask, (extras["image_grid_thw"], extras["video_grid_thw"]))


def joined(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts of several examples as rows of one."""
    if len(prompts) == 1:
        return prompts[0]
    return replace(
        prompts[0],
        embeds=torch.cat([p.embeds for p in prompts]),
        ids=torch.cat([p.ids for p in prompts]),
        mask=torch.cat([p.mask for p in prompts]),
        grids=(
            torch.cat([p.grids[0] for p in prompts]),
            torch.cat([p.grids[1] for p in prompts]),
        ),
    )
