r"""LLaVA-type packing: how the pictures of a prompt become tokens, and the requests made of them.

The tokens of a picture stand where its sign stood (:mod:`captum_dcam.adapters.common.llava`); which
tiles they are of is in :mod:`captum_dcam.adapters.common.anyres`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common import anyres, llava
from captum_dcam.adapters.common.anyres import Size, Tiling
from captum_dcam.adapters.common.text import Words, special_ids
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import summary


@dataclass(frozen=True)
class Packing(ABC):
    r"""Pictures of a model.

    Args:
        model (nn.Module): of the family, with ``get_vision_tower``.
        image_processor (object): its ``image_mean`` fills padded squares.
    """

    model: Any
    image_processor: Any

    @abstractmethod
    def tiling(self, pictures: int) -> Tiling:
        """How each of so many pictures is cut."""

    @abstractmethod
    def newline(self, tiling: Tiling) -> bool:
        """Whether a picture's tokens are followed by one more newline."""

    def one_view(self, images: Tensor) -> Any:
        """Pictures (n, 3, S, S) that are one view each, as the family's code takes them."""
        return list(images)

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB around padded squares."""
        red, green, blue = (int(m * 255) for m in self.image_processor.image_mean)
        return red, green, blue

    def views(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(1, K, 3, S, S): the views of all pictures."""
        tiling, read = self.tiling(len(pictures)), self.image_processor.preprocess
        cut = [view for p in pictures for view in anyres.views(p, tiling)]
        return torch.stack([read(v, return_tensors="pt")["pixel_values"][0] for v in cut])[None]

    def owners(self, sizes: Sequence[Size]) -> Tensor:
        """(1, K, 3, S, S) int64: the image token of every pixel of the views, -1 for none."""
        tiling, parts, first = self.tiling(len(sizes)), [], 0
        for size in sizes:
            own = anyres.owners(size, tiling)
            parts.append(torch.where(own >= 0, own + first, own))
            first += sum(g.positions.numel() for g in anyres.grids(size, 0, tiling))
        return torch.cat(parts)[None, :, None].expand(-1, -1, 3, -1, -1)

    def grids(self, sizes: Sequence[Size], starts: Sequence[int]) -> tuple[Grid, ...]:
        """All grids of a request, in sequence order."""
        tiling = self.tiling(len(sizes))
        return tuple(
            grid
            for number, (size, start) in enumerate(zip(sizes, starts, strict=True))
            for grid in anyres.grids(size, start, tiling, number)
        )

    def place(self, ids: Sequence[int], sizes: Sequence[Size]) -> llava.Packed:
        """Where text and pictures lie in the packed sequence."""
        tiling = self.tiling(len(sizes))
        more = self.newline(tiling)
        return llava.packed(ids, [anyres.token_count(s, tiling) + more for s in sizes])

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
            images = list(images.split([anyres.view_count(s, tiling) for s in wh]))
        else:
            images = self.one_view(images)
        return {"images": images, "image_sizes": wh, "modalities": ["image"] * len(pixels)}


def check_tiles(model: Any, image_processor: Any) -> None:
    """InputError where image processor and vision tower are of different checkpoints."""
    given = getattr(image_processor, "crop_size", None)
    height = given.get("height") if isinstance(given, dict) else None
    side = model.get_vision_tower().image_size
    if height is not None and height != side:
        raise InputError(
            f"the image processor cuts {height} px, the model's vision tower takes {side} px: "
            "give the image processor that load_pretrained_model returns for this checkpoint"
        )


def pools(model: Any) -> bool:
    """Whether upstream halves tokens; it reads NOT_ALWASY_DO_2DPOOL once, when it is imported."""
    for cls in type(model).__mro__:
        if "get_2dPool" in vars(cls):
            return bool(getattr(sys.modules[cls.__module__], "ALWASY_DO_2DPOOL", True))
    return True


class PackedAdapter(Adapter):
    r"""What the adapters of families with such packing share: everything but decoding.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, as that function returns them, or an
            object with both as attributes.
        cache (str, optional): one of the family's.
        system (str, optional): system prompt; None for the template's own.
        packing (type): makes the :class:`Packing` of the model and its image processor.
        **options: of the packing.
    """

    batches: ClassVar[bool] = False
    model: Any

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None,
        system: str | None,
        packing: type[Packing],
        **options: Any,
    ) -> None:
        super().__init__(model, processor, cache)
        self.tokenizer, image_processor = llava.parts_of(processor)
        self._packing = packing(model, image_processor, **options)
        self._system = system
        self._words = Words(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return self._words.token_texts(ids)

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompt of one example to a request.

        Args:
            images (sequence): one list of pictures. A picture that is cut becomes a base view and a
                mosaic, two grids of the layout; another one is one grid.
            prompts (sequence): one string or conversation; it may place its pictures by
                ``<image>``, otherwise they stand in front, a line each.

        Returns:
            Request: pixels (1, K, 3, S, S), all views of all pictures; extras: ids (1, L) with
            -200 for pictures, and the pictures' (W, H) (1, n, 2).

        Raises:
            TypeError, ValueError: no picture, several examples, a video, or more tokens than the
                family's context, which upstream would cut off without a word.
        """
        visuals = llava.pictures_of(self.family, images, prompts)
        pictures = [v.frames[0] for v in visuals]
        text = llava.asked(self.tokenizer, prompts[0], visuals, self._system)
        ids = llava.ids_of(self.tokenizer, text)
        sizes = [p.size for p in pictures]
        place = self._packing.place(ids, sizes)
        llava.check_length(self.family, place.length, self.model.config, sizes)
        return Request(
            self._packing.views(pictures).to(self.device, self.dtype),
            (torch.tensor([ids], device=self.device), torch.tensor([sizes], device=self.device)),
            Layout(self._packing.grids(sizes, place.starts), place.length),
            (summary(prompts[0]),),
            (tuple(pictures),),
        )

    def pixel_tokens(self, request: Request) -> Tensor:
        return self._packing.owners([p.size for p in request.images[0]])

    @property
    def _markers(self) -> frozenset[int]:
        """Ids in a prompt that are no text."""
        return special_ids(self.tokenizer)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, sizes = (e[example].tolist() for e in request.extras)
        place = self._packing.place(ids, [(w, h) for w, h in sizes])
        words = ~torch.isin(place.ids, torch.tensor(sorted(self._markers)))
        return place.positions[words], place.ids[words]

    def _packed(self, pixels: Tensor, extras: Sequence[Tensor]) -> Tensor:
        """Embeddings (B, P, D) of the prefix, packed by the family's own code."""
        pack = self.model.prepare_inputs_labels_for_multimodal
        given = self._packing.arguments(pixels, extras[1])
        return pack(extras[0], None, None, None, None, **given)[4]
