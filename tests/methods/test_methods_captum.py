"""Captum's methods: each against Captum called by hand on a forward that this file wires itself."""

import functools
import math

import pytest
import tiny
import torch
from captum import attr
from torch import nn

from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods import captum_common as common
from captum_dcam.methods.base import seeded
from captum_dcam.methods.captum_methods import bases
from captum_dcam.model.words import Target

SMALL = {  # settings that make a test quick
    "layer_integrated_gradients": {"steps": 4, "batch": 3},
    "internal_influence": {"steps": 4, "batch": 3},
    "layer_conductance": {"steps": 4, "batch": 3},
    "layer_gradient_shap": {"samples": 3},
    "integrated_gradients": {"steps": 4, "batch": 3},
    "gradient_shap": {"samples": 3},
    "shapley_value_sampling": {"permutations": 2},
    "kernel_shap": {"samples": 16},
    "lime": {"samples": 16, "alpha": 0.001},
}


def small(name, **settings):
    if name in ("kernel_shap", "lime"):
        pytest.importorskip("sklearn", exc_type=ImportError)
    return method(name, **{**SMALL.get(name, {}), **settings})


@functools.cache
def bound(cache, images=1, layer=1):
    return tiny.bound(cache, images=images, layer=layer)


def task_of(forward, *positions, seed=0, score="commit"):
    tokens = tuple(int(forward.trajectory.tokens[0, p]) for p in positions)
    generator = torch.Generator().manual_seed(seed)
    return AttributionTask(forward, (Target("word", positions, tokens),), score, generator)


class Same(nn.Module):
    def forward(self, *maps):
        return maps[0] if len(maps) == 1 else maps


class Opened(nn.Module):
    """Pixels and canvas to the response's logits in one run of the model, opened at a block."""

    def __init__(self, forward, fill=None):
        super().__init__()
        self.model, self.layer, self.fill = forward.model, forward.layer, fill
        self.ids = forward.request.extras[0]
        self.cached = forward.trajectory.cache == "prefix"
        self.image = Same()

    def open(self, _module, _args, output):
        hidden, count = output[0], self.ids.eq(self.model.config.image_token_id).sum()
        maps = hidden[:, :count].transpose(1, 2).unflatten(2, (-1, tiny.SIDE, tiny.SIDE)).unbind(2)
        maps = self.image(*maps)
        maps = maps if isinstance(maps, tuple) else (maps,)
        if self.fill is not None:
            maps = self.fill(maps)
        flat = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        return torch.cat((flat, hidden[:, count:]), 1), output[1]

    def forward(self, pixels, canvas):
        ids = torch.cat((self.ids.expand(len(canvas), -1), canvas), 1)
        split = (self.ids.shape[1], canvas.shape[1])
        handle = self.model.layers[self.layer].register_forward_hook(self.open)
        try:
            segments = split if self.cached else None
            return self.model(ids, pixels, segments=segments).logits[:, split[0] :]
        finally:
            handle.remove()


def canvas_of(forward, position):
    return forward.trajectory.states[0][forward.trajectory.commit_step[0, position]]


def mean_colour(pixels):
    return pixels.mean((-2, -1), keepdim=True).expand_as(pixels).clone()


def grids(values):
    values = values if isinstance(values, tuple) else (values,)
    return [v.detach()[0].sum(0) for v in values]


def tokens(values):
    """Mean of pixel values (1, images, 3, H, W) over the 8 × 8 pixels of a token."""
    cells = values.detach()[0].unflatten(-1, (tiny.SIDE, 8)).unflatten(-3, (tiny.SIDE, 8))
    return list(cells.mean((1, 3, 5)))


def squares(images, patch):
    """Group of every token, counted on over the pictures, by loops."""
    number, out = {}, torch.zeros(images, tiny.SIDE, tiny.SIDE, dtype=torch.long)
    for i in range(images):
        for y in range(tiny.SIDE):
            for x in range(tiny.SIDE):
                out[i, y, x] = number.setdefault((i, y // patch, x // patch), len(number))
    return out


def in_pixels(groups):
    """(1, images, 3, H, W), in one piece of memory as Captum wants it."""
    wide = groups.repeat_interleave(8, 1).repeat_interleave(8, 2)[None, :, None]
    return wide.repeat(1, 1, 3, 1, 1)


PATH = {"n_steps": 4}
LAYER_CALLS = {
    "layer_grad_cam": (attr.LayerGradCam, lambda x: {}),
    "layer_gradient_x_activation": (attr.LayerGradientXActivation, lambda x: {}),
    "layer_integrated_gradients": (attr.LayerIntegratedGradients, lambda x: PATH),
    "internal_influence": (attr.InternalInfluence, lambda x: PATH),
    "layer_conductance": (attr.LayerConductance, lambda x: PATH),
    "layer_gradient_shap": (
        attr.LayerGradientShap,
        lambda x: {"baselines": x * 0, "n_samples": 3, "stdevs": 0.1 * float(x.max() - x.min())},
    ),
}
PIXEL_CALLS = {
    "saliency": (attr.Saliency, lambda x: {}),
    "input_x_gradient": (attr.InputXGradient, lambda x: {}),
    "integrated_gradients": (
        attr.IntegratedGradients,
        lambda x: {"n_steps": 4, "baselines": mean_colour(x)},
    ),
    "gradient_shap": (
        attr.GradientShap,
        lambda x: {
            "baselines": mean_colour(x),
            "n_samples": 3,
            "stdevs": 0.1 * float(x.max() - x.min()),
        },
    ),
    "shapley_value_sampling": (
        attr.ShapleyValueSampling,
        lambda x: {"feature_mask": in_pixels(squares(x.shape[1], 4)), "n_samples": 2},
    ),
    "kernel_shap": (
        attr.KernelShap,
        lambda x: {"feature_mask": in_pixels(squares(x.shape[1], 4)), "n_samples": 16},
    ),
    "lime": (
        attr.Lime,
        lambda x: {"feature_mask": in_pixels(squares(x.shape[1], 4)), "n_samples": 16},
    ),
}
MASKED = ("shapley_value_sampling", "kernel_shap", "lime")


def by_hand(forward, name, position, around=lambda m: m, **more):
    """Maps by Captum on this file's own wiring."""
    opened, pixels = Opened(forward), forward.request.pixels.clone().requires_grad_()
    layer = name in LAYER_CALLS
    cls, options = (LAYER_CALLS if layer else PIXEL_CALLS)[name]
    options = options(pixels.detach())
    if name in MASKED:
        options["baselines"] = mean_colour(pixels.detach())
    build = {}
    if name == "lime":
        from captum._utils.models.linear_model import SkLearnLasso

        build["interpretable_model"] = SkLearnLasso(alpha=0.001)
    made = cls(opened, opened.image, **build) if layer else cls(opened, **build)
    values = around(made).attribute(
        pixels,
        target=tiny.pair(forward, position),
        additional_forward_args=(canvas_of(forward, position),),
        **options,
        **more,
    )
    return grids(values) if layer else tokens(values)


@pytest.mark.parametrize("name", (*LAYER_CALLS, *PIXEL_CALLS))
def test_as_captum_called_by_hand(cache, name):
    images = 1 if cache == "prefix" else 2
    forward = bound(cache, images)
    found = small(name).attribute(task_of(forward, 5, seed=3))
    with seeded(torch.Generator().manual_seed(3)):
        expected = by_hand(forward, name, 5)
    assert len(found.maps) == len(expected) == images and found.done.all()
    for one, two in zip(found.maps, expected, strict=True):
        assert one.shape == (1, 8, 8) and one.dtype == torch.float32 and not one.requires_grad
        assert two.any() and tiny.relative(one[0], two) < 1e-3


def test_layer_activation_is_the_tapped_state(cache):
    forward, seen = bound(cache, 2), []
    opened = Opened(forward, fill=lambda maps: seen.append(maps) or maps)
    with torch.no_grad():
        opened(forward.request.pixels, canvas_of(forward, 2))
    found = method("layer_activation").attribute(task_of(forward, 2))
    for one, two in zip(found.maps, seen[0], strict=True):
        assert tiny.relative(one[0], two[0].sum(0)) < 1e-4


def test_layer_gradients_are_autograds(cache):
    forward, seen = bound(cache), []
    opened = Opened(forward, fill=lambda maps: seen.append(maps) or maps)
    pixels = forward.request.pixels.clone().requires_grad_()
    logit = opened(pixels, canvas_of(forward, 4))[0, 4, tiny.pair(forward, 4)[1]]
    features = seen[0][0]
    gradient = torch.autograd.grad(logit, features)[0]
    expected = {
        "layer_grad_cam": (features * gradient.mean((2, 3), keepdim=True)).sum(1)[0],
        "layer_gradient_x_activation": (features * gradient).sum(1)[0],
    }
    for name, value in expected.items():
        found = method(name).attribute(task_of(forward, 4)).maps[0][0]
        assert tiny.relative(found, value.detach()) < 1e-4


@pytest.mark.parametrize("baseline", common.BASELINES)
def test_layer_integrated_gradients_add_up_to_the_fall_of_the_logit(cache, baseline):
    forward, seen = bound(cache, 2), []
    x, canvas, (t, token) = forward.request.pixels, canvas_of(forward, 3), tiny.pair(forward, 3)
    empty = x * 0 if baseline == "zero" else mean_colour(x)
    with torch.no_grad():
        Opened(forward, fill=lambda maps: seen.append(maps) or maps)(empty, canvas)
        full = Opened(forward)(x, canvas)[0, t, token]
        gone = Opened(forward, fill=lambda maps: seen[0])(x, canvas)[0, t, token]
    made = method("layer_integrated_gradients", steps=40, batch=20, baseline=baseline)
    maps = made.attribute(task_of(forward, 3)).maps
    assert abs(float(full - gone)) > 1e-3
    assert math.isclose(sum(float(m.sum()) for m in maps), float(full - gone), rel_tol=2e-2)


@pytest.mark.parametrize("fill", ("mean", "zero"))
@pytest.mark.parametrize("patch", (3, 5))
def test_layer_feature_ablation_by_hand(cache, fill, patch):
    forward = bound(cache, 2)
    groups, (t, token) = squares(2, patch), tiny.pair(forward, 6)
    x, canvas = forward.request.pixels, canvas_of(forward, 6)
    expected = torch.zeros(2, 8, 8)
    with torch.no_grad():
        before = Opened(forward)(x, canvas)[0, t, token]
        for group in groups.unique():

            def emptied(maps, group=group):
                out = []
                for m, own in zip(maps, groups, strict=True):
                    paint = m.mean((2, 3), keepdim=True) * (fill == "mean")
                    out.append(torch.where(own == group, paint, m))
                return out

            after = Opened(forward, fill=emptied)(x, canvas)[0, t, token]
            expected[groups == group] = before - after
    made = method("layer_feature_ablation", patch=patch, fill=fill, batch=5)
    found = torch.cat(made.attribute(task_of(forward, 6)).maps)
    assert tiny.relative(found, expected) < 1e-3


@pytest.mark.parametrize("name", ("gradient_shap", "layer_gradient_shap"))
def test_shap_in_parts_is_the_mean_of_its_samples(name):
    forward = bound("prefix")
    found = method(name, samples=5, batch=2).attribute(task_of(forward, 5)).maps[0][0]
    parts = []
    with seeded(torch.Generator().manual_seed(0)):
        for count in (2, 2, 1):
            calls = LAYER_CALLS if name in LAYER_CALLS else PIXEL_CALLS
            cls, options = calls[name]
            changed = {name: (cls, lambda x, o=options, c=count: {**o(x), "n_samples": c})}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(calls, name, changed[name])
                parts.append(count * by_hand(forward, name, 5)[0] / 5)
    assert tiny.relative(found, sum(parts)) < 1e-3


# -- the noise tunnel ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", bases())
def test_noise_tunnel_as_captums(base):
    forward = bound("none")
    x = forward.request.pixels
    inner = method(base)
    found = method("noise_tunnel", base=base, samples=2, std=0.2, batch=2)
    maps = found.attribute(task_of(forward, 5, seed=1)).maps
    options = {"nt_samples": 2, "stdevs": 0.2 * float(x.max() - x.min())}
    if found._batched:
        options["nt_samples_batch_size"] = 1
    if hasattr(inner, "steps"):
        options["n_steps"] = 16
    cls, given = (LAYER_CALLS if base in LAYER_CALLS else PIXEL_CALLS)[base]
    merged = {**given(x), **options}
    with seeded(torch.Generator().manual_seed(1)), pytest.MonkeyPatch.context() as patch:
        calls = LAYER_CALLS if base in LAYER_CALLS else PIXEL_CALLS
        patch.setitem(calls, base, (cls, lambda _x: merged))
        expected = by_hand(forward, base, 5, around=attr.NoiseTunnel)
    assert tiny.relative(maps[0][0], expected[0]) < 2e-3


@pytest.mark.parametrize("kind", ("smoothgrad", "smoothgrad_sq", "vargrad"))
def test_noise_tunnels_kinds(kind):
    forward = bound("prefix", 2)
    x, (t, token) = forward.request.pixels, tiny.pair(forward, 5)
    made = method("noise_tunnel", base="saliency", kind=kind, samples=4, batch=4, std=0.1)
    maps = made.attribute(task_of(forward, 5)).maps
    opened, found = Opened(forward), []
    with seeded(torch.Generator().manual_seed(0)):
        noise = torch.normal(0, torch.full((4, *x.shape[1:]), 0.1 * float(x.max() - x.min())))
    for one in noise:
        noisy = (x + one).requires_grad_()
        logit = opened(noisy, canvas_of(forward, 5))[0, t, token]
        found.append(torch.autograd.grad(logit, noisy)[0].abs())
    stack = torch.stack(found)
    expected = {
        "smoothgrad": stack.mean(0),
        "smoothgrad_sq": stack.square().mean(0),
        "vargrad": stack.square().mean(0) - stack.mean(0).square(),
    }[kind]
    for one, two in zip(maps, tokens(expected), strict=True):
        assert tiny.relative(one[0], two) < 1e-3
