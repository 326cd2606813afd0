"""Dimple on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_DIMPLE=CHECKOUT pytest tests/upstream/test_dimple.py``; skipped without the
variable.
"""

import pytest
import tiny
import torch
from doubles import dream_vl_checks as suite
from doubles.gradients import fd
from upstream import made_dimple as real

from captum_dcam.model.forward import DenoisingForward

pytestmark = pytest.mark.skipif(
    real.FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_DIMPLE names no checkout of yu-rp/Dimple"
)
#: its image processor refuses sides below 28 pixels
SIZES = [size for size in suite.SIZES if min(size) >= 28]


def bound(layer=1, dtype=torch.float32, pictures=None, prompts=None, **settings):
    made = real.adapter(dtype)
    forward = DenoisingForward(made, layer)
    pictures = pictures or [[tiny.picture(size=(84, 56))]]
    request = made.prepare(pictures, prompts or ["what is this"] * len(pictures))
    forward.generate(request, **{**suite.QUICK, **settings})
    return forward


@pytest.mark.parametrize("images", (1, 2))
@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"steps": 3, "alg": "entropy", "decoding_pipeline": "dream"},
        {"alg": "topk_margin"},
        {"alg_p_threshold": 0.1},
        {"alg_p_threshold": 0.1, "use_original_confidence": False},
        {"alg": "autoregressive"},
        {"max_new_tokens": 1, "steps": 1},
    ),
)
def test_trajectory_and_replay_have_upstreams_bits(images, settings):
    sizes = ((84, 56), (56, 112))[:images]
    pictures = [[tiny.picture(i, s) for i, s in enumerate(sizes)]]
    forward = bound(pictures=pictures, **settings)
    t = forward.trajectory
    own = suite.reference(forward.adapter, forward.request, settings)
    assert torch.equal(t.tokens, own.tokens) and torch.equal(t.states[0], own.canvases)
    for step, wanted in enumerate(own.logits):
        with torch.no_grad():
            assert torch.equal(forward.replay(torch.tensor([0]), torch.tensor([step])), wanted)


@pytest.mark.parametrize("layer", range(3))
def test_gradients_are_finite_differences(layer):
    with real.exact():
        forward = bound(layer, torch.float64)
        for score in ("commit", "final"):
            fd(forward, 0, score)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_laid_out_as_upstream_does(size):
    made, picture = real.adapter(), tiny.picture(size=size)
    suite.check_ramps(made, size)
    theirs = made.processor.image_processor(images=[picture], return_tensors="pt")
    request = made.prepare([[picture]], ["what is this"])
    grid = torch.as_tensor(theirs["image_grid_thw"])
    assert torch.equal(request.extras[2][0], grid)
    assert request.layout.shapes == (tuple(int(n) // 2 for n in grid[0, 1:]),)
    pixels = torch.as_tensor(theirs["pixel_values"])
    assert torch.equal(request.pixels[0].view(pixels.shape), pixels)


def test_small_sides_are_refused_by_upstreams_processor():
    with pytest.raises(ValueError, match="28"):
        real.adapter().processor.image_processor(images=[tiny.picture(size=(20, 50))])


def test_a_batch_is_its_examples_one_by_one():
    suite.check_batch(bound)
