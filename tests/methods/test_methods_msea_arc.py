"""MSEA and ARC (Liang et al. 2025): scales, rank-biased overlap, subtraction, each by hand."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from methods import made
from methods.test_methods_logit_lens import whole
from PIL import Image

from captum_dcam.errors import MethodError
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.msea_arc import rescaled
from captum_dcam.methods.tam import rank_biased_overlap
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.words import Target


def rbo_by_definition(a, b, p):
    """Sum over depths of p^(d-1) times the share of ids in both prefixes, weights made to sum 1."""
    total = norm = 0.0
    for d in range(1, len(a) + 1):
        total += p ** (d - 1) * len(set(a[:d]) & set(b[:d])) / d
        norm += p ** (d - 1)
    return total / norm


@pytest.mark.parametrize("p", (0.5, 0.9, 0.99))
@pytest.mark.parametrize("k", (1, 2, 7, 50))
def test_rank_biased_overlap_is_its_definition(p, k):
    g = np.random.default_rng(k)
    lists = [g.permutation(60)[:k].tolist() for _ in range(9)]
    got = rank_biased_overlap(torch.tensor(lists), torch.tensor(lists[0]), p)
    expected = [rbo_by_definition(one, lists[0], p) for one in lists]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    assert float(got[0]) == pytest.approx(1, abs=1e-12)


def test_rank_biased_overlap_of_disjoint_and_of_reversed_lists():
    lists = torch.tensor([[4, 5, 6], [3, 2, 1]])
    got = rank_biased_overlap(lists, torch.tensor([1, 2, 3]), 0.9)
    assert got[0] == 0
    # reversed: nothing at depth 1, one of two at depth 2, all at depth 3
    assert float(got[1]) == pytest.approx((0.9 * 0.5 + 0.81) / (1 + 0.9 + 0.81))
    assert rank_biased_overlap(lists[:0], lists[0], 0.9).shape == (0,)


def pasted(picture, scale):
    size = [max(1, round(s * scale)) for s in picture.size]
    canvas = Image.new("RGB", picture.size)
    canvas.paste(picture.resize(size, Image.Resampling.BICUBIC), (0, 0))
    return canvas


def lens_at(forward, scale, position, token, score="commit"):
    """(8, 8) logits at a scale (a power of 2 of the grid's side) from the whole sequence."""
    adapter, step = forward.adapter, forward.trajectory.step_of(0, position, score)
    request = adapter.prepare([[pasted(forward.request.images[0][0], scale)]], [tiny.PROMPT])
    other = DenoisingForward(adapter, 1)
    other.bind(request, forward.trajectory)
    grid = whole(other, step)[:64, token].view(8, 8)
    side = int(8 * scale)
    return F.interpolate(
        grid[None, None, :side, :side], size=(8, 8), mode="bilinear", align_corners=False
    )[0, 0]


@pytest.mark.parametrize("aggregate", ("mean", "max"))
def test_msea_is_the_mean_or_maximum_of_the_lens_at_every_scale(cache, aggregate):
    forward = tiny.bound(cache)
    target = made.targets(forward, (3,))[0]
    scales = (0.5, 0.75, 1.0)
    found = method("msea", aggregate=aggregate).attribute(AttributionTask(forward, (target,)))
    parts = torch.stack([lens_at(forward, s, 3, target.token_ids[0]) for s in scales])
    expected = parts.mean(0) if aggregate == "mean" else parts.amax(0)
    assert tiny.relative(found.maps[0][0], expected) < 1e-4
    assert not torch.allclose(parts[0], parts[2], atol=1e-2)


def test_one_scale_is_the_logit_lens(cache):
    task = made.task_of(cache)
    one = method("msea", scales=(1.0,)).attribute(task).maps[0]
    assert torch.equal(one, method("logit_lens").attribute(task).maps[0])


def test_both_subtract_aggregated_maps(cache):
    """Eq. 9 on Eq. 5: the whole with one scale of its own is ARC, with several it is not."""
    task = made.task_of(cache, (0, 5))
    alone = method("msea_arc", scales=(1.0,)).attribute(task).maps[0]
    assert torch.equal(alone, method("arc").attribute(task).maps[0])
    both = method("msea_arc").attribute(task).maps[0]
    assert torch.equal(both, method("arc", msea=True).attribute(task).maps[0])
    assert not torch.allclose(both, alone, atol=1e-3)


def test_a_word_of_several_tokens_is_their_sum_before_the_filter(cache):
    forward = tiny.bound(cache)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    for name in ("msea", "arc"):
        maps = (
            method(name, filter=0).attribute(AttributionTask(forward, (first, last, both))).maps[0]
        )
        assert torch.allclose(maps[2], maps[0] + maps[1], atol=1e-5)


def any_size(forward, monkeypatch, side=None):
    """The tiny family as if it kept sizes: pictures of half the size get a grid of half the side
    (its real tokens are averaged, which only the layout sees)."""
    adapter = forward.adapter
    prepare = adapter.prepare
    seen = []

    def sized(images, prompts):
        seen.append(images[0][0].size)
        request = prepare(images, prompts)
        return request if side is None else side(request)

    monkeypatch.setattr(type(adapter), "any_size", True)
    monkeypatch.setattr(adapter, "prepare", sized)
    return seen


def test_models_that_keep_sizes_get_the_resized_picture(monkeypatch):
    forward = tiny.bound("prefix")
    seen = any_size(forward, monkeypatch)
    method("msea", scales=(0.5, 1.0, 1.25)).attribute(
        AttributionTask(forward, made.targets(forward))
    )
    assert seen == [(40, 30), (100, 75)]  # the picture is 80 × 60


def test_another_number_of_grids_is_refused(monkeypatch):
    forward = tiny.bound("prefix")

    def more(request):
        grids = (uniform_grid(0, (4, 8), (30, 40)), uniform_grid(32, (4, 8), (30, 40)))
        object.__setattr__(request, "layout", Layout(grids, request.layout.prefix_length))
        return request

    any_size(forward, monkeypatch, more)
    with pytest.raises(MethodError, match="2 grids of image tokens, at scale 1 1"):
        method("msea").attribute(AttributionTask(forward, made.targets(forward)))


def test_maps_of_another_grid_come_back_bilinearly(monkeypatch):
    forward = tiny.bound("prefix")

    def smaller(request):
        grid = uniform_grid(0, (4, 6), request.layout.grids[0].image_size)
        object.__setattr__(request, "layout", Layout((grid,), request.layout.prefix_length))
        return request

    any_size(forward, monkeypatch, smaller)
    _, back = rescaled(forward, 0.5)
    values = torch.rand(4, 6, dtype=torch.float64)
    ((number, rows, columns),) = back.ways[0]
    assert number == 0
    expected = F.interpolate(values[None, None], size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(rows @ values @ columns.T, expected[0, 0])
    assert torch.allclose(rows.sum(1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("scale", (0.01, 0.1, 0.3, 0.9))
def test_any_scale_gives_weights_that_sum_to_one(scale):
    _, back = rescaled(tiny.bound("prefix"), scale)
    ((_, *matrices),) = back.ways[0]
    for matrix in matrices:
        assert matrix.min() >= 0 and torch.allclose(matrix.sum(1), torch.ones(8).double())


def test_the_rescaled_forward_keeps_answer_and_steps(cache):
    forward = tiny.bound(cache, batch=2, prompts=["describe the image .", "image"])
    from captum_dcam.model.forward import single

    one = single(forward, 1)  # padded in the batch, not in the new request
    other, _ = rescaled(one, 0.5)
    assert torch.equal(other.trajectory.tokens, one.trajectory.tokens)
    shorter = one.request.layout.prefix_length - other.request.layout.prefix_length
    assert shorter == 3 and not other.trajectory.kept
    first = one.trajectory.lengths[0] - other.trajectory.lengths[0]
    last = one.trajectory.lengths[-1] - other.trajectory.lengths[-1]
    assert (first, last) == (3, 0 if cache == "prefix" else 3)
    assert other.trajectory.calls[0].valid


def test_scales_above_one_need_a_model_that_keeps_sizes():
    with pytest.raises(MethodError, match=r"scale 1.25 does not fit the fixed input of mini"):
        method("msea", scales=(1.0, 1.25)).check(made.task_of())
    method("arc", scales=(1.25,)).check(made.task_of())  # not used there


def test_passes_are_as_few_as_scales_and_states():
    for cache, expected in (("prefix", 3), ("none", 3 * 4)):
        task = made.task_of(cache, range(8), steps=4)
        with metered(task.forward) as cost:
            method("msea").attribute(task)
        assert (cost.forwards, cost.backwards) == (expected, 0)


def test_a_budget_leaves_the_words_before_it():
    task = made.task_of("none", (0, 1))
    with metered(task.forward, Budget(passes=4)):
        found = method("msea").attribute(task)
    assert found.done.tolist() == [True, False] and not found.maps[0][1].any()


@pytest.mark.parametrize(
    "settings",
    (
        {"scales": ()},
        {"scales": (0.0, 1.0)},
        {"aggregate": "sum"},
        {"k": 0},
        {"k": True},
        {"p": 1.0},
        {"order": "x"},
        {"filter": 4},
    ),
    ids=str,
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="expected"):
        method("msea_arc", **settings)
