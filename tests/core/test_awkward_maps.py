"""Maps of an awkward batch: against plain autograd of each example alone, grid by grid."""

import awkward
import numpy as np
import pytest
import tiny
import torch
from plain import ROUNDING, plain

from captum_dcam import DiffusionCAM, explain_generation
from captum_dcam.maps import Reading, word_maps
from captum_dcam.model.words import resolve
from captum_dcam.refine import SICD, MinMax

both = pytest.mark.parametrize("cache", awkward.CACHES)
examples = pytest.mark.parametrize(
    ("family", "example"), [(f, b) for f in awkward.FAMILIES for b in range(awkward.BATCH[f])]
)


def product_of(features, gradients, product, center):
    """Signed map (h, w) of (h, w, D) features and gradients, in numpy."""
    a, g = (x.detach().double().numpy() for x in (features, gradients))
    if center:
        a = a - a.mean((0, 1))
    if product == "pooled":
        return torch.tensor((a * g.mean((0, 1))).sum(-1))
    if product == "positionwise":
        return torch.tensor((a * g).sum(-1))
    square = 2 * g**2 + g**3 * a.sum((0, 1))
    alpha = np.divide(g**2, square, out=np.zeros_like(g), where=square != 0)
    return torch.tensor((a * (alpha * np.maximum(g, 0)).sum((0, 1))).sum(-1))


def expected_maps(family, cache, example, target, reading):
    """A word's signed maps: every token in its own state, with a cached prefix one image."""
    forward = awkward.alone(family, cache, example, dtype=torch.float64)
    total, by_step = None, {}
    for p, token in zip(target.positions, target.token_ids, strict=True):
        step = {
            "commit": int(forward.trajectory.commit_step[0, p]),
            "final": forward.trajectory.steps - 1,
            "teacher": forward.trajectory.steps,
        }[reading.score]
        by_step.setdefault(step, []).append((p, token))
    whole = []  # gradients with respect to one and the same prefix add up before the product
    for step, pairs in by_step.items():
        state = plain(family, cache, example, step)
        whole.append((state.grids(state.hidden()), state.grids(state.gradient(pairs))))
    if cache == "prefix":
        gradients = [sum(parts) for parts in zip(*(g for _, g in whole), strict=True)]
        whole = [(whole[0][0], gradients)]
    for features, gradients in whole:
        maps = [
            product_of(f, g, reading.product, reading.center)
            for f, g in zip(features, gradients, strict=True)
        ]
        total = maps if total is None else [a + b for a, b in zip(total, maps, strict=True)]
    return total


def explained(family, cache, example, *words):
    """The batch's forward, and targets of the example's answer; all where none are named."""
    forward = awkward.bound(family, cache, dtype=torch.float64)
    tokens = forward.trajectory.tokens[example].tolist()
    return forward, resolve(forward.adapter, tokens, list(words) or None)


READINGS = (
    Reading("commit", "positionwise", True),
    Reading("final", "pooled", False),
    Reading("teacher", "plus_plus", True),
)


@examples
@both
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_maps_are_plain_autograds(family, cache, example, reading):
    forward, targets = explained(family, cache, example)
    chosen = [targets[0], next(t for t in targets if len(t.positions) == 2), targets[-1]]
    found = word_maps(forward, chosen, [example] * 3, reading)
    assert len(found) == 2
    for n, target in enumerate(chosen):
        expected = expected_maps(family, cache, example, target, reading)
        for grid in (0, 1):
            assert tiny.relative(found[grid][n], expected[grid]) < ROUNDING[family]


# -- what SICD is given ----------------------------------------------------------------------------

#: without the gate, and with weights that let the repeated words' map matter
DEBIAS = (MinMax(), SICD(gate=False, omega_rep=1.0, omega_out=0.0, lambda_max=1.0))
REPEATED = {
    ("mini", 0): ("a",),
    ("mini", 1): ("of", "the"),
    ("lavida", 0): ("a", "on"),
    ("causal", 0): ("a",),
    ("causal", 1): ("the",),
}


def stretched(x):
    return (x - x.min()) / (x.max() - x.min()).clamp_min(1e-30)


def debiased(family, cache, example, targets, reading):
    """Eq. 12 and 13 with the mean map of all occurrences of the words that stand twice."""
    _, repeated = explained(family, cache, example, *REPEATED[family, example])
    assert len(repeated) == 2 * len(REPEATED[family, example])

    def maps(target):
        return [m.relu() for m in expected_maps(family, cache, example, target, reading)]

    means = [stretched(sum(m)) for m in zip(*map(maps, repeated), strict=True)]
    out = []
    for target in targets:
        out.append([])
        for own, mean in zip(map(stretched, maps(target)), means, strict=True):
            share = (own * mean).sum() / mean.square().sum().clamp_min(1e-30)
            out[-1].append((own - share.clamp(0, 1) * mean).relu())
    return out


@examples
@both
@pytest.mark.parametrize(
    ("all_words", "reading"),
    ((True, Reading("final")), (False, Reading("commit", "positionwise", True))),
)
def test_sicd_gets_the_examples_repeated_words_grid_by_grid(
    family, cache, example, all_words, reading
):
    """Also where the repeated words themselves are not asked for."""
    forward, targets = explained(family, cache, example)
    if not all_words:
        targets = targets[1:2]
    found = explain_generation(
        forward,
        list(targets),
        example=example,
        score=reading.score,
        product=reading.product,
        center=reading.center,
        backward=reading.backward,
        refinements=list(DEBIAS),
    )
    wanted = debiased(family, cache, example, targets, reading)
    for grid in (0, 1):
        expected = torch.stack([maps[grid] for maps in wanted])
        assert expected.any() and found.maps[grid].shape[1:] == forward.request.layout.shapes[grid]
        assert torch.allclose(found.maps[grid].double(), expected, atol=1e-4)


@examples
@both
def test_attribute_debiases_every_row_by_its_own_example(family, cache, example):
    """Of a batch, of a word of several tokens, and of what NoiseTunnel repeats."""
    forward = awkward.bound(family, cache, dtype=torch.float64)
    reading, batch = Reading("final"), forward.request.batch
    every = [explained(family, cache, b)[1] for b in range(batch)]
    for choose in (
        lambda words: words[1],
        lambda words: next(w for w in words if len(w.positions) > 1),
    ):
        targets = [choose(words) for words in every]
        cam = DiffusionCAM(forward, preset="paper")
        found = cam.attribute(forward.request.pixels, targets, refinements=list(DEBIAS))
        (expected,) = debiased(family, cache, example, [targets[example]], reading)
        for grid in (0, 1):
            assert found[grid].shape == (batch, 1, *forward.request.layout.shapes[grid])
            assert torch.allclose(found[grid][example, 0], expected[grid], atol=1e-4)


@both
def test_words_that_stand_twice_are_looked_for_in_the_examples_own_answer(cache):
    """Of a batch whose first answer has none."""
    forward = awkward.bound("mini", cache, dtype=torch.float64, examples=(2, 1))
    _, targets = explained("mini", cache, 1)
    for words in (targets, targets[2:3]):
        found = explain_generation(
            forward, list(words), example=1, preset="base", refinements=list(DEBIAS)
        )
        wanted = debiased("mini", cache, 1, words, Reading("final"))
        for grid in (0, 1):
            expected = torch.stack([maps[grid] for maps in wanted])
            assert torch.allclose(found.maps[grid].double(), expected, atol=1e-4)
    first = explain_generation(forward, 1, preset="base", refinements=list(DEBIAS))
    plainly = explain_generation(forward, 1, preset="base", refinements=[MinMax()])
    assert all(map(torch.equal, first.maps, plainly.maps))
