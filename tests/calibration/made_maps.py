"""Collections of made maps, pictures whose words have masks, and scores by hand."""

from dataclasses import replace

import numpy as np
import tiny
import torch
from evaluation import made

from captum_dcam.calibration import Collection, Masked, collect, values_of, with_values
from captum_dcam.metrics import localization
from captum_dcam.model.layout import uniform_grid
from captum_dcam.presets import preset
from captum_dcam.refine import RefineContext, paper_refinements

SIDE, SIZE = 8, (24, 32)
SHORT = {"gen_length": 16}
PAPER = tuple(paper_refinements())
#: the default preset's maps with the paper's four modules
FOUR = replace(preset("default"), refinements=paper_refinements)
FITTED = with_values(PAPER, {**values_of(PAPER), "dacg.high_std": 0.031, "cba.gamma": 0.25})


def collection(count=60, seed=0, per=2, dull=0.2):
    """Random spiky maps, ``per`` of an image, each with a bright block where its mask is."""
    g = np.random.default_rng(seed)
    values = g.random((count, SIDE, SIDE)) ** g.uniform(0.5, 12, (count, 1, 1)) * dull
    found = []
    for i, (y, x) in enumerate(g.integers(0, SIDE - 3, (count, 2))):
        values[i, y : y + 3, x : x + 3] += g.random((3, 3))
        mask = np.zeros((1, SIDE, SIDE), dtype=bool)
        mask[:, y : y + 3, x : x + 3] = True
        found.append(mask.repeat(SIZE[0] // SIDE, 1).repeat(SIZE[1] // SIDE, 2))
    repeated = torch.from_numpy(g.random((count, SIDE, SIDE))).float()
    batch = Masked(
        (torch.from_numpy(values).float(),),
        torch.arange(count) // per,
        (RefineContext(16, SIZE, repeated),),
        uniform_grid(0, (SIDE, SIDE), SIZE),
        tuple(np.packbits(m) for m in found),
    )
    return Collection((batch,), tuple(range(count // per)), 2)


def clusters(count=24, mixed=0, seed=0, layer=0):
    """A spike on a block of tokens whose states resemble each other by 0.8 and other tokens' by
    0.3, up to noise: an affinity of a high power fills the block and nothing else. Of the first
    ``mixed`` images all states are alike."""
    g = np.random.default_rng(seed)
    batches = []
    for number, (y, x) in enumerate(g.integers(0, SIDE - 3, (count, 2))):
        mask = np.zeros((1, SIDE, SIDE), dtype=bool)
        mask[:, y : y + 3, x : x + 3] = True
        maps = np.zeros((2, SIDE, SIDE))
        maps[:, y + 1, x + 1] = 1
        noise = g.normal(size=(40, SIDE, SIDE))
        noise /= np.linalg.norm(noise, axis=0)
        shared, own = np.eye(42)[:, 40], np.eye(42)[:, 41]
        states = np.sqrt(0.3) * shared[:, None, None] * np.ones((1, SIDE, SIDE))
        if number >= mixed:
            states = states + np.sqrt(0.5) * own[:, None, None] * mask
        scale = np.where(mask & (number >= mixed), np.sqrt(0.2), np.sqrt(0.7))
        states[:40] += scale * noise
        pixels = mask.repeat(SIZE[0] // SIDE, 1).repeat(SIZE[1] // SIDE, 2)
        features = torch.from_numpy(states).float()
        batches.append(
            Masked(
                (torch.from_numpy(maps).float(),),
                torch.full((2,), number),
                (RefineContext(16, SIZE, torch.zeros(2, SIDE, SIDE), features),),
                uniform_grid(0, (SIDE, SIDE), SIZE),
                (np.packbits(pixels),) * 2,
            )
        )
    return Collection(tuple(batches), tuple(range(count)), layer)


def f3(found, stages):
    """Mean F3 of a chain over a collection, without any of the calibration's own code."""
    total = []
    for batch in found.batches:
        values = batch.maps[0]
        for stage in stages:
            values = stage(values, batch.contexts[0])
        masks = batch.masks_of(list(range(len(values))))
        total.append(localization(batch.grid.to_pixels(values), masks).f3.double())
    return float(torch.cat(total).mean())


class Pictures(made.Pictures):
    """What the tiny model says: "color" has a mask, "shape" two."""

    names = ("color", "shape")

    def sample(self, image_id):
        sample = made.Sample(image_id)
        things = [made.Thing(n, 7 * image_id + i) for i, n in enumerate(self.names)]
        another = made.Thing("another", 7 * image_id + 3)
        another.names = self.names[-1:]
        things.append(another)
        return _Labelled(sample, things)


class _Labelled:
    def __init__(self, sample, things):
        self.sample, self.objects, self.prompt = sample, things, sample.prompt

    def image(self):
        return self.sample.image()


def gathered(count=4, base=FOUR, data=Pictures, first=0, **options):
    """The collection of ``count`` pictures that the tiny model explains."""
    options = {"generation": SHORT, **options}
    ids = range(first, first + count)
    data = data(count, first=first)
    return collect(tiny.adapter("prefix"), data, ids, base, **options)
