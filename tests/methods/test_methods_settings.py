"""Every setting of every method changes its maps, or is one that by its meaning does not."""

from dataclasses import fields

import awkward
import pytest
import tiny
import torch
from methods.test_methods_all import ONE_GRID, every, have_grad_cam, two_tokens

from captum_dcam import DiffusionCAM
from captum_dcam.maps import cam
from captum_dcam.methods import METHODS, AttributionTask, method
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import resolve

#: another value of a setting, by its name, or by method and name where it means something else
OTHERS = {
    "aggregate": "max",
    "alpha": 0.5,
    "arc": False,
    "at": 0.5,
    "base": "layer_grad_cam",
    "baseline": "mean",
    "batch": 3,
    "batch_size": 3,
    "block": 0,
    "blocks": (1,),
    "center": True,
    "backward": "constant_norms",
    "channels": 5,
    "comparisons": 1,
    "concepts": 2,
    "eci": False,
    "features": True,
    "fill": "zero",
    "filter": 5,
    "gamma": 0.1,
    "k": 2,
    "kind": "smoothgrad_sq",
    "l1": 9.0,
    "msea": False,
    "order": "position",
    "p": 0.2,
    "patch": 2,
    "permutations": 2,
    "points": 1,
    "product": "plus_plus",
    "refined": False,
    "regions": 6,
    "relevance": "mean",
    "samples": 3,
    "scales": (0.5, 1.0),
    "score": "teacher",
    "search": "full",
    "size": 3,
    "start": 3,
    "std": 0.3,
    "steps": 3,
    "stride": 2,
    "threshold": 0.5,
    "tv": 9.0,
    "weights": "probability",
    ("arc", "msea"): True,
    ("attn_lrp", "block"): 2,
    ("cp_lrp", "block"): 2,
    ("diffusion_cam", "backward"): "exact",
    ("diffusion_cam", "center"): False,
    ("diffusion_cam_base", "refined"): False,
    ("kernel_shap", "samples"): 16,
    ("lime", "samples"): 16,
    ("msea", "arc"): True,
    ("occlusion", "patch"): 3,
    ("pgc_sess", "scales"): 2,
    ("score_cam", "baseline"): 0.7,
    ("score_cam", "score"): "probability",
    ("tam_over", "base"): "logit_lens",
} | {
    (name, "baseline"): "zero"
    for name, cls in METHODS.items()
    if getattr(cls, "baseline", None) == "mean"
}
#: what one is beside, so that all of it takes few passes
BESIDE = {"steps": 2, "samples": 2, "permutations": 1, "channels": 3, "patch": 4}
MORE = {
    "eagle": {"regions": 9, "batch_size": 32},
    "igos_pp": {"size": 5, "points": 2, "l1": 0.0},
    "llm_attribution": {"regions": 4},
    "kernel_shap": {"samples": 12},
    "lime": {"samples": 12, "alpha": 0.001},
    "pgc_sess": {"scales": 1},
}
#: settings that by their meaning change nothing: how many images share a pass, what the half of
#: MSEA + ARC that is turned off would do, refinements of a preset that has none; and EAGLE's
#: quicker search, which finds the same order in a model of random weights
SAME = {
    *((name, one) for name in METHODS for one in ("batch", "batch_size")),
    *(("arc", one) for one in ("scales", "aggregate")),
    *(("msea", one) for one in ("k", "p", "order", "filter")),
    ("diffusion_cam_base", "refined"),
    ("eagle", "search"),
}
#: where each pass draws its own noise
DRAWN = {("gradient_shap", "batch"), ("layer_gradient_shap", "batch"), ("noise_tunnel", "batch")}


def task(name, seed=0):
    """Two tokens, written at different steps, with context before."""
    forward, word = two_tokens(name in ONE_GRID)
    return AttributionTask(forward, (word,), generator=torch.Generator().manual_seed(seed))


def settings_of(name):
    return [f.name for f in fields(METHODS[name])]


def beside(name):
    known = settings_of(name)
    return {k: v for k, v in {**BESIDE, **MORE.get(name, {})}.items() if k in known}


def maps_of(name, **settings):
    chosen = method(name, **{**beside(name), **settings})
    chosen.check(task(name))
    found = chosen.attribute(task(name))
    assert bool(found.done.all())
    return torch.cat([m.flatten() for m in found.maps])


@every
def test_every_setting_counts(name):
    plain = maps_of(name)
    assert plain.any()
    for one in settings_of(name):
        value = OTHERS.get((name, one), OTHERS.get(one))
        assert value is not None, f"{name} has a setting {one!r}: say what it is changed to"
        assert value != getattr(method(name, **beside(name)), one) or (name, one) in SAME
        changed = tiny.relative(maps_of(name, **{one: value}), plain)
        if (name, one) in DRAWN:
            continue
        if (name, one) in SAME:
            assert changed < 1e-4, one
        else:
            assert changed > 1e-3, one


def test_settings_that_are_no_methods_setting_are_known():
    """Nothing stands in the tables above for a method or a setting that is gone."""
    known = {(name, one) for name in METHODS for one in settings_of(name)}
    single = {one for _, one in known}
    assert {k for k in OTHERS if isinstance(k, tuple)} <= known
    assert {k for k in OTHERS if isinstance(k, str)} <= single or not have_grad_cam()


# -- the layer attribution itself ------------------------------------------------------------------


@pytest.mark.parametrize("center", (False, True))
@pytest.mark.parametrize("product", ("pooled", "positionwise"))
def test_centring_is_of_each_channel_of_each_grid(center, product):
    forward = awkward.bound("mini", "none")
    pairs = tiny.pairs(forward, 2)
    dcam = DiffusionCAM(forward, preset="base")
    found = dcam.attribute(
        forward.request.pixels, pairs, relu_attributions=False, product=product, center=center
    )
    for example in range(2):
        (word,) = resolve(
            forward.adapter, forward.trajectory.tokens[example].tolist(), pairs[example]
        )
        (row,) = target_gradients(forward, [word], [example], score="final")
        for maps, a, g in zip(found, row.features, row.gradients, strict=True):
            a = torch.stack([c - c.mean() if center else c for c in a])
            weights = g.mean((1, 2))[:, None, None] if product == "pooled" else g
            assert tiny.relative(maps[example, 0], (weights * a).sum(0)) < 1e-4
            assert torch.allclose(cam(a, g, product, False), (weights * a).sum(0), atol=1e-5)


def test_what_is_for_autograd_reaches_it():
    """``grad_outputs`` are what each example's logit is multiplied by."""
    forward = awkward.bound("mini", "prefix")
    pairs = tiny.pairs(forward, 3)
    dcam = DiffusionCAM(forward, preset="base")
    plain = dcam.attribute(forward.request.pixels, pairs, relu_attributions=False)
    given = {"grad_outputs": [torch.tensor(2.0), torch.tensor(-3.0)]}
    found = dcam.attribute(
        forward.request.pixels, pairs, relu_attributions=False, grad_kwargs=given
    )
    for one, other in zip(found, plain, strict=True):
        assert torch.allclose(one[0], 2 * other[0], atol=1e-6)
        assert torch.allclose(one[1], -3 * other[1], atol=1e-6)
