r"""From what a caller wrote to the text that the model reads, a placeholder for every visual.

A prompt is a string, or a conversation: a list of ``{"role": …, "content": …}`` with roles
``system``, ``user`` and ``assistant``; content is a string, or a list of parts ``{"type": "text",
"text": …}``, ``{"type": "image"}`` and ``{"type": "video"}``. Where no part places them, pictures
stand in front of the first user message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from captum_dcam.adapters._autoregressive.visuals import Family, Seen, Visual

ROLES = ("system", "user", "assistant")
#: messages whose content is a list of parts, as chat templates want them
Messages = list[dict[str, Any]]


def messages_of(prompt: Any, visuals: Sequence[Visual]) -> Messages:
    r"""The conversation of one example, every visual in its place.

    Raises:
        TypeError: neither a string nor messages.
        ValueError: unknown roles or parts, no user message last, pictures that do not fit.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(given, list | tuple) or not all(isinstance(m, dict) for m in given):
        raise TypeError(
            f"the prompt is a {type(prompt).__name__}: expected a string, or a list of messages "
            '{"role": "user", "content": "…"}'
        )
    messages = [_message(m) for m in given]
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"the conversation ends with {last}: expected a user message to answer")
    kinds = ["video" if v.video else "image" for v in visuals]
    placed = [p["type"] for m in messages for p in m["content"] if p["type"] != "text"]
    if not placed:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [*({"type": k} for k in kinds), *first["content"]]
    elif placed != kinds:
        raise ValueError(
            f"the conversation places {placed}, but {kinds} were given: expected as many, in the "
            "same order; leave out the parts to have them in front of the first user message"
        )
    return messages


def _message(given: dict[str, Any]) -> dict[str, Any]:
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise ValueError(f"a message has role {role!r}: expected one of {ROLES}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise TypeError(
            f"a message's content is a {type(content).__name__}: expected a string or a list of "
            'parts {"type": "text", "text": "…"}'
        )
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "video"):
            raise ValueError(f"part {part!r} of a message: expected type text, image or video")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"part {part!r} of a message has no text")
        if kind != "text" and role != "user":
            raise ValueError(
                f"a message of {role} holds a {kind}: pictures belong to user messages"
            )
    plain = [dict(p) if p["type"] == "text" else {"type": p["type"]} for p in parts]
    return {"role": role, "content": plain}


def rendered(family: Family, messages: Messages, template: str | None) -> str:
    r"""The conversation as text: by the chat template, or by the family's published format."""
    reserved = [family.image_token, *([family.video_token] if family.video_token else [])]
    for part in (p for m in messages for p in m["content"] if p["type"] == "text"):
        for token in reserved:
            if token in part["text"]:
                raise ValueError(
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
        raise ValueError(
            f"the chat template writes {found} for {wanted}: it does not belong to this family; "
            "give the processor its own chat template, or none for the published format"
        )
    parts = re.split("|".join(map(re.escape, signs)), text)
    out = parts[0]
    for one, rest in zip(seen, parts[1:], strict=True):
        out += one.text + rest
    return out


def summary(prompt: Any) -> str:
    """A prompt as one string, for records."""
    if isinstance(prompt, str):
        return prompt
    lines = []
    for m in prompt:
        content = m["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        lines.append(f"{m['role']}: {''.join(parts)}")
    return "\n".join(lines)
