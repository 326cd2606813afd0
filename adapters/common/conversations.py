r"""Families that read conversations: chat template, placeholders, pictures, one layout.

For those whose processor has a tokenizer and an image processor, and whose pictures a
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

from captum_dcam.adapters.common.loading import Parts, parts_of
from captum_dcam.adapters.common.text import Words, special_ids
from captum_dcam.adapters.common.visuals import Family, Seen, Visual, shifted, visuals_of
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import Messages, messages_of, summary

# -- the adapter's part ---------------------------------------------------------------------------


class ConversationAdapter(Adapter):
    r"""What the adapters of such families share.

    Args:
        model (nn.Module): of the family.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): one of the family's.

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model: Any

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        super().__init__(model, processor, cache)
        parts = parts_of(processor)
        self._template, self._tokenizer = parts.chat_template, parts.tokenizer
        self._family = self._family_of(parts)
        self._words = Words(parts.tokenizer)

    @abstractmethod
    def _family_of(self, parts: Parts) -> Family:
        """What prepares the model's pictures."""

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return self._words.token_texts(ids)

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompts to a request.

        Args:
            images (sequence): for every example its pictures; where the family takes videos, a list
                of pictures among them is one, given as frames, and gets a grid per group of frames.
            prompts (sequence): for every example a string, or a conversation: messages
                ``{"role": …, "content": …}`` that end with the user's.

        Raises:
            TypeError, ValueError: say what was given, what was expected and what to do.
        """
        self.check_request(images, prompts)
        request = prepared(self._family, self._template, images, prompts)
        return replace(
            request,
            pixels=request.pixels.to(self.device, self.dtype),
            extras=tuple(e.to(self.device) for e in request.extras),
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
        return {*special_ids(self._tokenizer), *self._family.image_ids}

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
        frames (tuple of int): of every video how many frames it has; 0 for a picture.
        owners (Tensor): (1, …) int64, the image token of every element of one example's pixels.
    """

    asked: tuple[Any, ...]
    frames: tuple[int, ...]
    owners: Tensor = field(repr=False)

    def single(self, example: int) -> Conversations:
        return replace(super().single(example), asked=self.asked[example : example + 1])


@dataclass(frozen=True)
class Example:
    """One example: its visuals as the family sees them, and the ids of its text."""

    visuals: tuple[Visual, ...]
    seen: list[Seen]
    ids: list[int]


def prepared(
    family: Family,
    template: str | None,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[Any],
) -> Conversations:
    r"""The request, on the CPU and in float32.

    Raises:
        ValueError: pictures the family does not take, more tokens than the context holds, or
            examples whose image tokens lie at different places.
    """
    examples = [_example(family, template, i, p) for i, p in zip(images, prompts, strict=True)]
    ids, mask, grids = _sequence(family, examples)
    parts = [_pixels(family, e) for e in examples]
    extras = [_extras(family, e) for e in examples]
    return Conversations(
        torch.stack([pixels for pixels, _ in parts]),
        (ids, mask, *(torch.stack(same) for same in zip(*extras, strict=True))),
        Layout(grids, ids.shape[1]),
        tuple(summary(p) for p in prompts),
        tuple(tuple(f for v in e.visuals for f in v.frames) for e in examples),
        asked=tuple(prompts),
        frames=tuple(len(v.frames) if v.video else 0 for v in examples[0].visuals),
        owners=parts[0][1],
    )


def _example(family: Family, template: str | None, given: Sequence[Any], prompt: Any) -> Example:
    visuals = visuals_of(given)
    if family.video_token is None and any(v.video for v in visuals):
        raise InputError(
            f"{family.model_types[0]} takes no video: give single frames as pictures instead"
        )
    messages = messages_of(prompt, visuals)
    text = rendered(family, messages, template)
    seen = [family.see(v) for v in visuals]
    start = family.tokenizer.bos_token
    given_start = bool(start) and text.startswith(start)
    ids = family.tokenizer(
        expanded(family, text, visuals, seen), add_special_tokens=not given_start
    )["input_ids"]
    _check_length(family, ids)
    return Example(visuals, shifted(seen), list(ids))


def _check_length(family: Family, ids: Sequence[int]) -> None:
    """The prompt, all its image tokens, and one token of an answer must fit."""
    context = getattr(family.config.get_text_config(), "max_position_embeddings", None)
    if context is None or len(ids) < context:
        return
    pictures = [p for p, i in enumerate(ids) if i in family.image_ids]
    raise InputError(
        f"the prompt has {len(ids)} tokens, {len(pictures)} of them of pictures (the last at "
        f"{pictures[-1]}), but the model's context is {context}: the image span would be "
        "truncated; give smaller or fewer pictures, or lower the image processor's largest size"
    )


def _sequence(
    family: Family, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, tuple[Grid, ...]]:
    r"""Ids and mask (B, P), padded behind the last picture so that one layout serves all.

    Positions follow the mask, so padding there is the same as padding on the left.
    """
    pad = family.tokenizer.pad_token_id
    pad = 0 if pad is None else pad
    length = max(len(e.ids) for e in examples)
    rows, masks, layouts = [], [], []
    for example in examples:
        at = [p for p, i in enumerate(example.ids) if i in family.image_ids]
        grids = _grids(example, torch.tensor(at))
        layouts.append(grids)
        end, missing = at[-1] + 1, length - len(example.ids)
        rows.append([*example.ids[:end], *[pad] * missing, *example.ids[end:]])
        masks.append([*[1] * end, *[0] * missing, *[1] * (len(example.ids) - end)])
    for number, other in enumerate(layouts[1:], start=1):
        if not _same(layouts[0], other):
            shapes = [[g.shape for g in one] for one in (layouts[0], other)]
            raise InputError(
                f"the image tokens of examples 0 and {number} lie at different places (grids "
                f"{shapes[0]} and {shapes[1]} of pictures {layouts[0][0].image_size} and "
                f"{other[0].image_size}): one layout serves a batch; explain them one by one, or "
                "give pictures of one size and the same text in front of them"
            )
    return torch.tensor(rows), torch.tensor(masks), layouts[0]


def _grids(example: Example, at: Tensor) -> tuple[Grid, ...]:
    """Regions at the places of the image tokens, one after the other."""
    regions = [r for s in example.seen for r in s.regions]
    sizes = [r.skip + r.shape[0] * r.shape[1] for r in regions]
    if sum(sizes) != len(at):
        raise InputError(
            f"the prompt has {len(at)} image tokens for pictures of {sum(sizes)}: the tokenizer "
            "does not know the family's image token; load processor and model from one checkpoint"
        )
    parts = at.split(sizes)
    return tuple(r.place(p[r.skip :]) for r, p in zip(regions, parts, strict=True))


def _same(one: Sequence[Grid], other: Sequence[Grid]) -> bool:
    """Whether grids have the same positions in the same pixels."""
    return len(one) == len(other) and all(
        torch.equal(a.positions, b.positions)
        and a.image_size == b.image_size
        and a.image == b.image
        for a, b in zip(one, other, strict=True)
    )


def _pixels(family: Family, example: Example) -> tuple[Tensor, Tensor]:
    """Pixels (n, …) of an example and their owners, in the order of the family's pixel tensor."""
    seen = example.seen
    if family.videos_last:
        pairs = list(zip(example.visuals, seen, strict=True))
        seen = [s for v, s in pairs if not v.video] + [s for v, s in pairs if v.video]
    return torch.cat([s.pixels for s in seen]), torch.cat([s.owners for s in seen])[None]


def _extras(family: Family, example: Example) -> list[Tensor]:
    """The family's tensors (n, …) of one example."""
    out = []
    for name in family.extra_names:
        parts = [s.extras[name] for s in example.seen if name in s.extras]
        empty = torch.zeros(family.spare()[name], dtype=torch.long)
        out.append(torch.cat(parts) if parts else empty)
    return out


# -- the text -------------------------------------------------------------------------------------


def rendered(family: Family, messages: Messages, template: str | None) -> str:
    r"""The conversation as text: by the chat template, or by the family's published format."""
    reserved = [family.image_token, *([family.video_token] if family.video_token else [])]
    for part in (p for m in messages for p in m["content"] if p["type"] == "text"):
        for token in reserved:
            if token in part["text"]:
                raise InputError(
                    f"the prompt holds {token}, which stands for a picture: leave it out, pictures "
                    "are placed by themselves"
                )
    if template is not None:
        return family.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    turns = [family.turn(m["role"], _plain(family, m["content"])) for m in messages]
    return family.frame(turns, messages[0]["role"] == "system")


def _plain(family: Family, parts: Sequence[dict[str, Any]]) -> str:
    """Content as text with the format's placeholders."""
    picture, video = family.placeholders
    signs = {"image": picture, "video": video}
    return "".join(p["text"] if p["type"] == "text" else signs[p["type"]] for p in parts)


def expanded(family: Family, text: str, visuals: Sequence[Visual], seen: Sequence[Seen]) -> str:
    """The text with every placeholder replaced by the tokens of its visual."""
    signs = [family.image_token, *([family.video_token] if family.video_token else [])]
    found = re.findall("|".join(map(re.escape, signs)), text)
    wanted = [signs[v.video] for v in visuals]
    if found != wanted:
        raise InputError(
            f"the chat template writes {found} for {wanted}: it does not belong to this family; "
            "give the processor its own chat template, or none for the published format"
        )
    parts = re.split("|".join(map(re.escape, signs)), text)
    out = parts[0]
    for one, rest in zip(seen, parts[1:], strict=True):
        out += one.text + rest
    return out
