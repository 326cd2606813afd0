"""EAGLE against every insertion enumerated, and against its authors' code where that is given.

``CAPTUM_DCAM_EAGLE`` may name a checkout of RuoyuChen10/EAGLE.
"""

import importlib
import os
import sys
import types
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.eagle import Ranking, efficient_search, full_search
from captum_dcam.methods.superpixels import regions_of, segments, token_regions
from captum_dcam.model.words import Target

SEARCHES = {"full": full_search, "efficient": efficient_search}


def table(count, seed):
    """A probability of every set of regions, as frozensets."""
    g = np.random.default_rng(seed)
    sets = [frozenset(c) for n in range(count + 1) for c in combinations(range(count), n)]
    return dict(zip(sets, g.random(len(sets)).round(6).tolist(), strict=True))


def objective(p, kept):
    every = max(p, key=len)
    return p[frozenset(kept)] + 1 - p[every - frozenset(kept)]


def run(search, p, **settings):
    """A search's ranking, and how many sets it asked for."""
    ranking, asked = Ranking(len(max(p, key=len))), 0
    steps = search(ranking, **settings)
    sets = next(steps)
    try:
        while True:
            asked += len(sets)
            kept = [row.nonzero().flatten().tolist() for row in sets]
            sets = steps.send(torch.tensor([objective(p, k) for k in kept], dtype=torch.float64))
    except StopIteration:
        return ranking, asked


def greedy(p):
    """The order in which the best set of k regions that holds the last one grows."""
    every = max(p, key=len)
    order = []
    for size in range(1, len(every) + 1):
        holds = [s for s in p if len(s) == size and s >= set(order)]
        best = max(holds, key=lambda s: objective(p, s))
        order += best - set(order)
    return order


@given(count=st.integers(1, 7), seed=st.integers(0, 999))
@settings(max_examples=25)
def test_the_full_search_is_greedy_over_all_sets(count, seed):
    p = table(count, seed)
    found, asked = run(full_search, p)
    order = greedy(p)
    assert found.order == order and not found.back
    assert 2 * asked == count * (count + 1)
    # the authors' picture: a value that falls by |F_k - F_(k-1)|, from its lowest
    scores = [objective(p, order[:k]) for k in range(count + 1)]
    falls = np.cumsum(np.abs(np.diff(scores)))
    assert found.heights()[order].tolist() == pytest.approx(list(falls[-1] - falls))


@given(
    count=st.integers(1, 8),
    seed=st.integers(0, 999),
    scope=st.integers(1, 9),
    pending=st.integers(1, 4),
    every=st.integers(1, 4),
)
@settings(max_examples=25)
def test_the_efficient_search_ranks_each_region_once(count, seed, scope, pending, every):
    p = table(count, seed)
    found, asked = run(efficient_search, p, scope=scope, pending=pending, every=every)
    assert sorted(found.order) == list(range(count))
    full, most = run(full_search, p)
    assert asked <= most + count * pending
    if count > 1:
        assert found.front[0] == full.front[0]
        assert found.back[0] == min(range(count), key=lambda r: objective(p, [r]))
    for size, value in found.objective.items():
        assert value == pytest.approx(objective(p, found.order[:size]))
    assert set(found.objective) == set(range(1, count + 1))
    heights = found.heights()[found.order]
    assert heights[-1] == 0 and bool((heights.diff() <= 0).all())


def test_passes_of_the_efficient_search():
    """2 for the whole image, then 2 of each candidate: of 64 regions 1412, of all sets 4160."""
    ranking = Ranking(64)
    for search, passes in ((full_search, 4160), (efficient_search, 1412)):
        steps, asked = search(ranking := Ranking(64)), 0
        sets = next(steps)
        try:
            while True:
                asked += len(sets)
                sets = steps.send(torch.arange(len(sets), 0, -1.0))
        except StopIteration:
            assert 2 * asked == passes and sorted(ranking.order) == list(range(64))


def test_what_is_not_ranked_yet_lies_between_the_ends():
    half = Ranking(5, [3], [0, 4], {5: 2.0, 1: 1.5, 4: 1.75, 3: 1.0})
    assert half.order == [3, 4, 0]
    assert half.heights().tolist() == [0.0, 1.0, 1.0, 1.5, 0.25]


# -- the authors' code ---------------------------------------------------------------------------


@pytest.fixture
def authors(monkeypatch):
    """Their two searches, with a stand-in for OpenCV, which they only import."""
    folder = os.environ.get("CAPTUM_DCAM_EAGLE", "")
    if not folder or not (Path(folder) / "interpretation").is_dir():
        pytest.skip("CAPTUM_DCAM_EAGLE names no checkout of RuoyuChen10/EAGLE")
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    monkeypatch.syspath_prepend(folder)
    return {
        "full": importlib.import_module(
            "interpretation.submodular_vision"
        ).MLLMSubModularExplanationVision,
        "efficient": importlib.import_module(
            "interpretation.efficient_attribution"
        ).EfficientMLLMSubModularExplanationVision,
    }


class Toy:
    """A black box that tells which regions of a one-row image are lit."""

    device = "cpu"

    def __init__(self, p):
        self.p, self.calls = p, 0

    def __call__(self, image):
        self.calls += 1
        lit = frozenset(image[0, :, 0].nonzero().flatten().tolist())
        return torch.tensor([self.p[lit]])


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_the_authors(authors, name, seed):
    count, few = 9, {"scope": 4, "pending": 2, "every": 3} if name == "efficient" else {}
    p = table(count, seed)
    theirs = dict(
        zip(("search_scope", "pending_samples", "update_step"), few.values(), strict=False)
    )
    black_box = Toy(p)
    explainer = authors[name](black_box, **theirs)
    masks = [np.eye(count)[r].reshape(1, count, 1).astype(int) for r in range(count)]
    chosen, record = explainer(np.ones((1, count, 3)), masks)
    found, asked = run(SEARCHES[name], p, **few)
    assert found.order == [int(m.flatten().argmax()) for m in chosen]
    assert 2 * asked == black_box.calls
    scores = [found.objective[size] for size in range(1, count + 1)]
    assert record["smdl_score"] == pytest.approx(scores, abs=1e-5)


# -- on a model ----------------------------------------------------------------------------------


def task_of(forward, *positions):
    targets = [Target("", (p,), (tiny.pair(forward, p)[1],)) for p in positions]
    return AttributionTask(forward, tuple(targets))


def probability(forward, regions, kept, position):
    """On the image of which the other regions have its mean colour, one pass."""
    token = tiny.pair(forward, position)
    pixels = forward.request.pixels
    side = pixels.shape[-1] // 8
    shown = torch.isin(regions, torch.tensor(sorted(kept), dtype=torch.long)).view(8, 8)
    shown = shown.repeat_interleave(side, 0).repeat_interleave(side, 1)
    edited = torch.where(shown, pixels, pixels.mean((-2, -1), keepdim=True))
    with torch.no_grad():
        return float(forward(edited, *forward.arguments(token))[0, position].softmax(-1)[token[1]])


def test_on_a_model_it_is_the_greedy_order_of_its_probabilities(cache):
    forward = tiny.bound(cache)
    regions = regions_of(forward.request, 4, "")
    count = int(regions.max()) + 1
    every = range(count)
    with metered(forward) as cost:
        made = method("eagle", regions=4, search="full").attribute(task_of(forward, 2))
    assert cost.forwards == count * (count + 1) and not cost.backwards
    sets = [c for n in range(count + 1) for c in combinations(every, n)]
    p = {frozenset(s): probability(forward, regions, s, 2) for s in sets}
    order = greedy(p)
    values = [float(made.maps[0][0].flatten()[(regions == r).nonzero()[0, 0]]) for r in order]
    scores = [objective(p, order[:k]) for k in range(count + 1)]
    falls = np.cumsum(np.abs(np.diff(scores)))
    assert values == pytest.approx(list(falls[-1] - falls), abs=1e-5)


def test_words_share_the_images_that_both_ask_for():
    forward = tiny.bound("prefix")
    count = int(regions_of(forward.request, 5, "").max()) + 1
    made = method("eagle", regions=5, search="full")
    same = Target("again", (2,), (tiny.pair(forward, 2)[1],))
    with metered(forward) as cost:
        found = made.attribute(
            AttributionTask(forward, (*task_of(forward, 2, 6).targets, same))
        ).maps[0]
    assert cost.forwards < 2 * count * (count + 1) and torch.equal(found[0], found[2])
    for n, position in enumerate((2, 6)):
        alone = made.attribute(task_of(forward, position)).maps[0][0]
        assert tiny.relative(found[n], alone) < 1e-3


def test_a_spent_budget_leaves_the_regions_that_were_ranked():
    forward = tiny.bound("prefix")
    made = method("eagle", regions=6, search="full", batch_size=32)
    whole = made.attribute(task_of(forward, 2)).maps[0][0]
    count = len(whole.unique())
    with metered(forward, Budget(passes=2 + 2 * count + 2 * (count - 1))):
        found = made.attribute(task_of(forward, 2))
    assert not found.done.any() and f"2 of {count} regions" in found.note
    best = whole.unique().flip(0)[:2]
    assert all(
        len(found.maps[0][0][whole == value].unique()) == 1 for value in best
    ) and torch.equal(found.maps[0][0].argmax(), whole.argmax())
    with metered(forward, Budget(passes=1)):
        nothing = made.attribute(task_of(forward, 2))
    assert not nothing.maps[0].any() and "estimate" not in nothing.note


# -- superpixels ---------------------------------------------------------------------------------


def test_regions_of_tokens_cover_most_of_them():
    """Counted in pixels; two images are numbered one after the other."""
    forward = tiny.bound("prefix", images=2)
    own = [segments(image, 9, "") for image in forward.request.images[0]]
    found = token_regions(forward.request, own).view(2, 8, 8)
    assert set(found[0].flatten().tolist()).isdisjoint(found[1].flatten().tolist())
    assert found.unique().tolist() == list(range(int(found.max()) + 1))
    for regions, tokens in zip(own, found, strict=True):
        assert regions.shape == (60, 80)  # half rows of pixels make whole boxes of 15 x 10
        boxes = regions.repeat_interleave(2, 0).unflatten(0, (8, 15)).unflatten(2, (8, 10))
        names = {}
        for row in range(8):
            for column in range(8):
                best = int(boxes[row, :, column].flatten().bincount().argmax())
                assert names.setdefault(int(tokens[row, column]), best) == best
        assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"regions": 0}, "regions is 0"),
        ({"search": "fast"}, "search is 'fast'"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        method("eagle", **setting)
