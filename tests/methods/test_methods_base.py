"""The calling convention: registry, tasks, budgets, pooling, seeds."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from methods import made

from captum_dcam.cli.parsing import parse_methods
from captum_dcam.comparing import QUICK
from captum_dcam.errors import BudgetExhaustedError, UnknownNameError, folded
from captum_dcam.evaluation.plan import as_variant
from captum_dcam.evaluation.suites import is_long
from captum_dcam.methods import (
    METHODS,
    AttributionTask,
    Budget,
    Method,
    MethodFacts,
    metered,
    method,
    method_names,
    register_method,
)
from captum_dcam.methods.base import GROUPS, noise, pooled_pixels, seeded
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target


def test_unknown_method_suggests_near_names():
    with pytest.raises(UnknownNameError, match="did you mean 'diffusion_cam"):
        method("difusion_cam")


def test_of_many_unknown_names_only_the_near_ones_are_shown():
    with pytest.raises(UnknownNameError) as caught:
        method("shap")
    assert str(caught.value) == (
        "unknown method 'shap'; did you mean 'gradient_shap' or 'kernel_shap' or "
        "'layer_gradient_shap' or 'shapley_value_sampling'? "
        f"Known are {len(METHODS)} names, which captum-dcam compare "
        "--list-methods lists"
    )


def test_aliases_are_other_names_of_the_same():
    for alias, name in METHODS.aliases.items():
        assert method(alias) == method(name) and METHODS.own(alias) == name
        assert METHODS.record(alias) == METHODS.record(name) and folded(alias) == alias
    assert not METHODS.aliases.keys() & {folded(name) for name in METHODS}
    for spelled in ("LayerGradCam", "Grad-CAM", "layer grad cam"):
        assert method(spelled).name == "layer_grad_cam"
    assert as_variant("IG") == as_variant("integrated_gradients")
    assert [m.name for m in parse_methods(["gradcam,ig:steps=3"])] == [
        "layer_grad_cam", "integrated_gradients"
    ]  # fmt: skip


def test_quick_methods_are_quick():
    """None makes many passes per word: one that did took half of the time of all."""
    assert not [name for name in QUICK if is_long(name)]
    without = {"perturbation", "pytorch-grad-cam"}
    assert {METHODS[name].facts.group for name in QUICK} == set(GROUPS) - without


def test_unknown_setting_lists_those_there_are():
    with made.registered("made"), pytest.raises(TypeError, match=r"'size'.*it has scale, fails"):
        method("made", size=3)


def test_a_name_cannot_be_taken_twice():
    with made.registered("made"), pytest.raises(ValueError, match="belongs to"):

        @register_method("made")
        @dataclass(frozen=True)
        class Other(Method):
            facts: ClassVar[MethodFacts] = MethodFacts("x", "gradient", "x", "1")

            def attribute(self, task):
                raise NotImplementedError


def test_facts_refuse_unknown_needs_and_groups():
    with pytest.raises(ValueError, match="needs"):
        MethodFacts("x", "gradient", "x", "1", ("magic",))
    with pytest.raises(ValueError, match="group"):
        MethodFacts("x", "magic", "x", "1")


def test_names_come_group_by_group():
    groups = [GROUPS.index(METHODS[n].facts.group) for n in method_names()]
    assert groups == sorted(groups) and method_names()[0].startswith("diffusion_cam")


def test_description_builds_the_same_method_again():
    with made.registered("made"):
        record = method("made", scale=2.0).describe()
        assert record == {"name": "made", "scale": 2.0, "fails": ""}
        assert method(**record) == method("made", scale=2.0)


def test_a_problem_is_one_example():
    forward = tiny.bound("prefix", batch=2)
    with pytest.raises(ValueError, match=r"single\(forward, example\)"):
        AttributionTask(forward, ())


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_single_narrows_a_batch_to_one_example(cache):
    prompts = [tiny.PROMPT, "what color is the circle ?"]
    forward = tiny.bound(cache, batch=2, prompts=prompts)
    for example in range(2):
        one = single(forward, example)
        position = 3
        target = tiny.pair(forward, position, example)
        alone = one(one.request.pixels, *one.arguments(target))
        rows = [tiny.pair(forward, position, b) for b in range(2)]
        both = forward(forward.request.pixels, *forward.arguments(rows))
        assert tiny.relative(alone[0], both[example]) < 1e-5
        assert one.request.prompts == (prompts[example],)
    with pytest.raises(ValueError, match="example 2 is not in the bound batch of 2"):
        single(forward, 2)


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_words_of_several_tokens_add_up(cache):
    task = made.task_of(cache, (0, 3))
    pair = Target("both", (0, 3), tuple(t.token_ids[0] for t in task.targets))
    with made.registered("made"):
        apart = method("made").attribute(task)
        joint = method("made").attribute(AttributionTask(task.forward, (pair,)))
    assert torch.equal(apart.maps[0].sum(0), joint.maps[0][0])


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_meter_counts_images_that_pass_and_gradients_that_arrive(cache):
    task = made.task_of(cache)
    forward, position = task.forward, 2
    args = task.arguments(position)
    with metered(forward) as cost:
        forward(task.pixels, *args)
        pixels = task.pixels.repeat(3, 1, 1, 1, 1)
        logits = forward(pixels, *(a.repeat_interleave(3, 0) for a in args))
        logits[:, position].sum().backward()
    assert (cost.forwards, cost.backwards) == (4, 3)
    assert cost.seconds > 0 and (cost.peak_bytes is None or cost.peak_bytes >= 0)
    assert not tiny.hooks(forward.adapter.model)


def test_budget_keeps_the_words_that_were_finished():
    task = made.task_of(positions=(0, 3, 5))
    with made.registered("made"), metered(task.forward, Budget(passes=2)) as cost:
        found = method("made").attribute(task)
    assert found.done.tolist() == [True, True, False]
    assert cost.forwards == 2 and "2 forward passes" in found.note
    assert bool(found.maps[0][1].any()) and not bool(found.maps[0][2].any())


def test_budget_in_seconds_ends_the_work():
    task = made.task_of()
    with (
        pytest.raises(BudgetExhaustedError, match="seconds"),
        metered(task.forward, Budget(seconds=1e-9)),
    ):
        task.forward(task.pixels, *task.arguments(0))
    assert not tiny.hooks(task.forward.adapter.model)


@pytest.mark.parametrize("settings", [{"passes": 0}, {"seconds": -1.0}])
def test_budget_refuses_nothing(settings):
    with pytest.raises(ValueError, match=r"expected a (whole|finite) number"):
        Budget(**settings)


def test_pixel_tokens_of_the_embedded_family_follow_the_layout():
    forward = tiny.bound("prefix", images=2)
    owners = forward.adapter.pixel_tokens(forward.request)
    assert owners.shape == forward.request.pixels.shape
    assert owners[0, 1, 0, 8 * 3 + 1, 8 * 5 + 7] == 64 + 3 * 8 + 5


def test_pooling_means_over_a_tokens_pixels():
    forward = tiny.bound("prefix", images=2)
    owners = forward.adapter.pixel_tokens(forward.request)
    values = torch.rand(owners.shape, generator=torch.Generator().manual_seed(0))
    maps = pooled_pixels(values, owners, forward.request.layout.shapes)
    for i, pooled in enumerate(maps):
        patch = values[0, i, :, 8:16, 24:32]
        assert torch.allclose(pooled[1, 3], patch.mean(), rtol=1e-5)
    owners = owners.clone()
    owners[owners == 0] = -1
    assert pooled_pixels(values, owners, forward.request.layout.shapes)[0][0, 0] == 0


def test_seeded_draws_from_the_generator_and_restores_global_state():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    drawn = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(7)
        with seeded(generator):
            drawn.append((torch.rand(3), np.random.rand(3)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and (drawn[0][1] == drawn[1][1]).all()
    with pytest.raises(ZeroDivisionError), seeded(torch.Generator()):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_noise_is_the_same_in_every_dtype():
    wide = noise(torch.zeros(5), 0.5, torch.Generator().manual_seed(1))
    narrow = noise(torch.zeros(5, dtype=torch.bfloat16), 0.5, torch.Generator().manual_seed(1))
    assert narrow.dtype == torch.bfloat16 and torch.equal(wide.bfloat16(), narrow)
