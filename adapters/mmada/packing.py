r"""The image as MMaDA and Lumina-DiMOO see it: codes among the ids of the prompt.

MMaDA's are those of a square, between markers in front of the text. Lumina-DiMOO's are those of a
rectangle of about the image's own shape, with a newline behind every row, in front of the text's
last id (which closes the user's turn); a token opens the answer, and one that closes it stands
behind the canvas at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.visuals import edges
from captum_dcam.errors import InputError, MethodError

#: ids that upstream reserves in LLaDA's vocabulary: ``<|mmu|>``, ``<|soi|>``, ``<|eoi|>``
MARKS = (126089, 126084, 126085)
#: side in pixels of the square that one code stands for
STRIDE = 16
#: Lumina-DiMOO's: ``<boi>``, newline, ``<eoi>``, ``<answer>``, ``</answer>``
ROW_MARKS = (126349, 126084, 126350, 126354, 126355)
#: the id of Lumina-DiMOO's first code
FIRST_CODE = 126356
FITS = ("crop", "squash")
#: what stands for an image's code and for the next id of the text in a template
CODE, WORD = -1, -2


Size = tuple[int, int]
#: pixels (3, H, W), and the part of the image that they show
Seen = tuple[Tensor, tuple[float, float, float, float]]


def fitted(picture: Image.Image, resolution: int, fit: str) -> Seen:
    r"""An image as the VQ encoder wants it, and where its tokens lie.

    ``crop`` scales the shorter side to ``resolution`` and takes the middle square, so that the ends
    of a long image are in no box; ``squash`` scales both sides.

    Args:
        image (Image): RGB.
        resolution (int): side of the square in pixels.
        fit (str): ``crop`` or ``squash``.

    Returns:
        tuple: pixels (3, R, R) float32 in [-1, 1]; the part of the image that they show, as
        (x0, y0, x1, y1).
    """
    width, height = picture.size
    wide, high = resolution, resolution
    if fit == "crop" and width > height:
        wide = int(resolution * width / height)
    elif fit == "crop":
        high = int(resolution * height / width)
    pixels, box = cropped(picture, (wide, high), (resolution, resolution))
    return (pixels - 0.5) / 0.5, box


def cropped(picture: Image.Image, scaled: Size, size: Size) -> Seen:
    """The middle of an image that is scaled to ``scaled`` first; pixels are in [0, 1]."""
    left, top = (round((s - own) / 2) for s, own in zip(scaled, size, strict=True))
    box = (left, top, left + size[0], top + size[1])
    middle = picture.resize(scaled, Image.Resampling.BICUBIC).crop(box)
    pixels = torch.from_numpy(np.array(middle, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    x, y = (own / s for own, s in zip(picture.size, scaled, strict=True))
    return pixels, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def shapes(patches: int, most: float = 4.0) -> list[Size]:
    """(width, height) in patches of the largest rectangles of up to ``patches``, and of those that
    upstream's staircase passes between them, with sides of at most 1 : ``most``."""
    found = [
        (w, h)
        for w in range(1, patches + 1)
        for h in range(max(1, patches // (w + 1)), patches // w + 1)
    ]
    return [size for size in found if max(size) <= most * min(size)]


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


def without_gradient(pixels: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings, tied to pixels that want a gradient so that the request is answered."""
    return _Codes.apply(pixels, embeddings) if pixels.requires_grad else embeddings


# -- the two ways of packing -----------------------------------------------------------------------


@dataclass(frozen=True)
class Packing(ABC):
    r"""How a prompt is put together.

    Args:
        vq (object): turns pixels into codes.
        resolution (int): of images, in pixels.
        fit (str): one of :data:`FITS`.
        offset (int): the id of the first code.
        marks (tuple of int): ids between the parts.
    """

    vq: Any
    resolution: int
    fit: str
    offset: int
    marks: tuple[int, ...]

    #: the VQ model's class, and the method by which it is known
    encoder: ClassVar[tuple[str, str]]

    @property
    def tail(self) -> tuple[int, ...]:
        """Ids behind the canvas."""
        return ()

    @staticmethod
    def count(config: Any, vq: Any) -> int:
        """The number of codes."""
        return int(getattr(config, "codebook_size", 8192))

    @abstractmethod
    def seen(self, picture: Image.Image) -> Seen:
        """An image as the VQ model wants it, and the part of it that is shown."""

    @abstractmethod
    def encoded(self, pixels: Tensor) -> Tensor:
        """Codes (B, n) of pixels of the VQ model's own device and type."""

    @abstractmethod
    def template(self, shape: Size, texts: int) -> list[int]:
        """The prompt's ids with an image of (h, w) tokens and a text of as many ids;
        :data:`CODE` and :data:`WORD` where one of these stands."""

    def prepared(self, picture: Image.Image) -> tuple[Tensor, Size, tuple[Tensor, Tensor]]:
        """Pixels (3, H, W), their (h, w) tokens, and the tokens' edges along x and y."""
        pixels, (x0, y0, x1, y1) = self.seen(picture)
        high, wide = (n // STRIDE for n in pixels.shape[1:])
        return pixels, (high, wide), (edges(x0, x1, wide), edges(y0, y1, high))

    def placed(self, shape: Size, texts: int) -> tuple[Tensor, Tensor, int]:
        """Places (h, w) of the image's tokens and (K,) of the text's, and the prompt's length."""
        ids = torch.tensor(self.template(shape, texts))
        where = (ids == CODE).nonzero()[:, 0]
        return where.view(shape), (ids == WORD).nonzero()[:, 0], len(ids)

    @torch.no_grad()
    def ids(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Ids (B, P) of prompts with pixels (B, 3, H, W) and text (B, K)."""
        like = next(self.vq.parameters())
        codes = self.encoded(pixels.to(like.device, like.dtype))
        shape = pixels.shape[-2] // STRIDE, pixels.shape[-1] // STRIDE
        if codes.shape != (len(pixels), shape[0] * shape[1]):
            raise InputError(
                f"the VQ model gave codes {tuple(codes.shape)} for pixels {tuple(pixels.shape)}: "
                f"expected ({len(pixels)}, {shape[0] * shape[1]}), one for every {STRIDE} × "
                f"{STRIDE} pixels; give the {self.encoder[0]} that the checkpoint is trained with"
            )
        ids = text.new_tensor(self.template(shape, text.shape[1])).repeat(len(text), 1)
        ids[ids == CODE] = (codes.to(text) + self.offset).flatten()
        ids[ids == WORD] = text.flatten()
        return ids


class Square(Packing):
    """MMaDA's."""

    encoder: ClassVar[tuple[str, str]] = ("MAGVITv2", "get_code")

    def seen(self, picture: Image.Image) -> Seen:
        return fitted(picture, self.resolution, self.fit)

    def encoded(self, pixels: Tensor) -> Tensor:
        return self.vq.get_code(pixels)

    def template(self, shape: Size, texts: int) -> list[int]:
        first, start, end = self.marks
        return [first, start, *[CODE] * (shape[0] * shape[1]), end, *[WORD] * texts]


class Rows(Packing):
    r"""Lumina-DiMOO's: the resolution is the side of a square of as many pixels as an image may
    have. Of the rectangles of that size the one that keeps most of the image is taken; upstream
    draws the place of the crop, here it is the middle."""

    encoder: ClassVar[tuple[str, str]] = ("VQModel", "quantize")
    #: sides of the rectangles are multiples of this
    step: ClassVar[int] = 2 * STRIDE

    @property
    def tail(self) -> tuple[int, ...]:
        return self.marks[-1:]

    @staticmethod
    def count(config: Any, vq: Any) -> int:
        return int(vq.config.num_vq_embeddings)

    def seen(self, picture: Image.Image) -> Seen:
        wide, high = picture.size
        known = [
            (w * self.step, h * self.step) for w, h in shapes((self.resolution // self.step) ** 2)
        ]
        size = max(known, key=lambda s: (_kept((s[0] / wide, s[1] / high)), s))
        small = picture
        while small.width >= 2 * size[0] and small.height >= 2 * size[1]:
            small = small.resize((small.width // 2, small.height // 2), Image.Resampling.BOX)
        scale = max(size[0] / small.width, size[1] / small.height)
        pixels, box = cropped(
            small, (round(small.width * scale), round(small.height * scale)), size
        )
        x, y = wide / small.width, high / small.height
        return pixels, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)

    def encoded(self, pixels: Tensor) -> Tensor:
        latents = self.vq.encode(pixels).latents
        return self.vq.quantize(latents)[2][2].reshape(len(pixels), -1)

    def template(self, shape: Size, texts: int) -> list[int]:
        start, newline, end, answer, _ = self.marks
        rows = [*[CODE] * shape[1], newline] * shape[0]
        return [*[WORD] * (texts - 1), start, *rows, end, WORD, answer]


def _kept(scales: tuple[float, float]) -> float:
    """The share of an image that a crop keeps whose sides are these parts of it."""
    return min(scales) / max(scales)
