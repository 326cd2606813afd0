r"""Arrays and images as texts in a page: bytes in base64, deflated where that pays."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from captum_dcam.viewer.overlay import fitted, scaled

#: longer side of an image in a page, in pixels: of one, and at least, of many
LONGEST, SHORTEST = 1024, 240
#: longer side of a mask
MASK = 320
#: deflated bytes must be this much fewer
PAYS = 0.95


def packed(values: np.ndarray) -> dict[str, Any]:
    """An array of uint8: ``data`` in base64, and whether it is deflated (zlib)."""
    raw = np.ascontiguousarray(values, dtype=np.uint8).tobytes()
    small = zlib.compress(raw, 9)
    deflated = len(small) < PAYS * len(raw)
    return {"data": base64.b64encode(small if deflated else raw).decode(), "deflated": deflated}


def packed_maps(maps: Sequence[Tensor], word: int = 0) -> list[dict[str, Any]]:
    r"""Maps (…, h, w), one per grid, as uint8 on the scale of every word.

    Args:
        maps (sequence of Tensor): non-negative; negative and infinite values count as 0.
        word (int, optional): the axis of the words; a word has one scale over all other axes and
            all grids. Default: 0
    """
    arrays = [np.nan_to_num(m.double().numpy(), posinf=0.0, neginf=0.0).clip(min=0) for m in maps]
    others = tuple(axis for axis in range(arrays[0].ndim) if axis != word)
    top = np.max([a.max(axis=others, initial=0.0) for a in arrays], axis=0)
    shape = [-1 if axis == word else 1 for axis in range(arrays[0].ndim)]
    scale = (255 / np.where(top > 0, top, 1.0)).reshape(shape)
    return [packed(np.rint(a * scale)) for a in arrays]


def packed_mask(mask: Tensor, side: int = MASK) -> dict[str, Any]:
    """A mask (H, W) bool as bits, row by row without gaps; ``size`` [h, w], reduced where large."""
    full = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    side = min(side, max(full.size))
    small = np.asarray(full.resize(fitted(full.size, side, side), Image.Resampling.BOX)) > 127
    return {"size": list(small.shape), **packed(np.packbits(small))}


def image_source(image: Image.Image, count: int = 1, side: int | None = None) -> str:
    """An image as a ``data:`` address: PNG or JPEG, whichever is smaller, and the smaller the more
    images (``count``) there are."""
    longest = side or max(SHORTEST, round(LONGEST / count**0.5))
    if max(image.size) > longest:
        image = scaled(image, fitted(image.size, longest, longest))
    made = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        image.convert("RGB").save(file, kind, **options)
        made[kind] = file.getvalue()
    kind = min(made, key=lambda k: len(made[k]))
    return f"data:image/{kind};base64,{base64.b64encode(made[kind]).decode()}"
