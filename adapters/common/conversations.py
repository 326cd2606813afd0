r"""Families that read conversations: chat template, placeholders, images, one layout.

For those whose processor has a tokenizer and an image processor, and whose images a
:class:`~captum_dcam.adapters.common.visuals.Family` turns into tensors.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common.dialogue import told_apart
from captum_dcam.adapters.common.loading import FamilyAdapter, Parts, parts_of
from captum_dcam.adapters.common.text import SIGNS, Words, check_prompt, special_ids
from captum_dcam.adapters.common.visuals import Family, Seen, Visual, counted_on, visuals_of
from captum_dcam.errors import DcamError, InputError, InputTypeError
from captum_dcam.model.adapter import Request
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import Messages, messages_of, summary

# -- the adapter's part ---------------------------------------------------------------------------


class ConversationAdapter(FamilyAdapter):
    r"""What the adapters of such families share.

    Args:
        model (nn.Module): of the family.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): one of the family's.

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        super().__init__(model, processor, cache)
        parts = parts_of(processor)
        self._template, self._tokenizer = parts.chat_template, parts.tokenizer
        self._family = self._family_of(parts)
        self._words = Words(parts.tokenizer)

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """Whether a loaded model is of one of the family's classes, or of one of its types with an
        output head."""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        of_type = kind in cls.model_types and hasattr(model, "lm_head")
        return super().owns(model) or (of_type and not cls.classes)

    @abstractmethod
    def _family_of(self, parts: Parts) -> Family:
        """What prepares the model's images."""

    @property
    def stop_ids(self) -> frozenset[int]:
        generation = getattr(self.model, "generation_config", None)
        found: set[Any] = set()
        for holder in (generation, self.model.config.get_text_config(), self._tokenizer):
            for name in ("eos_token_id", "pad_token_id"):
                value = getattr(holder, name, None)
                found.update(value if isinstance(value, list | tuple) else [value])
        return frozenset(int(i) for i in found if i is not None and int(i) >= 0)

    @property
    def _filler(self) -> int:
        """The id that stands where nothing is: of padding, else one that ends an answer."""
        pad = self._tokenizer.pad_token_id
        return min(self.stop_ids, default=0) if pad is None else int(pad)

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Images and prompts to a request.

        Args:
            images (sequence): for every example its images; where the family takes videos, a list
                of images among them is one, given as frames, and gets a grid per group of frames.
            prompts (sequence): for every example a string, or a conversation: messages
                ``{"role": …, "content": …}`` that end with the user's.

        Raises:
            TypeError, ValueError: images the family does not take, more tokens than the context
                holds, or examples whose image tokens lie at different places; they say what was
                given, what was expected and what to do.
        """
        self.check_request(images, prompts)
        family, pairs = self._family, zip(images, prompts, strict=True)
        examples = [_example(family, self._template, shown, prompt) for shown, prompt in pairs]
        ids, mask, dialogue, grids = _sequence(family, examples)
        pixels, owners, *own = zip(*(_tensors(family, e) for e in examples), strict=True)
        return Conversations(
            torch.stack(pixels).to(self.device, self.dtype),
            tuple(e.to(self.device) for e in (ids, mask, *map(torch.stack, own))),
            Layout(grids, ids.shape[1]),
            tuple(summary(p) for p in prompts),
            tuple(tuple(f for v in e.visuals for f in v.frames) for e in examples),
            dialogue,
            asked=tuple(prompts),
            frames=tuple(len(v.frames) if v.video else 0 for v in examples[0].visuals),
            owners=owners[0][None],
        )

    def prepare_again(self, request: Request, pictures: Sequence[Image.Image]) -> Request:
        made = self._own(request)
        left, given = list(pictures), []
        for count in made.frames:
            given.append(left[:count] if count else left[0])
            left = left[max(count, 1) :]
        return self.prepare([given] * made.batch, list(made.asked))

    def pixel_tokens(self, request: Request) -> Tensor:
        return self._own(request).owners

    def _own(self, request: Request) -> Conversations:
        if not isinstance(request, Conversations):
            raise InputTypeError(
                f"the request is a {type(request).__name__}: expected what this adapter's prepare "
                "returns"
            )
        return request

    @property
    def _markers(self) -> set[int]:
        """Ids in a prompt that are no text."""
        return {*special_ids(self._tokenizer), *self._family.marker_ids}

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, mask = (e[example].cpu() for e in request.extras[:2])
        markers = torch.tensor(sorted(self._markers))
        positions = (mask.bool() & ~torch.isin(ids, markers)).nonzero()[:, 0]
        return positions, ids[positions]

    def _named(self, extras: Sequence[Tensor]) -> dict[str, Tensor]:
        """The family's own tensors of a request's extras, which stand behind ids and mask."""
        return dict(zip(self._family.extra_names, extras[2:], strict=True))


# -- a request ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversations(Request):
    r"""A request that remembers what it was made of.

    Args:
        asked (tuple): for every example its prompt: a string or a conversation.
        frames (tuple of int): of every video how many frames it has; 0 for an image.
        owners (Tensor): (1, …) int64, the image token of every element of one example's pixels.
    """

    asked: tuple[Any, ...]
    frames: tuple[int, ...]
    owners: Tensor = field(repr=False)

    def single(self, example: int) -> Conversations:
        return replace(super().single(example), asked=self.asked[example : example + 1])

    def rows(self, examples: Sequence[int], pixels: Tensor) -> Conversations:
        made = super().rows(examples, pixels)
        return replace(made, asked=tuple(self.asked[e] for e in examples))


@dataclass(frozen=True)
class Example:
    """One example: its visuals as the family sees them, the ids of all that the model reads, and
    which of them are of the dialogue."""

    visuals: tuple[Visual, ...]
    seen: list[Seen]
    ids: list[int]
    said: list[bool]


def _example(family: Family, template: str | None, given: Sequence[Any], prompt: Any) -> Example:
    visuals = visuals_of(given, None if family.video_token else family.model_types[0])
    family.check_shown(visuals)
    messages = messages_of(prompt, visuals)
    check_prompt(messages, family.special, (*_signs(family), *SIGNS))
    seen = [_seen(family, v) for v in visuals]

    def ids_of(messages: Messages) -> list[int]:
        text, start = rendered(family, messages, template), family.tokenizer.bos_token
        given_start = bool(start) and text.startswith(start)
        whole = expanded(family, text, visuals, seen)
        return family.tokenizer(whole, add_special_tokens=not given_start)["input_ids"]

    ids, said = told_apart(messages, ids_of)
    # the prompt, all its image tokens, and one token of an answer must fit
    context = getattr(family.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(ids) >= context:
        places = [p for p, i in enumerate(ids) if i in family.image_ids]
        raise InputError(
            f"the prompt has {len(ids)} tokens, {len(places)} of them of images (the last at "
            f"{places[-1]}), but the model's context is {context}: the image span would be "
            "truncated; give smaller or fewer images, or lower the image processor's largest size"
        )
    owners = counted_on([s.owners for s in seen], [s.tokens for s in seen])
    seen = [replace(s, owners=o) for s, o in zip(seen, owners, strict=True)]
    return Example(visuals, seen, ids, said)


def _seen(family: Family, visual: Visual) -> Seen:
    """A visual as the family's tensors; what its processor refuses names the size."""
    try:
        return family.see(visual)
    except DcamError:
        raise
    except ValueError as error:
        height, width = visual.size
        raise InputError(
            f"image {visual.first} of {width}×{height} px is refused by the image processor of "
            f"{family.model_types[0]} ({error}): crop or resize it"
        ) from error


def _sequence(
    family: Family, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor, tuple[Grid, ...]]:
    r"""Ids, mask and dialogue (B, P), padded behind the last image so that one layout serves all.

    Positions follow the mask, so padding there is the same as padding on the left.
    """
    pad = family.tokenizer.pad_token_id or 0
    length = max(len(e.ids) for e in examples)
    rows, masks, said, layouts = [], [], [], []
    for example in examples:
        at = [p for p, i in enumerate(example.ids) if i in family.image_ids]
        layouts.append(_grids(example, torch.tensor(at)))
        end, missing = at[-1] + 1, length - len(example.ids)
        rows.append([*example.ids[:end], *[pad] * missing, *example.ids[end:]])
        masks.append([*[1] * end, *[0] * missing, *[1] * (len(example.ids) - end)])
        said.append([*example.said[:end], *[False] * missing, *example.said[end:]])
    first = layouts[0]
    for number, other in enumerate(layouts):
        if [_place(g) for g in first] != [_place(g) for g in other]:
            shapes = [[g.shape for g in one] for one in (first, other)]
            raise InputError(
                f"the image tokens of examples 0 and {number} lie at different places (grids "
                f"{shapes[0]} and {shapes[1]} of images {first[0].image_size} and "
                f"{other[0].image_size}): one layout serves a batch; explain them one by one, or "
                "give images of one size and the same text in front of them"
            )
    lengths = sorted({len(e.ids) for e in examples})
    if family.one_length is not None and len(lengths) > 1:
        raise InputError(
            f"the prompts have {lengths} tokens: {family.one_length}, so a batch needs prompts of "
            "one length; explain them one by one"
        )
    return torch.tensor(rows), torch.tensor(masks), torch.tensor(said), first


def _grids(example: Example, at: Tensor) -> tuple[Grid, ...]:
    """Regions at the places of the image tokens, one after the other."""
    regions = [r for s in example.seen for r in s.regions]
    sizes = [r.tokens for r in regions]
    if sum(sizes) != len(at):
        raise InputError(
            f"the prompt has {len(at)} image tokens for images of {sum(sizes)}: the tokenizer "
            "does not know the family's image token; load processor and model from one checkpoint"
        )
    parts = at.split(sizes)
    return tuple(r.place(p) for r, p in zip(regions, parts, strict=True))


def _place(grid: Grid) -> tuple[Any, ...]:
    """What two grids share that have the same positions in the same pixels."""
    return grid.positions.tolist(), grid.image_size, grid.image


def _tensors(family: Family, example: Example) -> list[Tensor]:
    """Pixels (n, …) of an example, their owners, and the family's own tensors, each in the order of
    the family's pixel tensor."""
    seen = example.seen
    if family.videos_last:
        pairs = zip(example.visuals, seen, strict=True)
        seen = [s for _, s in sorted(pairs, key=lambda pair: pair[0].video)]
    out = [torch.cat([s.pixels for s in seen]), torch.cat([s.owners for s in seen])]
    for name in family.extra_names:
        parts = [s.extras[name] for s in seen if name in s.extras]
        empty = torch.zeros(family.spare()[name], dtype=torch.long)
        out.append(torch.cat(parts) if parts else empty)
    return out


# -- the text -------------------------------------------------------------------------------------


def rendered(family: Family, messages: Messages, template: str | None) -> str:
    r"""The conversation as text: by the chat template, or by the family's published format."""
    if template is not None:
        return family.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **family.template_options,
        )
    signs = dict(zip(("image", "video"), family.placeholders, strict=True))
    turns = []
    for message in messages:
        parts = (p["text"] if p["type"] == "text" else signs[p["type"]] for p in message["content"])
        turns.append(family.turn(message["role"], "".join(parts)))
    return family.frame(turns, messages[0]["role"] == "system")


def _signs(family: Family) -> list[str]:
    """What stands for an image in a chat template's text, and for a video."""
    return [
        family.sign or family.image_token,
        *([family.video_token] if family.video_token else []),
    ]


def expanded(family: Family, text: str, visuals: Sequence[Visual], seen: Sequence[Seen]) -> str:
    """The text with every placeholder replaced by the tokens of its visual."""
    signs = _signs(family)
    first, *rest = re.split(f"({'|'.join(map(re.escape, signs))})", text)
    found, behind = rest[::2], rest[1::2]
    wanted = [signs[v.video] for v in visuals]
    if found != wanted:
        raise InputError(
            f"the chat template writes {found} for {wanted}: it does not belong to this family; "
            "give the processor its own chat template, or none for the published format"
        )
    return first + "".join(s.text + part for s, part in zip(seen, behind, strict=True))
