r"""The image as MMaDA sees it: codes of a square, between markers in front of the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.visuals import edges
from captum_dcam.errors import InputError, MethodError
from captum_dcam.model.layout import Grid

#: ids that upstream reserves in LLaDA's vocabulary: ``<|mmu|>``, ``<|soi|>``, ``<|eoi|>``
MARKS = (126089, 126084, 126085)
#: side in pixels of the square that one code stands for
STRIDE = 16
#: tokens before the first image token
BEFORE = 2
FITS = ("crop", "squash")


def fitted(picture: Image.Image, resolution: int, fit: str) -> tuple[Tensor, Grid]:
    r"""An image as the VQ encoder wants it, and where its tokens lie.

    ``crop`` scales the shorter side to ``resolution`` and takes the middle square, so that the ends
    of a long image are in no box; ``squash`` scales both sides.

    Args:
        image (Image): RGB.
        resolution (int): side of the square in pixels.
        fit (str): ``crop`` or ``squash``.

    Returns:
        tuple: pixels (3, R, R) float32 in [-1, 1]; the grid, row-major behind the prefix.
    """
    width, height = picture.size
    wide, high = resolution, resolution
    if fit == "crop" and width > height:
        wide = int(resolution * width / height)
    elif fit == "crop":
        high = int(resolution * height / width)
    left, top = round((wide - resolution) / 2), round((high - resolution) / 2)
    square = picture.resize((wide, high), Image.Resampling.BICUBIC).crop(
        (left, top, left + resolution, top + resolution)
    )
    pixels = torch.from_numpy(np.array(square, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    side = resolution // STRIDE
    x_scale, y_scale = width / wide, height / high
    grid = Grid(
        torch.arange(BEFORE, BEFORE + side * side).view(side, side),
        edges(left * x_scale, (left + resolution) * x_scale, side),
        edges(top * y_scale, (top + resolution) * y_scale, side),
        (height, width),
    )
    return (pixels - 0.5) / 0.5, grid


class _Codes(torch.autograd.Function):
    """Embeddings of codes that were read off pixels: whoever asks for the pixels' gradient is told
    that there is none. Gradients with respect to anything above never come here."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, embeddings: Tensor) -> Tensor:
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise MethodError(
            "no gradient reaches the pixels of MMaDA: its VQ encoder turns the image into "
            "integer codes, and a logit does not change with a small change of a pixel; use a "
            "method that reads the tapped block (diffusion_cam, layer_grad_cam, attention, …), or "
            "one that perturbs pixels without gradients (occlusion, kernel_shap, …)"
        )


@torch.no_grad()
def codes_of(vq_model: Any, pixels: Tensor) -> Tensor:
    """VQ codes (B, n) of pixels (B, 3, R, R), computed where and as the VQ model is."""
    like = next(vq_model.parameters())
    codes = vq_model.get_code(pixels.to(like.device, like.dtype))
    side = pixels.shape[-1] // STRIDE
    if codes.shape != (len(pixels), side * side):
        raise InputError(
            f"the VQ model gave codes {tuple(codes.shape)} for pixels {tuple(pixels.shape)}: "
            f"expected ({len(pixels)}, {side * side}), one for every {STRIDE} × {STRIDE} pixels; "
            "give the MAGVITv2 model that MMaDA is trained with"
        )
    return codes


def prefix_ids(codes: Tensor, text: Tensor, offset: int, marks: tuple[int, int, int]) -> Tensor:
    """Ids (B, P) of the prompt: two of the ``marks``, the codes behind the text vocabulary of
    ``offset`` ids, the third mark, the text (B, K)."""
    own = text.new_tensor(marks).expand(len(text), 3)
    return torch.cat((own[:, :2], codes.to(text) + offset, own[:, 2:], text), dim=1)


def without_gradient(pixels: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings, tied to pixels that want a gradient so that the request is answered."""
    return _Codes.apply(pixels, embeddings) if pixels.requires_grad else embeddings
