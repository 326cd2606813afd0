"""A made-up explanation of any size: no model needed."""

import numpy as np
import torch
from PIL import Image

from captum_dcam import Explanation
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.words import Target


def picture(size: tuple[int, int], shift: int = 0) -> Image.Image:
    """A colourful gradient of (W, H) pixels."""
    x = np.linspace(0, 255, size[0])[None].repeat(size[1], 0)
    y = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    pixels = np.stack((x, y, np.full_like(x, 90 + shift)), axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def made(
    words: int = 5,
    size: tuple[int, int] = (192, 160),
    images: int = 1,
    maps: str = "blob",
    text: str = "word",
) -> Explanation:
    """``words`` targets of one token each; each map a blob elsewhere (or ``zero``, ``flat``)."""
    h, w = 6, 8
    grids = tuple(uniform_grid(i * h * w, (h, w), size[::-1], i) for i in range(images))
    values = torch.zeros(words, h, w)
    if maps == "flat":
        values += 0.5
    if maps == "blob":
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        for n in range(words):
            values[n] = (-((rows - n % h) ** 2 + (columns - n % w) ** 2) / 3).exp()
    tokens = torch.arange(words)[None]
    return Explanation(
        prompt="what is in the image ?",
        answer=" ".join(f"{text}{n}" for n in range(words)),
        targets=tuple(Target(f"{text}{n}", (n,), (n,)) for n in range(words)),
        maps=tuple(values / (i + 1) for i in range(images)),
        peaks=tuple(values.amax((-2, -1)) / (i + 1) for i in range(images)),
        token_texts=tuple(f" {text}{n}" for n in range(words)),
        layout=Layout(grids, images * h * w + 3),
        trajectory=Trajectory(
            tokens=tokens,
            states=(torch.zeros(words, 1, words, dtype=torch.long),),
            final_state=(tokens,),
            commit_step=tokens.flip(1),
            confidence=torch.linspace(0.5, 1, words)[None],
            cache="none",
            lengths=(images * h * w + 3 + words,) * words,
            image_end=images * h * w,
            settings={},
        ),
        settings={"family": "mini", "layer": 2, "score": "commit", "product": "pooled"},
        versions={},
        images=tuple(picture(size, 60 * i) for i in range(images)),
    )


def found_at(page: Image.Image, picture: Image.Image, border: int = 4) -> tuple[int, int]:
    """Where a picture stands on a page, but for its rounded corners: (left, top), there alone."""
    whole = np.asarray(page.convert("RGB")).astype(np.int32) @ (65536, 256, 1)
    inner = np.asarray(picture.convert("RGB")).astype(np.int32) @ (65536, 256, 1)
    inner = inner[border:-border, border:-border]
    h, w = inner.shape
    rows, columns = whole.shape[0] - h + 1, whole.shape[1] - w + 1
    at = np.ones((rows, columns), dtype=bool)
    for y, x in ((0, 0), (h - 1, w - 1), (h // 2, w // 3), (h // 3, w // 2)):
        at &= whole[y : y + rows, x : x + columns] == inner[y, x]
    places = [
        (int(x) - border, int(y) - border)
        for y, x in np.argwhere(at)
        if np.array_equal(whole[y : y + h, x : x + w], inner)
    ]
    assert len(places) == 1, f"found {len(places)} times: {places}"
    return places[0]
