"""Norms whose statistics are constants in the backward pass: the invariant that they repair, in
every family, and the gradient itself, against finite differences and written-out norms."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import nn
from torch.overrides import TorchFunctionMode

from captum_dcam.attribution import DiffusionCAM
from captum_dcam.errors import DcamError, MethodError
from captum_dcam.maps import Reading, word_maps
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.norms import constant_norms, passing
from captum_dcam.model.words import Target
from captum_dcam.testing.__main__ import cases_in
from captum_dcam.testing.case import explained, target_at
from tests import tiny

CASES = {c.name: c for c in cases_in(Path(__file__).parents[1] / "adapters" / "cases")}


def cosines(row):
    """|cos| of state and gradient of every image token that has a gradient."""
    found = []
    for f, g in zip(row.features, row.gradients, strict=True):
        f, g = f.double(), g.double()
        size = f.norm(dim=0) * g.norm(dim=0)
        found.append(((f * g).sum(0) / size)[size > 0].flatten())
    return torch.cat(found).abs()


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_blind_to_the_length_of_a_state_and_constant_norms_mend_it(name):
    """Behind the deepest block one pre-norm block alone reads the image's states, so that the
    gradient is orthogonal to each of them (Euler)."""
    case = CASES[name]
    forward = case.bound(case.make(torch.float32))
    forward = forward.again(forward.adapter.deepest_block)
    target = target_at(forward, explained(forward)[0])
    exact, constant = (
        target_gradients(forward, [target], backward=backward)[0]
        for backward in ("exact", "constant_norms")
    )
    assert float(cosines(exact).max()) < 0.002 and float(cosines(exact).mean()) < 2e-4
    assert float(cosines(constant).mean()) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(exact.features, constant.features, strict=True))


class _Frozen(TorchFunctionMode):
    """Norms' statistics of a first run, given again in later ones."""

    def __init__(self):
        super().__init__()
        self.first, self.again = [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "rsqrt":
            return result
        if self.again is None:
            self.first.append(result)
            return result
        return next(self.again)


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_the_gradient_is_that_of_a_model_with_frozen_statistics(cache):
    """Central differences of a replay whose norms use the statistics of the undisturbed one."""
    forward = tiny.bound(cache, dtype=torch.float64)
    pair = tiny.pair(forward, 2)
    target = Target("word", (pair[0],), (pair[1],))
    (row,) = target_gradients(forward, [target], backward="constant_norms")
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(row.features[0].shape, generator=generator, dtype=torch.float64)
    step = torch.tensor([forward.trajectory.step_of(0, 2, "commit")])
    frozen, values = _Frozen(), []
    for scale in (0.0, 1e-5, -1e-5):
        with forward.edited(lambda f, _, scale=scale: f + scale * way), torch.no_grad(), frozen:
            logits = forward.replay(torch.tensor([0]), step)
        values.append(float(logits[0, 2, pair[1]]))
        frozen.again = iter(frozen.first)
    found = float((row.gradients[0] * way).sum())
    assert found == pytest.approx((values[1] - values[2]) / 2e-5, rel=1e-5)
    (exact,) = target_gradients(forward, [target])
    assert abs(float((exact.gradients[0] * way).sum()) - found) > 0.01 * abs(found)


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_captums_layer_methods_take_it_as_diffusion_cam_does(cache):
    forward = tiny.bound(cache)
    pair, pixels = tiny.pair(forward, 2), forward.request.pixels

    def captums():
        cam = LayerGradCam(forward, forward.tap)
        arguments = forward.arguments(pair, "final")
        return cam.attribute(pixels, pair, additional_forward_args=arguments)

    with constant_norms():
        theirs = captums()
    ours = DiffusionCAM(forward, preset="base").attribute(pixels, pair, backward="constant_norms")
    assert torch.equal(theirs.relu(), ours) and bool(ours.any())
    assert not torch.equal(captums(), theirs)  # nothing is left behind


def test_words_maps_examples_alone_and_together_are_one():
    forward = tiny.bound("prefix", batch=2)
    reading = Reading(backward="constant_norms")
    targets = [Target("word", *zip(tiny.pair(forward, 2, b), strict=True)) for b in (0, 1)]
    (together,) = word_maps(forward, targets, (0, 1), reading)
    for b in (0, 1):
        (alone,) = word_maps(forward, targets[b : b + 1], (b,), reading)
        assert torch.allclose(together[b], alone[0], atol=1e-6)
    (exact,) = word_maps(forward, targets, (0, 1), Reading())
    assert not torch.allclose(together, exact, atol=1e-3)


@pytest.mark.parametrize("name", ("finer_cam", "layer_grad_cam", "input_x_gradient"))
def test_methods_that_need_gradients_take_the_tasks(name):
    forward = tiny.bound("prefix")
    word = Target("word", *zip(tiny.pair(forward, 2), strict=True))
    exact = method(name).attribute(AttributionTask(forward, (word,)))
    own = method(name).attribute(AttributionTask(forward, (word,), backward="constant_norms"))
    assert not torch.allclose(exact.maps[0], own.maps[0], rtol=1e-2)
    assert bool(own.maps[0].isfinite().all())


@pytest.mark.parametrize("name", ("attn_lrp", "diffusion_cam_paper", "diffusion_cam", "tam"))
def test_methods_with_rules_a_preset_or_no_gradients_keep_their_own(name):
    forward = tiny.bound("prefix")
    word = Target("word", *zip(tiny.pair(forward, 2), strict=True))
    exact = method(name).attribute(AttributionTask(forward, (word,)))
    own = method(name).attribute(AttributionTask(forward, (word,), backward="constant_norms"))
    assert torch.equal(exact.maps[0], own.maps[0])


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
WEIGHT, BIAS = X[0] + 2, X[1]


def like(x):
    return {"weight": WEIGHT.to(x.dtype), "bias": BIAS.to(x.dtype), "eps": 1e-6}


NORMS = {
    "written with rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "written with sqrt": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    "written with a power": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True), -0.5),
    "written with **": lambda x: x / ((x * x).mean(-1, keepdim=True)) ** 0.5,
    "written with std": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "written with norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "rms_norm": lambda x: F.rms_norm(x, (6,), WEIGHT.to(x.dtype), 1e-6),
    "layer_norm": lambda x: F.layer_norm(x, (6,), *like(x).values()),
    "by keywords": lambda x: F.layer_norm(input=x, normalized_shape=(6,), **like(x)),
    "nn.LayerNorm": lambda x: nn.LayerNorm(6, dtype=x.dtype)(x),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_every_way_to_write_a_norm_is_linear_in_its_input(name, dtype):
    """With constant statistics a norm is linear but for its bias: J(x) x is its output without."""
    if name == "rms_norm" and not hasattr(F, "rms_norm"):
        pytest.skip("torch before 2.4 has no fused rms_norm")
    x, ramp = X.to(dtype).requires_grad_(), torch.arange(1.0, 25).view(4, 6)
    with constant_norms():
        out = NORMS[name](x)
    (gradient,) = torch.autograd.grad((out.float() * ramp).sum(), x)
    bias = BIAS if name in ("layer_norm", "by keywords") else torch.zeros(6)
    expected = float(((out.detach().float() - bias) * ramp).sum())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert float((gradient.float() * X).detach().sum()) == pytest.approx(expected, rel=tolerance)
    assert torch.equal(out.detach(), NORMS[name](X.to(dtype)))  # the forward is as it was


def test_where_no_norm_is_seen_it_says_so():
    with pytest.raises(MethodError, match="no norm was seen"):
        with constant_norms():
            torch.ones(3).requires_grad_().sum()
    with pytest.raises(DcamError, match="backward is 'constant': expected one of"):
        with passing("constant"):
            pass
    with pytest.raises(ZeroDivisionError), constant_norms():  # another error is not hidden
        raise ZeroDivisionError


def test_settings_are_refused_by_name():
    with pytest.raises(DcamError, match="backward is 'norms': expected one of"):
        Reading(backward="norms")
    with pytest.raises(DcamError, match="'norms'"):
        method("diffusion_cam", backward="norms")
    with pytest.raises(DcamError, match="backward is 'norms': expected one of"):
        AttributionTask(tiny.bound("prefix"), (), backward="norms")
