"""Results of every kind for the explorer: what a model gave, made once; nothing is downloaded."""

import functools
from dataclasses import replace

import tiny
import torch
from awkward import made_ar
from doubles import lavida_bound
from viewer.made import made

from captum_dcam import Explanation, explain_generation
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.results.steps import StepMaps


@functools.cache
def stepped() -> Explanation:
    """Every part that an explanation can have, from the embedded model with random weights."""
    forward = tiny.bound("prefix")
    found = explain_generation(forward, every_step=True, trust=True)
    mask = torch.zeros(found.images[0].height, found.images[0].width, dtype=torch.bool)
    mask[10:40, 20:60] = True
    return replace(found, masks=(mask, *[None] * (len(found.targets) - 1)))


@functools.cache
def tiled() -> Explanation:
    """A thumbnail and four tiles: LaViDa's double."""
    forward = lavida_bound.bound("llada", "none", gen_length=4)
    return explain_generation(forward, [0, 1, 2], every_step=True, trust=True, preset="base")


@functools.cache
def filmed() -> Explanation:
    """A video of three frames, two of which share a grid, and an image: Qwen2.5-VL's double."""
    pictures = [[made_ar.video(3), made_ar.picture(2)]]
    forward = made_ar.bound("qwen2_5_vl", length=3, pictures=pictures)
    return explain_generation(forward, [0, 1], preset="base")


def large(words: int = 32, steps: int = 32, side: int = 27) -> Explanation:
    """As large as a page should hold within its limit; noise, which nothing deflates."""
    drawn = torch.Generator().manual_seed(0)
    plain = made(words, size=(640, 480))
    grid = uniform_grid(0, (side, side), (480, 640))
    maps = torch.rand(steps, words, side, side, generator=drawn)
    trajectory = replace(
        plain.trajectory,
        states=(torch.zeros(steps, 1, words, dtype=torch.long),),
        lengths=(side * side + 3 + words,) * steps,
        commit_step=torch.arange(words)[None] % steps,
        image_end=side * side,
    )
    return replace(
        plain,
        maps=(maps[0],),
        peaks=(maps[0].amax((-2, -1)),),
        layout=Layout((grid,), side * side + 3),
        trajectory=trajectory,
        steps=StepMaps(
            plain.targets,
            (maps,),
            (maps.amax((-2, -1)),),
            torch.rand(steps, words, generator=drawn),
        ),
    )
