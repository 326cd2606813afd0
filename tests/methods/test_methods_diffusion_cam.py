"""The presets as methods equal what explain gives; their settings change one thing each."""

import pytest
import tiny
import torch
from methods import made

from captum_dcam.errors import InfeasibleStepError
from captum_dcam.explaining import explain_generation
from captum_dcam.maps import Reading, word_maps
from captum_dcam.methods import AttributionTask, method

PRESETS = {
    "diffusion_cam": "default",
    "diffusion_cam_paper": "paper",
    "diffusion_cam_base": "base",
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("cache", tiny.CACHES)
def test_equals_explain(name, cache):
    task = made.task_of(cache, (0, 3, 5))
    found = method(name).attribute(task)
    expected = explain_generation(task.forward, list(task.targets), preset=PRESETS[name])
    assert torch.equal(found.maps[0].relu(), expected.maps[0])


@pytest.mark.parametrize("score", ["commit", "final", "teacher"])
def test_the_problems_score_is_read_on_demand(score):
    task = made.task_of("none")
    task = AttributionTask(task.forward, task.targets, score)
    found = method("diffusion_cam_base", score="task").attribute(task)
    expected = word_maps(task.forward, task.targets, [0, 0], Reading(score))
    assert torch.equal(found.maps[0], expected[0])


def test_a_share_of_the_steps_is_a_call():
    task = made.task_of("none")
    for at, call in ((0.0, 0), (0.5, 4), (1.0, 7)):
        found = method("diffusion_cam_base", at=at).attribute(task)
        expected = word_maps(task.forward, task.targets, [0, 0], Reading("final", step=call))
        assert torch.equal(found.maps[0], expected[0])


def test_with_a_cached_prefix_later_steps_are_infeasible():
    task = made.task_of("prefix")
    method("diffusion_cam_base", at=0.0).attribute(task)
    with pytest.raises(InfeasibleStepError, match="choose a feasible step, here 0"):
        method("diffusion_cam_base", at=0.25).attribute(task)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean 'commit'"):
        method("diffusion_cam", score="comit")
    with pytest.raises(ValueError, match="at is 2"):
        method("diffusion_cam", at=2)
