r"""From pictures and prompts of B examples to one request with one layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.autoregressive.conversation import (
    expanded,
    messages_of,
    rendered,
    summary,
)
from captum_dcam.adapters.common.visuals import Family, Seen, Visual, shifted, visuals_of
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request
from captum_dcam.model.layout import Grid, Layout


@dataclass(frozen=True)
class Conversations(Request):
    r"""A request that remembers what it was made of.

    Args:
        asked (tuple): for every example its prompt: a string or a conversation.
        frames (tuple of int): of every video how many frames it has; 0 for a picture.
        owners (Tensor): (1, …) int64, the image token of every element of one example's pixels.
    """

    asked: tuple[Any, ...] = ()
    frames: tuple[int, ...] = ()
    owners: Tensor | None = field(default=None, repr=False)

    def single(self, example: int) -> Request:
        one = super().single(example)
        assert isinstance(one, Conversations)
        return replace(one, asked=self.asked[example : example + 1])


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
        ValueError: nothing to do, pictures the family does not take, more tokens than the context
            holds, or examples whose image tokens lie at different places.
    """
    if not prompts or len(images) != len(prompts):
        raise InputError(
            f"{len(images)} lists of pictures for {len(prompts)} prompts: expected one list of "
            "pictures for each prompt, at least one"
        )
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
