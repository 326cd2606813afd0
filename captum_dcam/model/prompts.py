r"""What a model is asked: conversations of several turns, and videos among the images.

A prompt is a string, or a conversation: a list of ``{"role": …, "content": …}`` with roles
``system``, ``user`` and ``assistant``; content is a string, or a list of parts ``{"type": "text",
"text": …}``, ``{"type": "image"}`` and ``{"type": "video"}``. Where no part places them, images
stand in front of the first user message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from captum_dcam.errors import InputError, InputTypeError, MissingFileError, PictureError

ROLES = ("system", "user", "assistant")
#: which of these Pillow raises at a damaged file depends on its format
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
#: messages whose content is a list of parts, as chat templates want them
Messages = list[dict[str, Any]]


class Shown(Protocol):
    """An image or a video of a request."""

    @property
    def video(self) -> bool: ...


class Video(tuple[Image.Image, ...]):
    r"""Frames of a video, in the place of an image.

    Args:
        frames (iterable of PIL.Image.Image): at least one, all of one size.

    Raises:
        TypeError: a frame that is no PIL image.
        ValueError: no frame, or frames of different sizes.
    """

    def __new__(cls, frames: Iterable[Image.Image]) -> Video:
        made = super().__new__(cls, frames)
        for number, frame in enumerate(made):
            if not isinstance(frame, Image.Image):
                raise InputTypeError(
                    f"frame {number} is a {type(frame).__name__}: expected a PIL image; turn an "
                    "array into one with PIL.Image.fromarray"
                )
        sizes = sorted({f.size for f in made})
        if len(sizes) != 1:
            found = f"frames of sizes {sizes} (width × height)" if sizes else "no frame"
            raise InputError(f"a video has {found}: give one or more frames of one size")
        return made


#: one image or video, or several of them
Pictures = Image.Image | Video | Sequence[Image.Image | Video]
#: a question, or the messages of a conversation
Prompt = str | Sequence[dict[str, Any]]


def pictures_of(shown: Pictures) -> list[Any]:
    """The images and videos of one example, whether one was given or several."""
    return [shown] if isinstance(shown, Image.Image | Video) else list(shown)


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


# -- images from files: upright, RGB, fully read ---------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; transparent pixels are shown on white, wide grey values scaled to 8 bits."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image, dtype=np.float64).clip(min=0)
        return Image.fromarray((wide / max(wide.max(), 1) * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def open_picture(path: str | Path) -> Image.Image:
    r"""Read an image file completely, turn it upright (EXIF) and convert it to RGB.

    Raises:
        FileNotFoundError: no such file.
        PictureError: not an image, damaged, truncated, or too large to be opened safely.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file")
    if path.is_dir():
        raise PictureError(f"{path} is a folder: expected a picture file")
    try:
        with Image.open(path) as file:
            file.load()  # Pillow reads lazily: a truncated file shows here, not later
            return to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} is too large to be opened safely: {error}") from error
    except PermissionError as error:
        raise PictureError(f"{path} may not be read: {error.strerror}") from error
    except DAMAGED as error:
        raise PictureError(f"{path} is damaged or truncated: {error}") from error
