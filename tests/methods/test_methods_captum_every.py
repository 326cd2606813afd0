"""Every one of Captum's methods: narrow types, sums, scores, padding, passes, settings."""

import functools
import math
import sys

import pytest
import tiny
import torch

from captum_dcam.errors import BudgetExhaustedError, MethodError, MissingPackageError
from captum_dcam.methods import METHODS, AttributionTask, Budget, metered, method
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target

PATH = {"steps": 2, "batch": 2}
SMALL = {  # settings that make a test quick
    "layer_integrated_gradients": PATH,
    "internal_influence": PATH,
    "layer_conductance": PATH,
    "layer_gradient_shap": {"samples": 2},
    "layer_feature_ablation": {"patch": 4},
    "integrated_gradients": PATH,
    "gradient_shap": {"samples": 2},
    "occlusion": {"patch": 4, "stride": 4},
    "feature_ablation": {"patch": 4},
    "shapley_value_sampling": {"patch": 4, "permutations": 2},
    "kernel_shap": {"patch": 4, "samples": 8},
    "lime": {"patch": 4, "samples": 8, "alpha": 1e-4},
    "noise_tunnel": {"samples": 2},
    "llm_attribution": {"regions": 4},
}
NAMES = tuple(n for n, c in METHODS.items() if c.facts.group.startswith("Captum"))
WITH_SKLEARN = ("kernel_shap", "lime")


def small(name, **settings):
    if name in WITH_SKLEARN:
        pytest.importorskip("sklearn", exc_type=ImportError)
    return method(name, **{**SMALL.get(name, {}), **settings})


@functools.cache
def bound(cache, images=1, layer=1):
    return tiny.bound(cache, images=images, layer=layer)


@functools.cache
def narrow(cache):
    """The same states on the model in bfloat16."""
    made = tiny.bound(cache, dtype=torch.bfloat16)
    made.bind(made.request, bound(cache).trajectory.single(0))
    return made


def task_of(forward, *positions, seed=0, score="commit"):
    tokens = tuple(int(forward.trajectory.tokens[0, p]) for p in positions)
    generator = torch.Generator().manual_seed(seed)
    return AttributionTask(forward, (Target("word", positions, tokens),), score, generator)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    cache = tiny.CACHES[NAMES.index(name) % 2]
    made = small(name)
    maps = [made.attribute(task_of(f, 5)).maps[0].flatten() for f in (narrow(cache), bound(cache))]
    assert maps[0].dtype == torch.float32
    assert float(torch.corrcoef(torch.stack(maps))[0, 1]) > (0.6 if name == "lime" else 0.9)


def test_a_word_is_the_sum_of_its_tokens_each_at_its_own_step(cache):
    forward, made = bound(cache), method("layer_gradient_x_activation")
    whole = made.attribute(task_of(forward, 1, 6)).maps[0]
    parts = [made.attribute(task_of(forward, p)).maps[0] for p in (1, 6)]
    assert tiny.relative(whole, sum(parts)) < 1e-5


@pytest.mark.parametrize("score", ("final", "teacher"))
@pytest.mark.parametrize("name", ("saliency", "layer_grad_cam", "feature_ablation"))
def test_scores_read_other_states(cache, name, score):
    forward, made = bound(cache), small(name)
    early = int(forward.trajectory.commit_step[0].argmin())
    found = [made.attribute(task_of(forward, early, score=s)).maps[0] for s in ("commit", score)]
    assert found[1].any() and not torch.equal(*found)


@pytest.mark.parametrize("name", ("saliency", "occlusion", "layer_grad_cam", "layer_conductance"))
def test_padding_of_the_prompt_changes_nothing(cache, name):
    prompts = [tiny.PROMPT, "what is the color of the square ?"]
    padded = tiny.bound(cache, batch=2, prompts=prompts)
    assert not bool(padded.request.extras[1].all())
    alone = bound(cache)
    one = single(padded, 0)
    one.bind(one.request, alone.trajectory.single(0))
    made = small(name)
    found, expected = (made.attribute(task_of(f, 4)).maps[0] for f in (one, alone))
    assert tiny.relative(found, expected) < 1e-3


@pytest.mark.parametrize(
    "name", [n for n in NAMES if METHODS[n].facts.passes[-4:] == "back" or n in WITH_SKLEARN]
)
def test_passes_are_as_told(name):
    if name in WITH_SKLEARN:
        pytest.importorskip("sklearn", exc_type=ImportError)
    forward = bound("prefix")
    with metered(forward) as cost:
        method(name).attribute(task_of(forward, 5))
    told = METHODS[name].facts.passes.removesuffix(" back").split(" + ")
    assert [str(cost.forwards), str(cost.backwards)][: len(told)] == told
    assert METHODS[name].facts.expensive == (cost.forwards >= 50)


def test_a_budget_ends_between_words():
    forward = bound("none")
    targets = tuple(t for p in (2, 3) for t in task_of(forward, p).targets)
    with metered(forward, Budget(passes=15)):
        found = method("feature_ablation", patch=3).attribute(AttributionTask(forward, targets))
    assert found.done.tolist() == [True, False] and "budget" in found.note
    assert found.maps[0][0].any() and not found.maps[0][1].any()
    with pytest.raises(BudgetExhaustedError), metered(forward, Budget(passes=1)):
        method("occlusion").token(task_of(forward, 2), 2, 5)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("integrated_gradients", {"steps": 0}, "steps is 0"),
        ("layer_conductance", {"batch": 2.0}, "batch is 2.0"),
        ("feature_ablation", {"patch": True}, "patch is True"),
        ("gradient_shap", {"std": 0.0}, "std is 0.0"),
        ("lime", {"alpha": math.nan}, "alpha is nan"),
        ("integrated_gradients", {"baseline": "blur"}, "baseline is 'blur': expected one of"),
        ("layer_feature_ablation", {"fill": "blur"}, "fill is 'blur'"),
        ("occlusion", {"patch": 2, "stride": 3}, "stride is 3 tokens"),
        ("noise_tunnel", {"base": "lime"}, r"expected one of \('input_x_gradient', 'integrated"),
        ("noise_tunnel", {"kind": "mean"}, "kind is 'mean'"),
        ("noise_tunnel", {"samples": 0}, "samples is 0"),
        ("noise_tunnel", {"samples": 1, "kind": "vargrad"}, "samples is 1"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    with pytest.raises(ValueError, match=message):
        method(name, **settings)


@pytest.mark.parametrize("name", WITH_SKLEARN)
def test_a_surrogate_says_what_it_needs(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(MissingPackageError, match=rf"'{name}' needs .*captum-dcam\[eval\]"):
            method(name).check(task_of(bound("none"), 1))
    pytest.importorskip("sklearn", exc_type=ImportError)
    with pytest.raises(MethodError, match="patch 8 makes one group"):
        method(name, patch=8).check(task_of(bound("none"), 1))
