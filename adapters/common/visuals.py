"""What the prompt shows: images and videos, and where a family's tokens lie in them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.adapters.common.fitting import check_vocabulary, misfit
from captum_dcam.adapters.common.text import special_texts
from captum_dcam.errors import InputError, ProcessorError
from captum_dcam.model.images import as_image
from captum_dcam.model.layout import Grid
from captum_dcam.model.prompts import Video


@dataclass(frozen=True)
class Visual:
    r"""An image, or a video that is given as frames.

    Args:
        frames (tuple of Image): RGB; an image is one frame.
        video (bool): whether the family sees them as a video.
        first (int): index of the first frame among all images and frames of the request.
        alone (bool, optional): whether it is the only image of its example. Default: True
    """

    frames: tuple[Image.Image, ...]
    video: bool
    first: int
    alone: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.frames[0].height, self.frames[0].width


def visuals_of(given: Sequence[Any], without_video: str | None = None) -> tuple[Visual, ...]:
    r"""Images of one example; a list or tuple of images among them is a video.

    Args:
        given (sequence): images and videos.
        without_video (str, optional): name of a family that takes no video. Default: videos pass

    Raises:
        TypeError, PictureError: something that is no image.
        ValueError: no image at all, an empty video, frames of different sizes, or a video where
            none is taken.
    """
    found: list[Visual] = []
    count = 0
    for number, one in enumerate(given):
        video = isinstance(one, list | tuple)
        frames = Video(one) if video else (as_image(one, name=f"image {number}"),)
        if video and without_video is not None:
            raise InputError(
                f"{without_video} takes no video: give single frames as images instead, "
                "images=[[frame1, frame2]]"
            )
        found.append(Visual(tuple(frames), video, count))
        count += len(frames)
    if not found:
        raise InputError("no image was given: every example needs at least one")
    alone = sum(not v.video for v in found) == 1
    return tuple(replace(v, alone=alone and not v.video) for v in found)


@dataclass(frozen=True)
class Region:
    r"""A rectangle of image tokens in an image, before its place in the sequence is known.

    Args:
        x_edges (Tensor): (w, 2) float64 pixel edges of every column.
        y_edges (Tensor): (h, 2) float64 pixel edges of every row.
        image_size (tuple): (H, W) of the image.
        image (int): index of the image or frame in the request.
        skip (int): tokens in the sequence before the rectangle that belong to no place (CLS).
        newline (int): such tokens behind every row.
        behind (int): such tokens behind the rectangle.
    """

    x_edges: Tensor
    y_edges: Tensor
    image_size: tuple[int, int]
    image: int
    skip: int = 0
    newline: int = 0
    behind: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y_edges), len(self.x_edges)

    @property
    def tokens(self) -> int:
        """All of them in the sequence."""
        high, wide = self.shape
        return self.skip + high * (wide + self.newline) + self.behind

    def place(self, positions: Tensor) -> Grid:
        """The grid whose :attr:`tokens` lie at ``positions`` (n,) of the sequence, row by row."""
        high, wide = self.shape
        rows = positions[self.skip : len(positions) - self.behind]
        own = rows.view(high, wide + self.newline)[:, :wide]
        return Grid(own, self.x_edges, self.y_edges, self.image_size, self.image)


def edges(start: float, stop: float, count: int) -> Tensor:
    """(count, 2) float64: ``count`` equal cells from ``start`` to ``stop``."""
    marks = torch.linspace(start, stop, count + 1, dtype=torch.float64)
    return torch.stack((marks[:-1], marks[1:]), dim=1)


def region(visual: Visual, shape: tuple[int, int], box: Sequence[float] | None = None) -> Region:
    r"""Equal cells over a whole image, or over ``box`` (x0, y0, x1, y1) of it."""
    height, width = visual.size
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
    return Region(edges(x0, x1, shape[1]), edges(y0, y1, shape[0]), visual.size, visual.first)


@dataclass(frozen=True)
class Seen:
    r"""One visual as the family's tensors.

    Args:
        pixels (Tensor): (n, …), rows of the family's pixel tensor.
        owners (Tensor): (n, …) int64, broadcast to ``pixels``: the image token of every element,
            counted over this visual's regions row by row; -1 for none.
        regions (tuple of Region): in the order of their tokens in the sequence.
        text (str): what stands for the visual's placeholder, one token per place.
        extras (dict): the family's further tensors (n, …) of this visual, by name.
    """

    pixels: Tensor
    owners: Tensor
    regions: tuple[Region, ...]
    text: str
    extras: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        """Image tokens with a place in an image."""
        return sum(h * w for h, w in (r.shape for r in self.regions))


def one_size(visuals: Sequence[Sequence[tuple[int, int]]]) -> tuple[tuple[int, int], ...]:
    """The (H, W) that all examples' images have; InputError unless they are the same."""
    sizes = sorted({tuple(example) for example in visuals})
    if len(sizes) > 1:
        raise InputError(
            f"images of different sizes in one batch ({sizes}, height × width): their layouts "
            "differ; explain them one by one, or resize them to one size"
        )
    return sizes[0]


def pixel_cells(images: int, side: int, pixels: int) -> Tensor:
    """(1, n, 1, S, S) int64: the token of every pixel of n square images, each cut into ``side`` ×
    ``side`` tokens of ``pixels`` × ``pixels``, counted over all images."""
    cells = torch.arange(images * side * side).view(1, images, 1, side, side)
    return cells.repeat_interleave(pixels, 3).repeat_interleave(pixels, 4)


class Family(ABC):
    r"""How one family prepares images.

    Args:
        config (object): of the model.
        tokenizer, image_processor (object): parts of its processor.
        video_processor (object, optional): where videos have settings of their own.
    """

    #: ``model_type`` values
    model_types: ClassVar[tuple[str, ...]]
    any_size: ClassVar[bool] = False
    #: videos have a pixel tensor of their own, which stands behind that of the images
    videos_last: ClassVar[bool] = False
    #: names of the per-example tensors that go with the pixels, in the order of ``extras``
    extra_names: ClassVar[tuple[str, ...]] = ()
    #: the placeholder tokens of the chat template: an image's and a video's
    placeholders: ClassVar[tuple[str, str]]
    image_token: ClassVar[str]
    #: what stands for an image in the chat template. Default: one image token
    sign: ClassVar[str | None] = None
    #: what stands for a video in the chat template; None for families without
    video_token: ClassVar[str | None] = None
    #: why prompts of one batch must be equally long; None: padding changes nothing
    one_length: ClassVar[str | None] = None
    #: what the chat template is told
    template_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, config: Any, tokenizer: Any, image_processor: Any, video_processor: Any = None
    ) -> None:
        if not hasattr(tokenizer, "all_special_ids"):
            raise ProcessorError(
                f"the tokenizer is a {type(tokenizer).__name__}: expected what "
                "AutoTokenizer.from_pretrained returns for the checkpoint"
            )
        self.config, self.tokenizer = config, tokenizer
        self.special = special_texts(tokenizer)
        self.image_processor, self.video_processor = image_processor, video_processor
        found = tokenizer.convert_tokens_to_ids(self.image_token)
        if found != self.image_id:
            raise misfit(
                f"the tokenizer's id of {self.image_token} is {found}",
                f"the model's is {self.image_id}",
            )
        check_vocabulary(tokenizer, config.get_text_config().vocab_size, self.needed)
        self.check()

    @property
    def needed(self) -> dict[str, int]:
        """Ids that the tokenizer must have besides the image's, by what they mean."""
        return {}

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError where the image processor does not fit the model."""

    def check_shown(self, visuals: Sequence[Visual]) -> None:  # noqa: B027  most take all
        """Raise InputError where one example shows what the model cannot take together."""

    @abstractmethod
    def see(self, visual: Visual) -> Seen:
        """One image or video as tensors."""

    @abstractmethod
    def turn(self, role: str, content: str) -> str:
        """One message of a conversation in the family's published format."""

    @abstractmethod
    def frame(self, turns: Sequence[str], system: bool) -> str:
        """A whole conversation in it, up to where the answer begins; ``system``: it has one."""

    @property
    def image_id(self) -> int:
        """The id of an image's tokens."""
        return int(self.config.image_token_id)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of the tokens whose embeddings images replace."""
        return (self.image_id,)

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """Ids in a prompt that are no text, besides the tokenizer's special ones."""
        return self.image_ids

    def spare(self) -> dict[str, tuple[int, ...]]:
        """Shapes (0, …) of extras for an example without any, by name."""
        return {}

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        """Keyword arguments of the model besides ids and mask; tensors as it wants them."""
        return {"pixel_values": pixels.flatten(0, 1)}


def counted_on(owners: Sequence[Tensor], tokens: Sequence[int]) -> list[Tensor]:
    """Owners of several images' pixels, each counted over its own ``tokens``, counted over all."""
    firsts = itertools.accumulate(tokens, initial=0)
    return [torch.where(o >= 0, o + first, o) for o, first in zip(owners, firsts, strict=False)]
