r"""The text side of LLaVA-type packing: a prompt in which id -200 stands for a picture's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.common.anyres import parse_pinpoints
from captum_dcam.adapters.common.visuals import Visual, visuals_of
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.prompts import messages_of

#: system prompt of the recipes
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
#: what stands for a picture among the ids, and in the text
IMAGE_ID, SIGN = -200, "<image>"


def parts_of(processor: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor: a pair of them, or an object with both as attributes."""
    if isinstance(processor, list | tuple) and len(processor) == 2:
        tokenizer, image_processor = processor
    else:
        tokenizer = getattr(processor, "tokenizer", None)
        image_processor = getattr(processor, "image_processor", None)
    if not hasattr(tokenizer, "encode") or not hasattr(image_processor, "preprocess"):
        raise InputTypeError(
            f"processor is a {type(processor).__name__}: expected (tokenizer, image_processor), "
            "the first and third results of the family's load_pretrained_model"
        )
    return tokenizer, image_processor


def pictures_of(
    family: str, images: Sequence[Sequence[Any]], prompts: Sequence[Any]
) -> tuple[Visual, ...]:
    """The pictures of the one example that such families run at a time, as RGB; raises else."""
    if len(images) != 1 or len(prompts) != 1:
        raise InputError(
            f"{len(images)} lists of pictures and {len(prompts)} prompts: {family} decodes one "
            "example at a time; prepare and explain them one by one"
        )
    visuals = visuals_of(images[0])
    if any(v.video for v in visuals):
        raise InputError(
            f"{family} takes no video here: give single frames as pictures instead, "
            "images=[[frame1, frame2]]"
        )
    return visuals


def asked(tokenizer: Any, prompt: Any, visuals: Sequence[Visual], system: str | None) -> str:
    r"""The text that the model reads, by the tokenizer's chat template, ``<image>`` for pictures.

    A prompt is a string or a conversation (see the autoregressive families). A string may place
    its pictures itself by writing ``<image>``; otherwise they stand in front of it, a line each.

    Raises:
        TypeError, ValueError: as for conversations, and where pictures and signs do not match.
    """
    texts = [prompt] if isinstance(prompt, str) else _texts(prompt)
    signs = sum(t.count(SIGN) for t in texts)
    if isinstance(prompt, str) and signs:
        messages = [{"role": "user", "content": prompt}]
        if signs != len(visuals):
            raise InputError(
                f"the prompt places {signs} pictures by {SIGN}, but {len(visuals)} were given: "
                "expected as many; leave the signs out to have pictures in front"
            )
    elif signs:
        raise InputError(f"a message holds {SIGN}: place pictures by parts {{'type': 'image'}}")
    else:
        messages = [
            {"role": m["role"], "content": "".join(map(_plain, m["content"]))}
            for m in messages_of(prompt, visuals)
        ]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _texts(prompt: Any) -> list[str]:
    out = []
    for message in prompt if isinstance(prompt, list | tuple) else ():
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        out += [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
    return out


def _plain(part: dict[str, Any]) -> str:
    return part["text"] if part["type"] == "text" else f"{SIGN}\n"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, :data:`IMAGE_ID` for every sign; parts are tokenized one by one, and a start
    token that the tokenizer puts in front of each is kept in front of the first only."""
    chunks = [list(tokenizer(chunk).input_ids) for chunk in text.split(SIGN)]
    start = tokenizer.bos_token_id
    drop = 1 if chunks[0] and chunks[0][0] == start else 0
    out = chunks[0]
    for chunk in chunks[1:]:
        out = [*out, IMAGE_ID, *chunk[drop:]]
    return out


@dataclass(frozen=True)
class Packed:
    r"""Where things lie in the packed sequence.

    Args:
        starts (tuple of int): position of every picture's first token.
        length (int): P, tokens of the prefix.
        positions (Tensor), ids (Tensor): (K,) int64 of the text tokens.
    """

    starts: tuple[int, ...]
    length: int
    positions: Tensor
    ids: Tensor


def packed(ids: Sequence[int], counts: Sequence[int]) -> Packed:
    """Positions when the pictures' signs grow to ``counts`` tokens."""
    starts, at, text = [], 0, []
    left = iter(counts)
    for one in ids:
        if one == IMAGE_ID:
            starts.append(at)
            at += next(left)
        else:
            text.append((at, one))
            at += 1
    positions, kept = (torch.tensor([t[i] for t in text], dtype=torch.int64) for i in (0, 1))
    return Packed(tuple(starts), at, positions, kept)


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
    return parse_pinpoints(config.image_grid_pinpoints, tile), most


def check_length(family: str, length: int, config: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """ValueError where the family would cut the packed prefix off without a word."""
    names = ("tokenizer_model_max_length", "max_position_embeddings", "max_sequence_length")
    limits = {n: getattr(config, n, None) for n in names}
    small = [(v, n) for n, v in limits.items() if isinstance(v, int) and v < length]
    if small:
        limit, name = min(small)
        raise InputError(
            f"prompt and pictures of {list(sizes)} (width × height) make {length} tokens, but "
            f"{family}'s {name} is {limit}: the image span would be cut off; give smaller or fewer "
            "pictures or a shorter prompt"
        )
