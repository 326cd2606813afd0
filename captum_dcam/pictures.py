"""Pictures from files: upright, RGB, fully read; and errors that say what is wrong with one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class PictureError(ValueError):
    """A file that cannot be used as a picture."""


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
    r"""Read a picture file completely, turn it upright (EXIF) and convert it to RGB.

    Raises:
        FileNotFoundError: no such file.
        PictureError: not a picture, damaged, truncated, or too large to be opened safely.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
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
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise PictureError(f"{path} is damaged or truncated: {error}") from error
