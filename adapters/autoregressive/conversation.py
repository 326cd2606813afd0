"""From a conversation to the text that the model reads, a placeholder for every visual."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from captum_dcam.adapters.common.visuals import Family, Seen, Visual
from captum_dcam.errors import InputError
from captum_dcam.model.prompts import Messages, messages_of, summary

__all__ = ["Messages", "expanded", "messages_of", "rendered", "summary"]


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
