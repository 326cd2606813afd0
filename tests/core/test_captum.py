"""Captum's habits: its methods run on the tap, ours keeps its contract, nothing is left behind."""

import pytest
import tiny
import torch
from captum import attr
from captum.attr import visualization

from captum_dcam import DiffusionCAM
from captum_dcam.maps import PRODUCTS

LAYER_METHODS = {
    "LayerActivation": (attr.LayerActivation, {}),
    "LayerGradCam": (attr.LayerGradCam, {}),
    "LayerGradientXActivation": (attr.LayerGradientXActivation, {}),
    "LayerIntegratedGradients": (attr.LayerIntegratedGradients, {"n_steps": 3}),
    "InternalInfluence": (attr.InternalInfluence, {"n_steps": 3}),
    "LayerConductance": (attr.LayerConductance, {"n_steps": 3}),
}


@pytest.fixture
def forward(cache):
    return tiny.bound(cache, batch=2)


def state_of(forward):
    modules = {n: m.training for n, m in forward.named_modules()}
    parameters = {
        n: (p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for n, p in forward.named_parameters()
    }
    return modules, parameters, tiny.hooks(forward)


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_captums_layer_methods_run_on_the_tap(forward, name):
    method, options = LAYER_METHODS[name]
    target = tiny.pairs(forward, 2)
    if name != "LayerActivation":
        options = {**options, "target": target}
    before = state_of(forward)
    got = method(forward, forward.tap).attribute(
        forward.request.pixels, additional_forward_args=forward.arguments(target), **options
    )
    channels = 1 if name == "LayerGradCam" else 48
    assert got.shape == (2, channels, 8, 8)
    assert torch.isfinite(got).all() and got.any()
    assert state_of(forward) == before


def test_layer_activation_is_the_image_part_of_the_block(forward):
    args = forward.arguments(score="final")
    got = attr.LayerActivation(forward, forward.tap).attribute(
        forward.request.pixels, additional_forward_args=args
    )
    model, request = forward.model, forward.request
    ids = torch.cat((request.extras[0], args[-1]), dim=1)
    parts = (request.layout.prefix_length, 8)
    segments = parts if forward.trajectory.cache == "prefix" else (sum(parts),)
    seen = []
    handle = model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with torch.no_grad():
        model(ids, request.pixels, segments=segments)
    handle.remove()
    expected = seen[0][:, :64].transpose(1, 2).reshape(2, 48, 8, 8)
    assert tiny.relative(got, expected) < 1e-5


@pytest.mark.parametrize("name", ("Saliency", "InputXGradient", "IntegratedGradients"))
def test_captums_input_methods_run_on_the_forward(forward, name):
    target = tiny.pairs(forward, 2)
    options = {"n_steps": 3} if name == "IntegratedGradients" else {}
    got = getattr(attr, name)(forward).attribute(
        forward.request.pixels,
        target=target,
        additional_forward_args=forward.arguments(target),
        **options,
    )
    assert got.shape == forward.request.pixels.shape and got.any()
    assert not tiny.hooks(forward) and all(p.grad is None for p in forward.parameters())


def test_feature_ablation_runs_on_the_forward(forward):
    target = tiny.pairs(forward, 2)
    quadrants = torch.arange(4).view(2, 2).repeat_interleave(32, 0).repeat_interleave(32, 1)
    got = attr.FeatureAblation(forward).attribute(
        forward.request.pixels,
        target=target,
        additional_forward_args=forward.arguments(target),
        feature_mask=quadrants[None, None, None],
    )
    assert got.shape == forward.request.pixels.shape
    # by hand: the first quadrant of both pictures set to 0
    pixels = forward.request.pixels.clone()
    pixels[..., :32, :32] = 0
    rows, (at, tokens) = torch.arange(2), zip(*target, strict=True)
    with torch.no_grad():
        logits = [forward(x, *forward.arguments(target)) for x in (forward.request.pixels, pixels)]
    fall = [x[rows, list(at), list(tokens)] for x in logits]
    assert torch.allclose(got[:, 0, 0, 0, 0], fall[0] - fall[1], atol=1e-5)


@pytest.mark.parametrize("explicit", (True, False))
def test_noise_tunnel_around_diffusion_cam(forward, explicit):
    target = tiny.pairs(forward, 2)
    cam = DiffusionCAM(forward, preset="base")
    args = forward.arguments(target, "final") if explicit else None
    got = attr.NoiseTunnel(cam).attribute(
        forward.request.pixels,
        nt_type="smoothgrad",
        nt_samples=3,
        stdevs=1e-6,
        target=target,
        additional_forward_args=args,
    )
    assert got.shape == (2, 1, 8, 8)
    assert tiny.relative(got, cam.attribute(forward.request.pixels, target)) < 1e-3


def test_interpolate_and_visualize(forward):
    maps = DiffusionCAM(forward, preset="base").attribute(
        forward.request.pixels, tiny.pairs(forward, 2)
    )
    big = attr.LayerAttribution.interpolate(maps, (60, 80), "bilinear")
    assert big.shape == (2, 1, 60, 80)
    import matplotlib

    matplotlib.use("Agg")
    figure, _ = visualization.visualize_image_attr(
        big[0].permute(1, 2, 0).numpy(),
        None,
        method="heat_map",
        sign="positive",
        use_pyplot=False,
    )
    assert figure is not None


def test_targets_one_for_all_or_one_each(forward):
    cam, pixels = DiffusionCAM(forward), forward.request.pixels
    shared = cam.attribute(pixels, (2, 9), score="final")
    listed = cam.attribute(pixels, [(2, 9), (2, 9)], score="final")
    mixed = cam.attribute(pixels, [(2, 9), (3, 11)], score="final")
    other = cam.attribute(pixels, (3, 11), score="final")
    assert torch.equal(shared, listed)
    assert torch.equal(mixed[0], shared[0]) and torch.equal(mixed[1], other[1])
    assert torch.equal(cam.attribute((pixels,), (2, 9), score="final"), shared)


@pytest.mark.parametrize("preset", ("default", "base", "paper"))
def test_two_pictures_give_two_maps(cache, preset):
    forward = tiny.bound(cache, images=2)
    target = tiny.pair(forward, 1)
    maps = DiffusionCAM(forward, preset=preset).attribute(forward.request.pixels, target)
    assert isinstance(maps, tuple) and [m.shape for m in maps] == [(1, 1, 8, 8)] * 2
    if preset == "base":
        expected = attr.LayerGradCam(forward, forward.tap).attribute(
            forward.request.pixels,
            target,
            additional_forward_args=forward.arguments(target, "final"),
            relu_attributions=True,
        )
        for one, two in zip(maps, expected, strict=True):
            assert tiny.relative(one, two.detach()) < 1e-5


def test_channels_kept_apart_add_up(forward):
    cam, target = DiffusionCAM(forward, preset="base"), tiny.pairs(forward, 2)
    pixels = forward.request.pixels
    apart = cam.attribute(pixels, target, relu_attributions=False, attr_dim_summation=False)
    assert apart.shape == (2, 48, 8, 8)
    summed = cam.attribute(pixels, target, relu_attributions=False)
    assert tiny.relative(apart.sum(1, keepdim=True), summed) < 1e-5
    with pytest.raises(ValueError, match="product='pooled'"):
        DiffusionCAM(forward).attribute(pixels, target, attr_dim_summation=False, refinements=[])


@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize("preset", ("default", "paper"))
def test_everything_is_as_before(forward, train, preset):
    forward.train(train)
    forward.model.layers[2].train(not train)  # a mixture, too
    parameters = list(forward.parameters())
    for i, p in enumerate(parameters):
        p.requires_grad_(i % 3 == 0)
    parameters[0].grad = torch.ones_like(parameters[0])
    pixels = forward.request.pixels
    before, content = state_of(forward), pixels.clone()
    maps = DiffusionCAM(forward, preset=preset).attribute(pixels, tiny.pairs(forward, 1))
    after = state_of(forward)
    assert after[0] == before[0] and after[2] == before[2] == []
    for name, (wants, grad) in before[1].items():
        assert after[1][name][0] == wants
        assert (grad is None) == (after[1][name][1] is None)
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert not maps.requires_grad and maps.grad_fn is None
    assert torch.equal(pixels, content) and not pixels.requires_grad and pixels.grad is None


class Burst(Exception):
    pass


def burst(*_args, **_kwargs):
    raise Burst


@pytest.mark.parametrize("where", ("block", "below", "tower", "product", "refinement"))
@pytest.mark.parametrize("several", (True, False))
def test_nothing_is_left_behind_by_an_error(monkeypatch, cache, where, several):
    forward = tiny.bound(cache)
    forward.train()
    for p in forward.parameters():
        p.requires_grad_(True)
    target = tiny.pair(forward, 1)
    if several:
        from captum_dcam.model.words import Target

        target = Target("two", (1, 2), (5, 6))
        if where in ("below", "tower"):
            forward.trajectory.kept.clear()  # else they would not run at all
    part = {
        "block": forward.model.layers[3],
        "below": forward.model.layers[0],
        "tower": forward.model.vision_tower,
    }.get(where)
    options = {}
    before = state_of(forward)
    if part is not None:
        handle = part.register_forward_hook(burst)
    elif where == "product":
        monkeypatch.setitem(PRODUCTS._entries, "positionwise", burst)
    else:
        from captum_dcam import refine

        monkeypatch.setattr(refine.MinMax, "__call__", burst)
        options["refinements"] = [refine.MinMax()]
    with pytest.raises(Burst):
        DiffusionCAM(forward).attribute(forward.request.pixels, target, **options)
    if part is not None:
        handle.remove()
    assert state_of(forward) == before and forward.tap.edit is None
    assert not forward.request.pixels.requires_grad


def test_edits_end_with_their_context_also_after_an_error():
    forward = tiny.bound("none")
    with pytest.raises(Burst), forward.edited(lambda f, _i: f * 0):
        raise Burst
    assert forward.tap.edit is None
