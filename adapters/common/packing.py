r"""LLaVA-type packing: how the images of a prompt become tokens, and the requests made of them.

In the prompt the id -200 stands for an image's tokens; which tiles these are of is in
:mod:`captum_dcam.adapters.common.anyres`.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common import anyres
from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.compat import reachable
from captum_dcam.adapters.common.dialogue import told_apart
from captum_dcam.adapters.common.fitting import check_vocabulary
from captum_dcam.adapters.common.loading import FamilyAdapter
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.text import (
    Words,
    check_prompt,
    special_ids,
    special_texts,
)
from captum_dcam.adapters.common.visuals import Visual, counted_on, visuals_of
from captum_dcam.errors import InputError, ProcessorError, WeightsError
from captum_dcam.model.adapter import Request
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import Messages, messages_of, summary

#: system prompt of the recipes
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
#: what stands for an image among the ids, and in the text
IMAGE_ID, SIGN = -200, "<image>"


@dataclass(frozen=True)
class Packed:
    r"""Where things lie in the packed sequence.

    Args:
        starts (tuple of int): position of every image's first token.
        length (int): P, tokens of the prefix.
        positions (Tensor), ids (Tensor): (K,) int64 of the text tokens.
    """

    starts: tuple[int, ...]
    length: int
    positions: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Packing(ABC):
    r"""Images of a model.

    Args:
        model (nn.Module): of the family, with ``get_vision_tower``.
        image_processor (object): its ``image_mean`` fills padded squares.
    """

    model: Any
    image_processor: Any

    @abstractmethod
    def tiling(self, pictures: int) -> Tiling:
        """How each image is cut where the prompt shows this number of them."""

    @abstractmethod
    def newline(self, tiling: Tiling) -> bool:
        """Whether an image's tokens are followed by one more newline."""

    def one_view(self, images: Tensor) -> Any:
        """Images (n, 3, S, S) that are one view each, as the family's code takes them."""
        return list(images)

    @property
    def fill(self) -> tuple[int, int, int]:
        """RGB around padded squares."""
        red, green, blue = (int(m * 255) for m in self.image_processor.image_mean)
        return red, green, blue

    def sizes(self, visuals: Sequence[Visual]) -> list[Any]:
        """What the layout needs to know of every visual: (W, H)."""
        return [v.frames[0].size for v in visuals]

    def shown(self, visuals: Sequence[Visual]) -> Tensor:
        """(1, K, 3, S, S): the views of all visuals."""
        return self.views([v.frames[0] for v in visuals])

    def views(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(1, K, 3, S, S): the views of all images."""
        tiling, read = self.tiling(len(pictures)), self.image_processor.preprocess
        cut = [view for p in pictures for view in anyres.views(p, tiling)]
        return torch.stack([read(v, return_tensors="pt")["pixel_values"][0] for v in cut])[None]

    def owners(self, sizes: Sequence[Any]) -> Tensor:
        """(1, K, 3, S, S) int64: the image token of every pixel of the views, -1 for none."""
        tiling = self.tiling(len(sizes))
        counts = [sum(g.positions.numel() for g in self.grids_of(s, 0, tiling, 0)) for s in sizes]
        parts = counted_on([self.owners_of(s, tiling) for s in sizes], counts)
        return torch.cat(parts)[None, :, None].expand(-1, -1, 3, -1, -1)

    def owners_of(self, size: Any, tiling: Tiling) -> Tensor:
        """(k, S, S), of one visual's views, counted over its own tokens."""
        return anyres.owners(size, tiling)

    def grids_of(self, size: Any, start: int, tiling: Tiling, number: int) -> tuple[Grid, ...]:
        """The grids of one visual, the request's image ``number``."""
        return anyres.grids(size, start, tiling, number)

    def count_of(self, size: Any, tiling: Tiling) -> int:
        """Tokens that one visual becomes."""
        return anyres.token_count(size, tiling) + self.newline(tiling)

    def grids(self, sizes: Sequence[Any], starts: Sequence[int]) -> tuple[Grid, ...]:
        """All grids of a request, in sequence order."""
        tiling, found = self.tiling(len(sizes)), list[Grid]()
        for size, start in zip(sizes, starts, strict=True):
            number = found[-1].image + 1 if found else 0
            found += self.grids_of(size, start, tiling, number)
        return tuple(found)

    def place(self, ids: Sequence[int], sizes: Sequence[Any]) -> Packed:
        """Where text and images lie in the packed sequence."""
        tiling = self.tiling(len(sizes))
        given, image = torch.tensor(ids), torch.tensor(ids) == IMAGE_ID
        counts = torch.ones_like(given)
        counts[image] = torch.tensor([self.count_of(s, tiling) for s in sizes])
        starts = counts.cumsum(0) - counts
        places = tuple(starts[image].tolist())
        return Packed(places, int(counts.sum()), starts[~image], given[~image])

    def arguments(self, pixels: Tensor, sizes: Tensor) -> dict[str, Any]:
        r"""Arguments of the family's packing.

        Args:
            pixels (Tensor): (B, K, 3, S, S), the views of all images.
            sizes (Tensor): (B, n, 2), the images' (W, H).
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
    """ProcessorError where image processor and vision tower are of different checkpoints."""
    given = getattr(image_processor, "crop_size", None)
    height = given.get("height") if isinstance(given, dict) else None
    side = model.get_vision_tower().image_size
    if height is not None and height != side:
        raise ProcessorError(
            f"the image processor cuts {height} px, the model's vision tower takes {side} px: "
            "give the image processor that load_pretrained_model returns for this checkpoint"
        )


def cutting_of(config: Any, tile: int) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """Canvases and the largest mosaic (``anyres_max_N``) of a configuration; none: base view only.

    Raises:
        ValueError: packing that the family's recipes do not use.
    """
    aspect = getattr(config, "image_aspect_ratio", None)
    merge = getattr(config, "mm_patch_merge_type", "flat")
    if aspect == "pad":
        return (), None
    found = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if found is None or merge != "spatial_unpad":
        raise InputError(
            f"image_aspect_ratio {aspect!r} with mm_patch_merge_type {merge!r}: expected 'pad', or "
            "'anyres' or 'anyres_max_N' with 'spatial_unpad', as the family's checkpoints have"
        )
    most = int(found[1]) if found[1] else None
    return anyres.parse_pinpoints(config.image_grid_pinpoints, tile), most


def pools(model: Any) -> bool:
    """Whether upstream halves tokens; it reads NOT_ALWASY_DO_2DPOOL once, when it is imported."""
    for cls in type(model).__mro__:
        if "get_2dPool" in vars(cls):
            return bool(getattr(sys.modules[cls.__module__], "ALWASY_DO_2DPOOL", True))
    return True


# -- the text -------------------------------------------------------------------------------------


def asked(
    prompt: Any, visuals: Sequence[Visual], system: str | None, special: Sequence[str] = ()
) -> Messages:
    r"""The conversation of a prompt, every image in its place as a part with the text ``<image>``.

    A prompt is a string or a conversation (see the autoregressive families). A string may place
    its images itself by writing ``<image>``; otherwise they stand in front of it, one line each.
    ``special`` are texts of special tokens, which a prompt may not hold.

    Raises:
        TypeError, ValueError: as for conversations, and where images and signs do not match.
    """
    others = [text for text in special if text != SIGN]
    signs = prompt.count(SIGN) if isinstance(prompt, str) else 0
    if signs:
        check_prompt(prompt, others, ("<video>",))
        if signs != len(visuals):
            raise InputError(
                f"the prompt places {signs} images by {SIGN}, but {len(visuals)} were given: "
                "expected as many; leave the signs out to have images in front"
            )
        first, *rest = prompt.split(SIGN)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image", "text": SIGN}, {"type": "text", "text": text}]
        messages: Messages = [{"role": "user", "content": parts}]
    else:
        messages = messages_of(prompt, visuals)
        parts = [part for message in messages for part in message["content"]]
        if any(SIGN in part.get("text", "") for part in parts):
            raise InputError(f"a message holds {SIGN}: place images by parts {{'type': 'image'}}")
        check_prompt(messages, others)
        for part in parts:
            part.setdefault("text", f"{SIGN}\n")
    if system is not None and messages[0]["role"] != "system":
        told = {"type": "text", "text": system}
        messages.insert(0, {"role": "system", "content": [told]})
    return messages


def rendered(tokenizer: Any, messages: Messages) -> str:
    """The text that the model reads, by the tokenizer's chat template."""
    turns = [{**m, "content": "".join(p["text"] for p in m["content"])} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, :data:`IMAGE_ID` for every sign; parts are tokenized one by one, and a start
    token that the tokenizer puts in front of each is kept in front of the first only."""
    chunks = [list(tokenizer(chunk).input_ids) for chunk in text.split(SIGN)]
    start = tokenizer.bos_token_id
    drop = 1 if chunks[0] and chunks[0][0] == start else 0
    return [*chunks[0], *(i for chunk in chunks[1:] for i in (IMAGE_ID, *chunk[drop:]))]


# -- the adapter's part ---------------------------------------------------------------------------


def parts_of(processor: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor: a pair of them, or an object with both as attributes."""
    if isinstance(processor, list | tuple) and len(processor) == 2:
        tokenizer, image_processor = processor
    else:
        tokenizer = getattr(processor, "tokenizer", None)
        image_processor = getattr(processor, "image_processor", None)
    if not hasattr(tokenizer, "encode") or not hasattr(image_processor, "preprocess"):
        raise ProcessorError(
            f"processor is a {type(processor).__name__}: expected (tokenizer, image_processor), "
            "the first and third results of the family's load_pretrained_model"
        )
    return tokenizer, image_processor


def check_newline(model: Any) -> None:
    """WeightsError where accelerate has offloaded the newline of images: no module of its own calls
    it, so nothing would fetch it."""
    if getattr(getattr(model.model, "image_newline", None), "is_meta", False):
        raise WeightsError(
            "model.image_newline is offloaded, and the family's code reads it outside of any "
            "module that would fetch it: give it a device of its own, device_map={…, "
            "'model.image_newline': 'cpu'}"
        )


def check_length(family: str, length: int, config: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """ValueError where the family would cut the packed prefix off without a word."""
    names = ("tokenizer_model_max_length", "max_position_embeddings", "max_sequence_length")
    limits = {n: getattr(config, n, None) for n in names}
    small = [(v, n) for n, v in limits.items() if isinstance(v, int) and v < length]
    if small:
        limit, name = min(small)
        raise InputError(
            f"prompt and images of {list(sizes)} (width × height) make {length} tokens, but "
            f"{family}'s {name} is {limit}: the image span would be cut off; give smaller or fewer "
            "images or a shorter prompt"
        )


class PackedAdapter(FamilyAdapter):
    r"""What the adapters of families with such packing share: everything but decoding.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, as that function returns them, or an
            object with both as attributes.
        cache (str, optional): one of the family's.
        system (str, optional): system prompt; None for the template's own.
        packing (callable): makes the :class:`Packing` of the model and its image processor.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None,
        system: str | None,
        packing: Callable[..., Packing],
    ) -> None:
        super().__init__(model, processor, cache)
        reachable(self.model.get_vision_tower())
        check_newline(self.model)
        self.tokenizer, image_processor = parts_of(processor)
        check_vocabulary(self.tokenizer, self.vocabulary, {"mask": int(self.mask_id or 0)})
        self._packing = packing(model, image_processor)
        self._system = system
        self._words = Words(self.tokenizer)

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]) -> Request:
        r"""Images and prompt of one example to a request.

        Args:
            images (sequence): one list of images. An image that is cut becomes a base view and a
                mosaic, two grids of the layout; another one is one grid.
            prompts (sequence): one string or conversation; it may place its images by
                ``<image>``, otherwise they stand in front, one line each.

        Returns:
            Request: pixels (1, K, 3, S, S), all views of all images; extras: ids (1, L) with
            -200 for images, and the images' (W, H) (1, n, 2).

        Raises:
            TypeError, ValueError: no image, several examples, a video, or more tokens than the
                family's context, which upstream would cut off without a word.
        """
        self.check_request(images, prompts)
        visuals = visuals_of(images[0], None if self.takes_video else self.family)
        pictures = [frame for v in visuals for frame in v.frames]
        special = special_texts(self.tokenizer, self.mask_id)
        messages = asked(prompts[0], visuals, self._system, special)
        ids, said = told_apart(
            messages, lambda own: ids_of(self.tokenizer, rendered(self.tokenizer, own))
        )
        sizes = self._packing.sizes(visuals)
        place = self._packing.place(ids, sizes)
        check_length(self.family, place.length, self.model.config, sizes)
        dialogue = torch.zeros(1, place.length, dtype=torch.bool)
        dialogue[0, place.positions] = torch.tensor(said)[torch.tensor(ids) != IMAGE_ID]
        return Request(
            self._packing.shown(visuals).to(self.device, self.dtype),
            (torch.tensor([ids], device=self.device), torch.tensor([sizes], device=self.device)),
            Layout(self._packing.grids(sizes, place.starts), place.length),
            (summary(prompts[0]),),
            (tuple(pictures),),
            dialogue,
        )

    def pixel_tokens(self, request: Request) -> Tensor:
        return self._packing.owners(request.extras[1][0].tolist())

    @property
    def _markers(self) -> frozenset[int]:
        """Ids in a prompt that are no text."""
        return special_ids(self.tokenizer)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, sizes = (e[example].tolist() for e in request.extras)
        place = self._packing.place(ids, sizes)
        words = ~torch.isin(place.ids, torch.tensor(sorted(self._markers)))
        return place.positions[words], place.ids[words]

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        """Embeddings (B, P, D) of the prefix, packed by the family's own code."""
        pack = self.model.prepare_inputs_labels_for_multimodal
        given = self._packing.arguments(pixels, extras[1])
        return Prefix(pack(extras[0], None, None, None, None, **given)[4])
