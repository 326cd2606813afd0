"""Captum's pixel methods against loops that paint pixels; baselines, groups, padding, shapes."""

import functools
import math

import pytest
import tiny
import torch

from captum_dcam.errors import MethodError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods import captum_common as common
from captum_dcam.model.words import Target


@functools.cache
def bound(cache, images=1):
    return tiny.bound(cache, images=images)


def task_of(forward, position):
    return AttributionTask(
        forward, (Target("word", (position,), (tiny.pair(forward, position)[1],)),)
    )


def logit(forward, pixels, position):
    """By the model itself, on the canvas of the step that committed the token."""
    canvas = forward.trajectory.states[0][forward.trajectory.commit_step[0, position]]
    ids = torch.cat((forward.request.extras[0], canvas), 1)
    split = (forward.request.layout.prefix_length, canvas.shape[1])
    segments = split if forward.trajectory.cache == "prefix" else None
    with torch.no_grad():
        out = forward.model(ids, pixels, segments=segments).logits
    return float(out[0, split[0] + position, tiny.pair(forward, position)[1]])


def paint_of(pixels, kind, inside=None):
    """The baseline picture, channel by channel."""
    inside = torch.ones_like(pixels, dtype=torch.bool) if inside is None else inside
    out = pixels.clone()
    for i in range(pixels.shape[1]):
        for c in range(3):
            own = inside[0, i, c]
            if own.any():
                value = 0.0 if kind == "zero" else float(pixels[0, i, c][own].mean())
                out[0, i, c][own] = value
    return out


@pytest.mark.parametrize("baseline", common.BASELINES)
@pytest.mark.parametrize("patch", (3, 8))
def test_feature_ablation_by_hand(cache, baseline, patch):
    forward = bound(cache, 2)
    x, expected = forward.request.pixels, torch.zeros(2, 8, 8)
    paint, before = paint_of(x, baseline), logit(forward, x, 5)
    for i in range(2):
        for r in range(0, 8, patch):
            for c in range(0, 8, patch):
                where = (0, i, slice(None), slice(8 * r, 8 * (r + patch)))
                where = (*where, slice(8 * c, 8 * (c + patch)))
                painted = x.clone()
                painted[where] = paint[where]
                fall = before - logit(forward, painted, 5)
                expected[i, r : r + patch, c : c + patch] = fall
    made = method("feature_ablation", patch=patch, baseline=baseline, batch=5)
    found = torch.cat(made.attribute(task_of(forward, 5)).maps)
    assert tiny.relative(found, expected) < 1e-3


@pytest.mark.parametrize(("patch", "stride"), [(3, 2), (2, 2), (20, 5)])
def test_occlusion_by_hand(cache, patch, stride):
    forward = bound(cache, 2)
    x = forward.request.pixels
    paint, before = paint_of(x, "mean"), logit(forward, x, 5)
    total, count = torch.zeros(2, 64, 64), torch.zeros(2, 64, 64)
    side, step = min(8 * patch, 64), 8 * stride
    starts = range(0, 64 - side + step * (side < 64) + (side == 64), step)
    for i in range(2):
        for y in starts:
            for x0 in starts:
                if y >= 64 or x0 >= 64:
                    continue
                where = (slice(y, y + side), slice(x0, x0 + side))
                painted = x.clone()
                painted[0, i][:, where[0], where[1]] = paint[0, i][:, where[0], where[1]]
                total[i][where] += before - logit(forward, painted, 5)
                count[i][where] += 1
    expected = (total / count).unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4))
    found = method("occlusion", patch=patch, stride=stride).attribute(task_of(forward, 5)).maps
    assert tiny.relative(torch.cat(found), expected) < 1e-3


@pytest.mark.parametrize("baseline", common.BASELINES)
def test_integrated_gradients_add_up_to_the_fall_of_the_logit(cache, baseline):
    forward = bound(cache, 2)
    x = forward.request.pixels
    fall = logit(forward, x, 3) - logit(forward, paint_of(x, baseline), 3)
    made = method("integrated_gradients", steps=120, batch=60, baseline=baseline)
    maps = made.attribute(task_of(forward, 3)).maps
    assert abs(fall) > 1e-3
    assert math.isclose(sum(float(m.sum()) for m in maps) * 3 * 64, fall, rel_tol=2e-2)


@pytest.mark.parametrize("name", ("shapley_value_sampling", "kernel_shap"))
def test_shapley_values_add_up_to_the_fall_of_the_logit(cache, name):
    if name == "kernel_shap":
        pytest.importorskip("sklearn", exc_type=ImportError)
    forward = bound(cache)
    x = forward.request.pixels
    fall = logit(forward, x, 3) - logit(forward, paint_of(x, "mean"), 3)
    found = method(name, patch=4).attribute(task_of(forward, 3)).maps[0][0]
    assert math.isclose(float(found[::4, ::4].sum()), fall, rel_tol=1e-2)
    blocks = found.unflatten(0, (2, 4)).unflatten(2, (2, 4))
    assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))


def test_shapley_values_are_the_mean_over_all_orders():
    from itertools import permutations

    forward = bound("none")
    x = forward.request.pixels
    paint, worth = paint_of(x, "mean"), {}
    corners = [(r, c) for r in (0, 32) for c in (0, 32)]
    for bits in range(16):
        shown = paint.clone()
        for k, (r, c) in enumerate(corners):
            if bits >> k & 1:
                shown[..., r : r + 32, c : c + 32] = x[..., r : r + 32, c : c + 32]
        worth[bits] = logit(forward, shown, 3)
    exact = torch.zeros(4)
    for order in permutations(range(4)):
        bits = 0
        for k in order:
            exact[k] += (worth[bits | 1 << k] - worth[bits]) / 24
            bits |= 1 << k
    made = method("shapley_value_sampling", patch=4, batch=50, permutations=100)
    found = made.attribute(task_of(forward, 3)).maps[0][0, ::4, ::4]
    assert tiny.relative(found.flatten(), exact) < 0.1


# -- pixels that belong to no token -------------------------------------------------------------


@pytest.fixture
def padded(monkeypatch):
    """A picture whose last token row and column, and first pixel, count as padding."""
    forward = tiny.bound("none")
    owners = forward.adapter.pixel_tokens(forward.request).clone()
    owners[..., 56:, :] = owners[..., 56:] = -1
    owners[..., :1, :1] = -1
    monkeypatch.setattr(forward.adapter, "pixel_tokens", lambda _request: owners)
    return forward, owners


@pytest.mark.parametrize("baseline", common.BASELINES)
def test_padding_is_never_painted(padded, baseline):
    forward, owners = padded
    x, inside = forward.request.pixels, owners >= 0
    paint = paint_of(x, baseline, inside)
    case = common.CaptumArguments(task_of(forward, 5), tiny.pair(forward, 5))
    assert torch.allclose(common.baseline_of(case, baseline), paint, atol=1e-6)
    expected, before = torch.zeros(8, 8), logit(forward, x, 5)
    for r in range(0, 7, 3):
        for c in range(0, 7, 3):
            part = torch.zeros_like(inside)
            part[..., 8 * r : 8 * r + 24, 8 * c : 8 * c + 24] = True
            fall = before - logit(forward, torch.where(part & inside, paint, x), 5)
            expected[r : r + 3, c : c + 3] = fall
    expected[7:] = 0
    expected[:, 7:] = 0
    made = method("feature_ablation", baseline=baseline, patch=3)
    found = made.attribute(task_of(forward, 5)).maps[0][0]
    assert tiny.relative(found, expected) < 1e-3


@pytest.mark.parametrize(
    "name", ("saliency", "integrated_gradients", "occlusion", "shapley_value_sampling", "lime")
)
def test_padding_is_in_no_map(padded, name):
    if name == "lime":
        pytest.importorskip("sklearn", exc_type=ImportError)
    made = method(name, **({"samples": 30} if name == "lime" else {}))
    made.check(task_of(padded[0], 5))
    found = made.attribute(task_of(padded[0], 5)).maps[0][0]
    assert found[:7, :7].any() and not found[7:].any() and not found[:, 7:].any()


def test_pixels_that_are_no_image(monkeypatch):
    forward = tiny.bound("none")
    owners = (torch.arange(3 * 64 * 64) % 64).view(1, 1, 3, 64, 64)  # token by element
    monkeypatch.setattr(forward.adapter, "pixel_tokens", lambda _request: owners)
    task = task_of(forward, 5)
    for name in ("occlusion", "feature_ablation", "saliency", "integrated_gradients"):
        made = method(name)
        made.check(task)
        assert made.attribute(task).maps[0].any()


@pytest.mark.parametrize("images", (1, 2))
@pytest.mark.parametrize("settings", ({}, {"patch": 3, "stride": 2}, {"patch": 20, "stride": 20}))
def test_occlusion_of_tokens_is_occlusion_of_their_pixels(monkeypatch, images, settings):
    """Where the pixel tensor has no rows and columns the window slides over tokens instead."""
    from captum_dcam.methods import captum_methods

    forward = tiny.bound("none", images=images)
    made = method("occlusion", baseline="zero", **settings)
    expected = made.attribute(task_of(forward, 5)).maps
    monkeypatch.setattr(captum_methods, "token_size", lambda *_: None)
    found = made.attribute(task_of(forward, 5)).maps
    for one, two in zip(found, expected, strict=True):
        assert tiny.relative(one, two) < 1e-4


def test_without_pixel_tokens(monkeypatch):
    from captum_dcam.model.adapter import Adapter

    forward = tiny.bound("none")
    monkeypatch.setattr(type(forward.adapter), "pixel_tokens", Adapter.pixel_tokens)
    task = task_of(forward, 5)
    for name, settings in (
        ("saliency", {}),
        ("lime", {}),
        ("noise_tunnel", {}),
        ("layer_integrated_gradients", {"baseline": "mean"}),
    ):
        with pytest.raises(MethodError, match="mini does not tell which image token"):
            method(name, **settings).check(task)
    for name, settings in (
        ("layer_integrated_gradients", {"steps": 2}),
        ("layer_gradient_shap", {"samples": 2}),
        ("layer_feature_ablation", {"patch": 4}),
        ("noise_tunnel", {"base": "layer_grad_cam", "samples": 2}),
    ):
        made = method(name, **settings)
        made.check(task)
        assert made.attribute(task).maps[0].any()


# -- the parts ----------------------------------------------------------------------------------


def test_groups_at_the_edges_are_smaller():
    assert common.groups_of([(3, 5)], 2).view(3, 5).tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
    ]
    assert common.groups_of([(2, 2), (1, 3)], 2).tolist() == [0, 0, 0, 0, 1, 1, 2]


def test_token_size():
    tokens = torch.arange(6).view(2, 3)
    picture = tokens.repeat_interleave(4, 0).repeat_interleave(5, 1)
    size = functools.partial(common.token_size, shapes=[(2, 3)])
    assert size(picture[None, None].expand(1, 3, -1, -1)) == (4, 5)
    border = torch.full((10, 17), -1)
    border[1:9, 2:] = picture
    assert size(border[None, None]) == (4, 5)
    assert size(torch.stack((border, border * 0 - 1))[None]) == (4, 5)  # an empty tile
    assert size(picture[None, 2:, :7][None]) == (4, 5)  # cut off
    assert size(picture.T[None, None]) is None  # columns before rows
    assert size(tokens.view(1, 6, 1).expand(1, 6, 20)) is None  # one row of values a token
    assert size(picture) is None
    two = torch.cat((picture, picture + 6), 1)[None, None]
    assert common.token_size(two, [(2, 3), (2, 3)]) is None  # two pictures side by side
    column = torch.arange(3).view(1, 3, 1).expand(1, 3, 20)
    assert common.token_size(column, [(3, 1)]) == (1, 20)
