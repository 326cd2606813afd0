"""Affinity along the model's own states, wherever maps are refined: which states, whose, at what
cost, and the same map by every way."""

import json
from dataclasses import replace

import awkward
import pytest
import tiny
import torch
from calibration.made_maps import SHORT, Pictures
from captum.attr import NoiseTunnel
from evaluation import made

from captum_dcam import DiffusionCAM, compare_generation, explain_generation, maps
from captum_dcam.calibration import Chain, collect
from captum_dcam.evaluation import Variant, evaluate
from captum_dcam.evaluation.trial import _explain
from captum_dcam.methods import metered
from captum_dcam.model.forward import single
from captum_dcam.model.gradients import image_features
from captum_dcam.model.layout import Layout
from captum_dcam.model.tap import hidden_of
from captum_dcam.model.words import Target
from captum_dcam.presets import preset
from captum_dcam.refine import (
    SICD,
    Affinity,
    MinMax,
    RefineContext,
    affinity_propagation,
    min_max,
)

CACHES = pytest.mark.parametrize("cache", awkward.CACHES)
STAGE = Affinity(power=6.0, square=1.5)


def fresh(forward):
    """The same generation, with nothing kept or remembered."""
    return forward.again(trajectory=replace(forward.trajectory, kept={}))


def states(forward, example=0, call=0):
    """What the tapped block gives for an example's image tokens in a call, by a hook of our own."""
    other, seen = fresh(forward), []
    block = forward.adapter.blocks[forward.layer]
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(hidden_of(out).clone()))
    with torch.no_grad():
        if forward.trajectory.cache == "prefix":
            other.prefill()
        else:
            every = torch.arange(forward.request.batch)
            other.replay(every, torch.full_like(every, call))
    handle.remove()
    grids = forward.request.layout.grids
    return tuple(seen[0][example, g.positions.flatten()].T.unflatten(1, g.shape) for g in grids)


def by_hand(raw, features, layout, stage=STAGE):
    """Raw maps (N, h, w) of each grid, refined by the pure function."""
    settings = {k: v for k, v in stage.describe().items() if k != "name"}
    pictures = [g.image for g in layout.grids]
    return affinity_propagation(
        [m.relu() for m in raw], features, layout.shares, pictures, **settings
    )


def equal(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


# -- which states ----------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("keep", (True, False))
def test_features_are_the_blocks_states_at_the_first_call(cache, keep):
    """Of the example, without a pass where they were kept, else with one per example."""
    forward = tiny.bound(cache, batch=2, keep=keep, images=2)
    passes = 0 if keep else 2
    for example in range(2):
        with metered(forward) as cost:
            contexts = maps.contexts_of(forward, example=example)
        assert (cost.forwards, cost.backwards) == (passes, 0)
        passes = 0  # remembered
        found = [c.features for c in contexts]
        equal(found, states(forward, example))
        assert not any(f.requires_grad for f in found)
    assert [c.picture for c in contexts] == [g.image for g in forward.request.layout.grids]
    assert all(c.shares is s for c, s in zip(contexts, forward.request.layout.shares, strict=True))
    other = maps.contexts_of(forward, example=0)
    assert not torch.equal(other[0].features, contexts[0].features)


@CACHES
@pytest.mark.parametrize("keep", (True, False))
def test_one_example_and_another_block_have_their_own_states(cache, keep):
    """What was kept is the states of the block that was tapped then."""
    forward = tiny.bound(cache, batch=2, keep=keep)
    deeper = forward.again(2)
    for one in (forward, deeper):
        equal([f[0] for f in image_features(one, [1])], states(one, 1))
    assert not torch.allclose(states(forward, 1)[0], states(deeper, 1)[0], atol=1e-2)


def test_a_step_that_is_named_has_its_own_states():
    forward = tiny.bound("none")
    for step in (0, 3):
        found = [c.features for c in maps.contexts_of(forward, step=step)]
        equal(found, states(forward, call=step))
    assert not torch.equal(states(forward)[0], states(forward, call=3)[0])
    with pytest.raises(ValueError, match=r"step 99 is not in this generation"):
        maps.contexts_of(forward, step=99)
    with pytest.raises(ValueError, match=r"image span ends .* choose a feasible step, here 0"):
        maps.contexts_of(tiny.bound("prefix"), step=1)


@CACHES
def test_only_who_reads_features_is_given_them(cache):
    forward = tiny.bound(cache, keep=False)
    with metered(forward) as cost:
        without = maps.contexts_of(forward, None, [MinMax()])
    assert cost.forwards == 0 and without[0].features is None
    nested = maps.as_compose([MinMax(), maps.as_compose([STAGE])])
    assert maps.needs_features(nested) and not maps.needs_repeated(nested)
    assert maps.contexts_of(forward, None, nested)[0].features is not None


@CACHES
@pytest.mark.parametrize("keep", (True, False))
def test_an_edited_tap_gives_the_edited_states(cache, keep):
    forward = tiny.bound(cache, keep=keep)
    plain = maps.contexts_of(forward)[0].features
    with forward.edited(lambda grid, _i: 2 * grid):
        edited = maps.contexts_of(forward)[0].features
        assert torch.equal(edited, image_features(forward)[0][0])
    equal([edited], [2 * plain])
    assert torch.equal(maps.contexts_of(forward)[0].features, plain)


@CACHES
def test_changed_weights_give_their_own_states(cache):
    """As the sanity checks redraw them: by the evaluation's own way to explain a word again."""
    forward = single(tiny.bound(cache))
    target = Target("one", (2,), (int(forward.trajectory.tokens[0, 2]),))
    variant = Variant("one", "layer_grad_cam", refinements=(STAGE.describe(),))
    bare = replace(variant, refinements=())
    again, raw = (_explain(v, None, 0) for v in (variant, bare))
    before = again(forward, (target,))
    equal(before, by_hand(raw(forward, (target,)), states(forward), forward.request.layout))
    with torch.no_grad():
        for parameter in forward.adapter.blocks[0].parameters():
            parameter.mul_(1.5)
    forward.adapter.guard.changed()
    other = fresh(forward)
    after = again(other, (target,))
    equal(after, by_hand(raw(other, (target,)), states(other), other.request.layout))
    assert not torch.allclose(before[0], after[0], atol=1e-3)


def test_a_word_explained_again_keeps_the_maps_of_repeated_words():
    forward = single(tiny.bound("prefix"))
    target = Target("one", (2,), (int(forward.trajectory.tokens[0, 2]),))
    stage = SICD(omega_rep=1.0, lambda_max=1.0, gate=False)
    variant = Variant("one", "layer_grad_cam", refinements=(stage.describe(),))
    (raw,) = _explain(replace(variant, refinements=()), None, 0)(forward, (target,))
    repeated = min_max(raw[0].relu().flip(0))
    (found,) = _explain(variant, [repeated], 0)(forward, (target,))
    expected = stage(raw.relu(), RefineContext(repeated_maps=repeated))
    equal([found], [expected])
    assert not torch.allclose(found, stage(raw.relu()))


# -- the same map by every way ---------------------------------------------------------------------


@pytest.mark.parametrize(("family", "cache", "example"), awkward.batches())
def test_explained_words_on_two_grids(family, cache, example):
    """Of one picture, or of two: the causal model's."""
    forward = awkward.bound(family, cache)
    bare = explain_generation(forward, example=example, refinements=[])
    found = explain_generation(forward, example=example, refinements=[STAGE])
    layout = forward.request.layout
    features = states(forward, example)
    equal(found.maps, by_hand(bare.maps, features, layout))
    alone = [
        by_hand([m], [f], Layout((g,), 0))[0]
        for m, f, g in zip(bare.maps, features, layout.grids, strict=True)
    ]
    for one, together in zip(alone, found.maps, strict=True):
        top = together.amax((-2, -1), keepdim=True)
        own_graph = torch.allclose(one * top, together, atol=1e-4)
        assert own_graph == (family == "causal")


def test_the_explained_step_gives_maps_and_states():
    forward = tiny.bound("none")
    bare = explain_generation(forward, 2, step=3, refinements=[])
    found = explain_generation(forward, 2, step=3, refinements=[STAGE])
    layout = forward.request.layout
    equal(found.maps, by_hand(bare.maps, states(forward, call=3), layout))
    first = by_hand(bare.maps, states(forward), layout)
    assert not torch.allclose(first[0], found.maps[0], rtol=0, atol=1e-5)


def test_changed_rows_of_a_batch_keep_their_places():
    forward = tiny.bound("prefix", batch=2)
    pixels, cam = forward.request.pixels, DiffusionCAM(forward)
    noise = torch.randn(4, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    changed = pixels.repeat_interleave(2, 0) + 0.05 * noise
    targets = [t for t in tiny.pairs(forward, 2) for _ in range(2)]
    raw = cam.attribute(changed, targets, refinements=[])
    found = cam.attribute(changed, targets, refinements=[STAGE])
    request = forward.request.rows([0, 0, 1, 1], changed)
    own = forward.again(request=request, trajectory=forward.trajectory.rows([0, 0, 1, 1]))
    for row in range(4):
        equal([found[row]], by_hand([raw[row]], states(own, row), request.layout))


@CACHES
def test_the_layer_method_is_the_explanation(cache):
    forward = tiny.bound(cache, batch=2, images=2)
    pixels, targets = forward.request.pixels, tiny.pairs(forward, 2)
    cam = DiffusionCAM(forward)
    found = cam.attribute(pixels, targets, refinements=[STAGE])
    for example in range(2):
        explained = explain_generation(forward, 2, example=example, refinements=[STAGE])
        equal([m[example] for m in found], explained.maps)
    swapped = cam.attribute(pixels[[1, 0, 1]], [targets[i] for i in (1, 0, 1)], refinements=[STAGE])
    equal(swapped, [m[[1, 0, 1]] for m in found])


@CACHES
@pytest.mark.parametrize("several", (False, True))
def test_rows_of_changed_pixels_have_their_own_states(cache, several):
    """Each row as if the model had been asked about these pixels."""
    forward = tiny.bound(cache, layer=1)
    pixels = forward.request.pixels
    noise = torch.randn(3, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    changed = pixels + 0.3 * noise
    pair = tiny.pair(forward, 2)
    target = pair
    if several:
        position = tiny.pair(forward, 4)
        target = Target("two", (pair[0], position[0]), (pair[1], position[1]))
    cam = DiffusionCAM(forward)
    raw = cam.attribute(changed, target, refinements=[])
    found = cam.attribute(changed, target, refinements=[STAGE])
    for row in range(3):
        request = forward.request.rows([0], changed[row : row + 1])
        own = forward.again(request=request, trajectory=forward.trajectory.rows([0]))
        expected = by_hand([raw[row]], states(own, call=0), request.layout)
        equal([found[row]], expected)
    (plain,) = by_hand([raw[0]], states(forward), forward.request.layout)
    assert not torch.allclose(found[0], plain, atol=1e-3)


def test_noise_tunnel_runs_over_it():
    forward = tiny.bound("prefix", batch=2)
    targets = tiny.pairs(forward, 2)
    torch.manual_seed(0)
    found = NoiseTunnel(DiffusionCAM(forward)).attribute(
        forward.request.pixels,
        nt_samples=2,
        stdevs=0.0,
        target=targets,
        refinements=[STAGE],
        additional_forward_args=forward.arguments(targets),
    )
    equal(
        [found],
        [DiffusionCAM(forward).attribute(forward.request.pixels, targets, refinements=[STAGE])],
    )


@pytest.mark.parametrize("example", (0, 1))
def test_every_method_of_a_comparison_is_refined_by_the_models_states(example):
    forward = awkward.bound()
    names = ("layer_grad_cam", "tam", "attention", "logit_lens")
    found = compare_generation(
        forward, None, names, example=example, refinements=[Affinity()], errors="raise"
    )
    for row in found.rows:
        features = states(single(forward, example))
        equal(row.maps, by_hand(row.raw, features, found.layout, Affinity()))
        assert not any(torch.equal(m, r.relu()) for m, r in zip(row.maps, row.raw, strict=True))
    (stage,) = found.settings["refinements"]["stages"]
    assert stage == {"name": "affinity", "power": 6.0, "square": 2.0, "center": True}


def test_an_evaluation_measures_it(tmp_path, monkeypatch):
    """Every variant by the states of its own block."""
    layers, original = [], maps.contexts_of

    def spy(forward, *args, **kwargs):
        layers.append(forward.layer)
        return original(forward, *args, **kwargs)

    monkeypatch.setattr(maps, "contexts_of", spy)
    stages = (Affinity().describe(),)
    variants = (
        Variant("bare", "layer_grad_cam"),
        Variant("first", "layer_grad_cam", refinements=stages),
        Variant("deeper", "layer_grad_cam", layer=2, refinements=stages),
        Variant("oracle", "oracle", refinements=stages),
    )
    plan = made.plan(variants=variants, metrics=("localization",))
    adapter = made.adapter()
    evaluate(plan, tmp_path / "store", adapter=adapter, data=made.Pictures(1))
    own = adapter.recommended_block
    assert own != 2 and layers == [own, own, own, 2]  # the oracle comes first
    text = made.results(tmp_path / "store").decode()
    (record,) = [json.loads(line) for line in text.splitlines()]
    scores = {name: v["scores"]["f3"] for name, v in record["variants"].items()}
    assert {v["status"] for v in record["variants"].values()} == {"done"}
    assert scores["bare"] != scores["first"] != scores["deeper"]


def test_calibration_refines_every_image_by_its_own_states():
    stages = (MinMax(), STAGE)
    base = replace(preset("base"), refinements=lambda: maps.as_compose(stages))
    forward_adapter = tiny.adapter("prefix")
    found = collect(forward_adapter, Pictures(2), [0, 1], base, generation=SHORT)
    assert len(found.batches) == 2
    for batch, refined in zip(found.batches, Chain(found).refined(stages), strict=True):
        (context,), (values,) = batch.contexts, batch.maps
        (expected,) = affinity_propagation(
            [min_max(values)], [context.features], power=6.0, square=1.5
        )
        torch.testing.assert_close(refined[0], expected)
    first, second = (b.contexts[0].features for b in found.batches)
    assert not torch.equal(first, second)
    without = collect(forward_adapter, Pictures(2), [0, 1], preset("base"), generation=SHORT)
    assert len(without.batches) == 1 and without.batches[0].contexts[0].features is None
