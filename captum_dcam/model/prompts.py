r"""What a model is asked: conversations of several turns, and videos among the images.

A prompt is a string, or a conversation: a list of ``{"role": …, "content": …}`` with roles
``system``, ``user`` and ``assistant``; content is a string, or a list of parts ``{"type": "text",
"text": …}``, ``{"type": "image"}`` and ``{"type": "video"}``. Where no part places them, images
stand in front of the first user message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from captum_dcam import checks
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.images import (
    EXPECTED,
    KINDS,
    ImageLike,
    as_image,
    evenly,
    frames_of,
    images_in,
)

ROLES = ("system", "user", "assistant")
#: messages whose content is a list of parts, as chat templates want them
Messages = list[dict[str, Any]]


class Shown(Protocol):
    """An image or a video of a request."""

    @property
    def video(self) -> bool: ...


class Video(tuple[Image.Image, ...]):
    r"""Frames of a video, in the place of an image.

    Args:
        frames (iterable): at least one, all of one size; each as
            :func:`~captum_dcam.model.images.as_image` takes it.

    Raises:
        TypeError, PictureError: a frame that is no image.
        ValueError: no frame, or frames of different sizes.
    """

    def __new__(cls, frames: Iterable[ImageLike]) -> Video:
        read = (as_image(frame, name=f"frame {n}") for n, frame in enumerate(frames))
        made = super().__new__(cls, read)
        sizes = sorted({f.size for f in made})
        if len(sizes) != 1:
            found = f"frames of sizes {sizes} (width × height)" if sizes else "no frame"
            raise InputError(f"a video has {found}: give one or more frames of one size")
        return made

    @classmethod
    def read(cls, path: str | Path, frames: int | None = None) -> Video:
        r"""A video of an animated GIF, WebP or PNG, or of a folder of images, sorted by name.

        Args:
            path (path): the file or folder.
            frames (int, optional): number of frames, evenly spaced, the first one among them; all
                where there are no more. Default: all

        Raises:
            MissingFileError: no such file or folder, or a folder without images.
            PictureError: a file of another format, or a damaged one.
            ValueError: frames of different sizes.
        """
        most = None if frames is None else checks.whole("frames", frames, least=1)
        path = Path(path)
        return cls(evenly(images_in(path), most) if path.is_dir() else frames_of(path, most))


#: one image or video, or several of them
Pictures = ImageLike | Video | Sequence[ImageLike | Video]
#: a question, or the messages of a conversation
Prompt = str | Sequence[dict[str, Any]]


def pictures_of(shown: Pictures) -> list[Image.Image | Video]:
    """The images and videos of one example, whether one was given or several, in RGB; a list or
    tuple among several is a video."""
    if isinstance(shown, (*KINDS, Video)):
        return [shown if isinstance(shown, Video) else as_image(shown)]
    if not isinstance(shown, Sequence):
        raise InputTypeError(
            f"image is a {type(shown).__name__}: expected {EXPECTED}, or a list of them"
        )
    several: Sequence[Any] = shown
    return [
        Video(one) if isinstance(one, list | tuple) else as_image(one, name=f"image {n}")
        for n, one in enumerate(several)
    ]


def messages_of(prompt: Any, visuals: Sequence[Shown]) -> Messages:
    r"""The conversation of one example, every visual in its place.

    Args:
        prompt (str or sequence of dict): may be empty text.
        visuals (sequence): the example's images and videos, in order.

    Returns:
        list: messages whose content is a list of parts.

    Raises:
        TypeError: neither a string nor messages.
        ValueError: unknown roles or parts, no user message last, images that do not fit.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(given, list | tuple) or not all(isinstance(m, dict) for m in given):
        raise InputTypeError(
            f"the prompt is a {type(prompt).__name__}: expected a string, or a list of messages "
            '{"role": "user", "content": "…"}'
        )
    messages = [_message(m) for m in given]
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "nothing"
        raise InputError(f"the conversation ends with {last}: expected a user message to answer")
    kinds = ["video" if v.video else "image" for v in visuals]
    placed = [p["type"] for m in messages for p in m["content"] if p["type"] != "text"]
    if not placed:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [*({"type": k} for k in kinds), *first["content"]]
    elif placed != kinds:
        raise InputError(
            f"the conversation places {placed}, but {kinds} were given: expected as many, in the "
            "same order; leave out the parts to have them in front of the first user message"
        )
    return messages


def _message(given: dict[str, Any]) -> dict[str, Any]:
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise InputError(f"a message has role {role!r}: expected one of {ROLES}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise InputTypeError(
            f"a message's content is a {type(content).__name__}: expected a string or a list of "
            'parts {"type": "text", "text": "…"}'
        )
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "video"):
            raise InputError(f"part {part!r} of a message: expected type text, image or video")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise InputError(f"part {part!r} of a message has no text")
        if kind != "text" and role != "user":
            raise InputError(f"a message of {role} holds a {kind}: images belong to user messages")
    plain = [dict(p) if p["type"] == "text" else {"type": p["type"]} for p in parts]
    return {"role": role, "content": plain}


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
