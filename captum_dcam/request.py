"""What a model is asked: pixels, the rest of its input, and where the pictures lie in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from PIL import Image
from torch import Tensor

from captum_dcam.layout import Layout


@dataclass(frozen=True)
class Request:
    r"""Prepared input of B examples with one layout.

    Args:
        pixels (Tensor): (B, …), the differentiable input: what Captum calls ``inputs``.
        extras (tuple of Tensor): flat, batch first: the rest of the model's input.
        layout (Layout): shared by all examples.
        prompts (tuple of str): one an example.
        images (tuple): for every example its pictures, for drawing.
    """

    pixels: Tensor
    extras: tuple[Tensor, ...]
    layout: Layout
    prompts: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)

    @property
    def batch(self) -> int:
        return self.pixels.shape[0]

    def single(self, example: int) -> Request:
        """The request of one example (B = 1)."""
        one = slice(example, example + 1)
        return replace(
            self,
            pixels=self.pixels[one],
            extras=tuple(e[one] for e in self.extras),
            prompts=self.prompts[one],
            images=self.images[one],
        )
