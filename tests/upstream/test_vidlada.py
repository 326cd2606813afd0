"""VidLaDA on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_VIDLADA=/folder/VidLaDA pytest tests/upstream/test_vidlada.py``; skipped
without the variable. The package is under ``train/`` and needs requests and einops.
"""

import os
import sys
from pathlib import Path

import pytest
import tiny
import torch
from doubles import llada_checks as checks
from doubles import llada_v as double
from upstream import made_llada_v as real

import captum_dcam
from captum_dcam import Video
from captum_dcam.adapters.common.text import LLADA
from captum_dcam.adapters.llada_v.loading import video_module
from captum_dcam.adapters.llada_v.packing import VIDEO
from captum_dcam.model.forward import DenoisingForward

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_VIDLADA")
pytestmark = [
    pytest.mark.skipif(
        FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_VIDLADA names no checkout of VidLaDA"
    ),
    pytest.mark.filterwarnings("ignore"),
]
QUICK = dict(gen_length=8, block_length=4, steps=4, stopping_criteria=[])
SIZE, VOCABULARY = (90, 70), 126464


@pytest.fixture(scope="module")
def upstream():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(Path(FOLDER) / "train"))
        yield video_module()


def adapter(upstream, dtype=torch.float32, **changes):
    """The upstream language model, packing and decoder, behind the double's small tower."""
    cls = upstream.LlavaLLaDAVideoModelLM
    changes = {**VIDEO, **changes}
    made = real.model(cls, real.config(cls.config_class, VOCABULARY, **changes), dtype)
    found = captum_dcam.wrap(made, double.processor(), system="describe the image")
    assert found.ids == LLADA and found.takes_video
    return found


def video(frames=3):
    return Video([tiny.picture(n, SIZE) for n in range(frames)])


def heard(made, request, **settings):
    """Upstream's answer, its head's logits, and its canvas of ids before every step and behind the
    last."""
    views = made._packing.arguments(request.pixels, request.extras[1])
    inner, canvases = made.model.model, []

    def note(*_):
        frame = sys._getframe()
        while frame.f_code.co_name != "generate_with_embeds":
            frame = frame.f_back
        canvases.append(frame.f_locals["x"][:, request.layout.prefix_length :].clone())

    handle = inner.register_forward_pre_hook(note)
    with checks.heard(made.model.lm_head) as logits:
        answer = made.model.generate(
            request.extras[0], tokenizer=made.tokenizer, **views, **settings
        )
    handle.remove()
    return answer, logits, torch.stack(canvases)


def check_replay(made, shown, **settings):
    settings = {**QUICK, **settings}
    forward = DenoisingForward(made, 1)
    request = made.prepare([shown], ["what is this ?"])
    assert made.embed(request.pixels, *request.extras).embeds.shape[1] == (
        request.layout.prefix_length
    )
    forward.generate(request, **settings)
    t = forward.trajectory
    answer, logits, canvases = heard(made, request, **settings)
    length = min(answer.shape[1], settings["gen_length"])
    assert torch.equal(t.tokens[:, :length], answer[:, :length])
    assert t.steps == len(logits) and torch.equal(t.states[0], canvases)
    for step, seen in enumerate(logits):
        seen = seen.float()
        if len(seen) == 2:
            seen = seen[1:] + (settings["cfg_scale"] + 1) * (seen[:1] - seen[1:])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        masks = canvases[step, 0, : settings["gen_length"]] == double.LLADA.mask
        begin = int(masks.nonzero()[0, 0]) // seen.shape[1] * seen.shape[1]
        assert torch.equal(got[:, begin : begin + seen.shape[1]], seen)
    return t, answer


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"steps": 6, "block_length": 8},
        {"cfg_scale": 1.5},
        {"gen_length": 2, "block_length": 2, "steps": 2},
        {"generation_suffix": "the dog"},
    ),
)
def test_videos_are_recorded_and_replayed_as_decoded(upstream, settings):
    check_replay(adapter(upstream), [video()], **settings)


def test_images_are_those_of_llada_v(upstream):
    check_replay(adapter(upstream), [tiny.picture(0, SIZE)])
    check_replay(adapter(upstream), [video(2), tiny.picture(0, SIZE)])


def test_the_answer_ends_before_the_stop(upstream):
    made = adapter(upstream)
    whole, _ = check_replay(made, [video()])
    stop = f"tok{int(whole.tokens[0, 6])}"
    found, answer = check_replay(made, [video()], stopping_criteria=[stop])
    assert answer.shape[1] < 8
    assert found.tokens[0, answer.shape[1] :].tolist() == [LLADA.eos] * (8 - answer.shape[1])


def test_frames_lie_where_the_layout_says(upstream):
    """A token is its own patches' mean; upstream's halving mixes neighbours of its frame alone."""
    made = adapter(upstream)
    request = made.prepare([[video(3)]], ["what is this ?"])
    pixels = request.pixels.clone().requires_grad_()
    embeds = made.embed(pixels, *request.extras).embeds
    newlines = embeds[0, request.layout.grids[1].positions[:, -1] + 1]
    assert torch.equal(newlines, made.model.model.image_newline.expand_as(newlines))
    owners = made.pixel_tokens(request)
    for number, grid in enumerate(request.layout.grids):
        for row in range(2):
            for column in range(2):
                at = int(grid.positions[row, column])
                (slope,) = torch.autograd.grad(embeds[0, at].sum(), pixels, retain_graph=True)
                seen = slope[0].abs()
                assert not seen[[n for n in range(3) if n != number]].any()
                own = owners.expand_as(pixels)[0] == number * 4 + row * 2 + column
                assert seen[own].sum() > 0.5 * seen.sum()
