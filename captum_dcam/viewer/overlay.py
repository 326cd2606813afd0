r"""Heat over an image: the value sets colour and opacity, so that the image stays visible."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from captum_dcam.errors import InputError, UnknownNameError, near
from captum_dcam.model.images import ImageLike, as_image
from captum_dcam.refine.checks import check_maps
from captum_dcam.results.explanation import Explanation

#: default colour map: perceptually uniform, its brightest colour for the highest value
CMAP = "inferno"
#: default opacity at the highest value, and how much of the image's colour is withdrawn behind heat
ALPHA, MUTE = 0.9, 0.7
#: opacity of a map that is said to localise nothing
FAINT = 0.35
#: ``Image.info["note"]`` of an overlay that has nothing to show
FLAT = "flat map: no place stands out"


@lru_cache(maxsize=8)
def palette(cmap: str) -> np.ndarray:
    """Colours (256, 3) uint8 of a matplotlib colour map, read-only."""
    if cmap not in colormaps:
        raise UnknownNameError(f"unknown colour map {cmap!r}{near(cmap, colormaps)}")
    colors = np.rint(colormaps[cmap](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    colors.flags.writeable = False
    return colors


def overlay(
    image: ImageLike,
    map_pixels: Tensor | np.ndarray,
    *,
    cmap: str = CMAP,
    alpha: float = ALPHA,
    vmax: float | None = None,
    mute: float = 0.0,
) -> Image.Image:
    r"""Blend a map over an image.

    Args:
        image (PIL.Image.Image or path): H × W pixels, as
            :func:`~captum_dcam.model.images.as_image` takes them.
        map_pixels (Tensor or array): (H, W), non-negative and finite, for example one of
            ``explanation.pixel_maps()``.
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``
        alpha (float, optional): opacity at the highest value, 0 to 1; a pixel's own opacity is
            proportional to its value. Default: 0.9
        vmax (float, optional): the value painted as the highest. Default: the map's maximum
        mute (float, optional): how much of the image's own colour and light is withdrawn, 0 to 1,
            so that heat stands out from a colourful or bright image. Default: 0

    Returns:
        PIL.Image.Image: RGB, H × W. A constant map shows no place: the plain image comes back,
        with the reason in ``info["note"]``.

    Raises:
        ValueError: shape, values, ``alpha`` or ``vmax`` out of range.
        UnknownNameError: no such colour map.
    """
    colors, picture = palette(cmap), as_image(image)
    if isinstance(map_pixels, Tensor):
        map_pixels = map_pixels.detach().cpu().double().numpy()
    values = np.asarray(map_pixels, dtype=np.float64)
    if values.shape != (picture.height, picture.width):
        raise InputError(
            f"map has shape {values.shape}: expected ({picture.height}, {picture.width}), the "
            "image's height and width; explanation.pixel_maps() gives maps of that size"
        )
    check_maps(torch.from_numpy(values), "overlay", name="map_pixels")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}: expected an opacity from 0 to 1")
    if vmax is not None and not (vmax > 0 and np.isfinite(vmax)):
        raise InputError(f"vmax is {vmax}: expected a positive number")
    picture = muted(picture, mute)
    if values.min() == values.max():
        plain = picture.copy()
        plain.info["note"] = FLAT
        return plain
    top = values.max() if vmax is None else vmax
    scaled = (values / top).clip(0, 1)
    heat = colors[np.rint(scaled * 255).astype(np.uint8)]
    opacity = (scaled * alpha)[..., None].astype(np.float32)
    base = np.asarray(picture, dtype=np.float32)
    return Image.fromarray(np.rint(base + opacity * (heat - base)).astype(np.uint8))


def muted(picture: Image.Image, share: float) -> Image.Image:
    """The image with ``share`` of its colour withdrawn, and dimmed: 0 as it is, 1 dark grey."""
    if not 0 <= share <= 1:
        raise InputError(f"mute is {share}: expected a share from 0 to 1")
    grey = picture.convert("L").point([round(v * 0.7) for v in range(256)]).convert("RGB")
    return Image.blend(picture, grey, share)


def word_map(
    explanation: Explanation,
    word: str | int,
    image: int = 0,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
) -> Tensor:
    r"""A word's map over one image, from all grids (tiles, thumbnail) that show the image.

    Args:
        explanation (Explanation): the result.
        word (str or int): a word's first target, or a target's number from 0.
        image (int, optional): number of the image. Default: 0
        size (tuple, optional): (W, H) in pixels. Default: the image's own
        mode (str, optional): ``bilinear`` or ``nearest``. Default: ``"bilinear"``

    Returns:
        Tensor: (H, W) float32; where grids overlap their maps add up.
    """
    number = explanation.index(word)
    wide, high = explanation.images[image].size if size is None else size
    own = [maps[number].float() for maps in explanation.maps]
    return explanation.layout.over_image(own, image, (high, wide), mode)


def word_overlay(
    explanation: Explanation,
    word: str | int,
    image: int = 0,
    *,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    cmap: str = CMAP,
    alpha: float | None = None,
    mute: float = MUTE,
) -> Image.Image:
    r"""Overlay of one word on one image, whose own colours are muted.

    Several images of a request share a word's scale: a word that looks at the second one leaves
    the first one pale. So does one whose map is said to localise nothing
    (:attr:`captum_dcam.results.trust.Trust.doubtful`), unless ``alpha`` is given. Arguments as in
    :func:`word_map` and :func:`overlay`.
    """
    picture = explanation.images[image]
    if size is not None and size != picture.size:
        picture = scaled(picture, size)
    values = word_map(explanation, word, image, size, mode)
    number, vmax = explanation.index(word), None
    if alpha is None:
        trust = explanation.trust
        alpha = FAINT if trust is not None and trust.doubtful[number] else ALPHA
    if len(explanation.images) > 1:
        vmax = max(float(maps[number].max()) for maps in explanation.maps) or None
    return overlay(picture, values, cmap=cmap, alpha=alpha, vmax=vmax, mute=mute)


def scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in RGB at another size."""
    return as_image(picture).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def fitted(size: tuple[int, int], width: float, height: float) -> tuple[int, int]:
    """Largest size (W, H) of the same aspect inside ``width`` × ``height``, at least 1 × 1."""
    factor = min(width / size[0], height / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
