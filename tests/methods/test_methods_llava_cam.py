"""LLaVA-CAM / Smooth Grad-CAM++: formula by loops, noise by hand, budget, clean case."""

import pytest
import tiny
import torch
from methods import made

from captum_dcam.maps import plus_plus
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.llava_cam import TOKENS_AT_ONCE, smooth_plus_plus
from captum_dcam.model import gradients as vjp
from captum_dcam.model.words import Target
from captum_dcam.refine import min_max


def by_loops(features, d1, d2, d3):
    channels, h, w = features.shape
    out = torch.zeros(h, w, dtype=torch.float64)
    for c in range(channels):
        total, weight = float(features[c].sum()), 0.0
        for i in range(h):
            for j in range(w):
                below = 2 * float(d2[c, i, j]) + float(d3[c, i, j]) * total
                alpha = float(d2[c, i, j]) / below if below else 0.0
                weight += alpha * max(float(d1[c, i, j]), 0.0)
        out += weight * features[c]
    return out


def test_the_formula_is_the_loop():
    g = torch.Generator().manual_seed(0)
    features, *grads = torch.randn(4, 5, 3, 4, generator=g, dtype=torch.float64)
    grads[0][1] = 0
    d1 = torch.stack(grads).mean(0)
    powers = (d1, torch.stack(grads).square().mean(0), (torch.stack(grads) ** 3).mean(0))
    assert tiny.relative(smooth_plus_plus(features, powers), by_loops(features, *powers)) < 1e-10


def test_without_gradient_there_is_no_map():
    zero = torch.zeros(2, 3, 3)
    assert not smooth_plus_plus(torch.randn(2, 3, 3), (zero, zero, zero)).any()


@pytest.mark.parametrize("score", ("commit", "final", "teacher"))
@pytest.mark.parametrize("position", (0, 3, 7))
def test_without_noise_it_is_grad_cam_plus_plus(cache, score, position):
    forward = tiny.bound(cache)
    task = AttributionTask(forward, made.targets(forward, (position,)), score)
    found = method("llava_cam", samples=1, std=0.0).attribute(task).maps[0][0]
    (row,) = vjp.target_gradients(forward, task.targets, score=score)
    assert tiny.relative(found, plus_plus(row.features[0], row.gradients[0])) < 1e-4


@pytest.mark.parametrize("images", (1, 2))
def test_it_is_the_formula_on_the_noisy_copies(cache, images):
    """Noise drawn again from the same seed, gradients from Captum's forward, one copy at a time."""
    forward = tiny.bound(cache, images=images)
    targets = made.targets(forward, (1, 6))
    generator = torch.Generator().manual_seed(5)
    task = AttributionTask(forward, targets, generator=generator)
    found = method("llava_cam", samples=3, std=0.2).attribute(task)
    again = torch.Generator().manual_seed(5)
    pixels = forward.request.pixels
    spread = 0.2 * float(pixels.max() - pixels.min())
    copies = [pixels + spread * torch.randn(pixels.shape, generator=again) for _ in range(3)]
    for n, target in enumerate(targets):
        (position,), (token,) = target.positions, target.token_ids
        powers, clean = [], None
        for copy in (pixels, *copies):
            seen = []
            handle = forward.tap.register_forward_pre_hook(lambda _m, maps, s=seen: s.append(maps))
            logits = forward(copy, *task.arguments(position))
            handle.remove()
            grads = torch.autograd.grad(logits[0, position, token], seen[0])
            if clean is None:
                clean = [m[0].detach() for m in seen[0]]
            else:
                powers.append([g[0] for g in grads])
        for grid in range(images):
            stack = torch.stack([p[grid] for p in powers])
            means = (stack.mean(0), stack.square().mean(0), (stack**3).mean(0))
            assert tiny.relative(found.maps[grid][n], smooth_plus_plus(clean[grid], means)) < 1e-3


def test_a_word_of_several_tokens_is_the_sum_of_their_maps(cache):
    forward = tiny.bound(cache)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    maps = (
        method("llava_cam", samples=2)
        .attribute(AttributionTask(forward, (first, last, both)))
        .maps[0]
    )
    assert tiny.relative(maps[2], maps[0] + maps[1]) < 1e-4


def test_words_in_several_groups_see_the_same_copies(monkeypatch):
    from captum_dcam.methods import llava_cam

    maps = []
    for at_once in (TOKENS_AT_ONCE, 2):
        monkeypatch.setattr(llava_cam, "TOKENS_AT_ONCE", at_once)
        maps.append(method("llava_cam").attribute(made.task_of("none", range(5))).maps[0])
    assert tiny.relative(maps[0], maps[1]) < 1e-4


def test_the_threshold_zeroes_low_values_of_the_normalised_map():
    raw = method("llava_cam").attribute(made.task_of(positions=(0, 3))).maps[0]
    cut = method("llava_cam", threshold=0.4).attribute(made.task_of(positions=(0, 3))).maps[0]
    scaled = min_max(raw)
    assert torch.allclose(cut, scaled * (scaled >= 0.4)) and cut.max() == 1
    assert not cut[(cut > 0) & (cut < 0.4)].numel()


def test_cost_is_a_pass_a_copy_and_one_for_the_clean_picture():
    task = made.task_of("prefix", (0, 3))
    with metered(task.forward) as cost:
        method("llava_cam").attribute(task)
    assert cost.forwards == 9


def test_a_budget_leaves_an_estimate_and_says_so():
    task = made.task_of("prefix", (0, 3))
    with metered(task.forward, Budget(passes=4)):
        found = method("llava_cam").attribute(task)
    assert found.done.tolist() == [False, False] and found.maps[0].any()
    assert "words 0 to 1 are estimates from 3 copies" in found.note
    task = made.task_of("prefix", (0, 3))
    with metered(task.forward, Budget(passes=1)):
        found = method("llava_cam").attribute(task)
    assert not found.maps[0].any() and found.note == "budget of 1 forward passes exhausted"


@pytest.mark.parametrize(
    "settings", ({"samples": 0}, {"samples": True}, {"std": -1.0}, {"threshold": 2.0}), ids=str
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="expected"):
        method("llava_cam", **settings)
