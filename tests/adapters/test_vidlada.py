"""VidLaDA against a double of our own: videos in the layout, a head on one block, late edits."""

import pytest
import tiny
import torch
from doubles import llada_checks as checks
from doubles import llada_v as base
from doubles import vidlada as double

import captum_dcam
from captum_dcam import Video
from captum_dcam.adapters.llada_v.packing import VIDEO
from captum_dcam.errors import InputError
from captum_dcam.model.forward import DenoisingForward

PROMPT, SIZE = "what is this ?", (90, 70)
QUICK = dict(gen_length=8, block_length=4, steps=4, stopping_criteria=[])


def adapter(dtype=torch.float32, **config):
    made = captum_dcam.wrap(
        double.model(dtype=dtype, **config), base.processor(config.get("tile", 48))
    )
    made.ids = base.IDS
    return made


def video(frames=3, size=SIZE):
    return Video([tiny.picture(n, size) for n in range(frames)])


def bound(made, shown=None, layer=1, **settings):
    forward = DenoisingForward(made, layer)
    forward.generate(made.prepare([shown or [video()]], [PROMPT]), **{**QUICK, **settings})
    return forward


def decoded(forward, monkeypatch, **settings):
    """The double's answer, its head's logits, and the ids behind every step."""
    made, request, after, original = forward.adapter, forward.request, [], base.first_stop

    def spy(answer, *args):
        after.append(answer.clone())
        return original(answer, *args)

    monkeypatch.setattr(base, "first_stop", spy)
    views = made._packing.arguments(request.pixels, request.extras[1])
    with checks.heard(made.model.lm_head) as logits:
        answer = made.model.generate(
            request.extras[0], tokenizer=made.tokenizer, **views, **{**QUICK, **settings}
        )
    monkeypatch.setattr(base, "first_stop", original)
    return answer, logits, torch.stack(after)


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"block_length": 8},
        {"gen_length": 2, "block_length": 2, "steps": 2},
        {"cfg_scale": 1.5},
        {"generation_suffix": "the dog"},
    ),
)
def test_recorded_and_replayed_as_decoded(monkeypatch, settings):
    forward = bound(adapter(), **settings)
    answer, logits, after = decoded(forward, monkeypatch, **settings)
    t, length = forward.trajectory, after.shape[1]
    before = torch.cat((torch.full((1, length), base.MASK), after[:-1]))
    assert torch.equal(t.tokens[:, :length], answer[:, :length])
    assert torch.equal(t.states[0][:, 0, :length], before) and t.unsettled is not None
    assert not t.unsettled.any()
    for step, seen in enumerate(logits):
        if len(seen) == 2:
            seen = seen[1:] + (settings["cfg_scale"] + 1) * (seen[:1] - seen[1:])
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        begin = int((before[step] == base.MASK).nonzero()[0, 0]) // seen.shape[1] * seen.shape[1]
        own = slice(begin, begin + seen.shape[1])
        assert torch.equal(got[:, own], seen)
        moved = before[step] != after[step]
        assert torch.equal(t.commit_step[0, :length] == step, moved)
        sure = seen[0].double()
        sure[:, [base.EOS, base.BOS, base.HEADER, base.HEADER_END]] = -torch.inf
        for p in moved.nonzero()[:, 0].tolist():
            wanted = float(sure[p - begin].softmax(-1)[answer[0, p]])
            assert float(t.confidence[0, p]) == pytest.approx(wanted, rel=1e-5)


def test_what_the_last_step_wrote_anew_never_settled(monkeypatch):
    """Nine tokens a step; behind a stop fewer are open, and the step takes some that stand."""
    own, made = dict(gen_length=18, steps=2, block_length=18), adapter(seed=1)
    whole = bound(made, **own).trajectory
    settings = {**own, "stopping_criteria": [f"tok{int(whole.tokens[0, 10])}"]}
    forward = bound(made, **settings)
    answer, _, after = decoded(forward, monkeypatch, **settings)
    t, length = forward.trajectory, answer.shape[1]
    assert torch.equal(t.tokens[:, :length], answer) and t.steps == len(after) == 2
    assert torch.equal(t.states[0][1, 0], after[0])
    anew = ((after[0] != after[1]) & (after[0] != base.MASK))[:length]
    assert anew.any(), "the stop did not make the decoder write anew"
    assert torch.equal(t.unsettled[0, :length], anew)


@pytest.mark.parametrize(("layer", "settings"), ((0, {}), (2, {}), (1, {"cfg_scale": 1.0})))
def test_gradients_equal_finite_differences(layer, settings):
    forward = bound(adapter(torch.float64), [video(2)], layer, **settings)
    for position in (0, 5):
        assert checks.against_differences(forward, position) < 1e-6


def test_frames_are_halved_with_a_newline_behind_every_row():
    """At the checkpoint's sizes: 27 patches of 14 px become 14 tokens of 27 px, of 384."""
    made = adapter(tile=384, image_grid_pinpoints=[(384, 384)])
    frames = video(2, (192, 96))
    request = made.prepare([[frames, tiny.picture(5, SIZE)]], [PROMPT])
    one, two, *image = request.layout.grids
    assert one.shape == two.shape == (14, 14) and (one.image, two.image) == (0, 1)
    assert [g.image for g in image] == [2, 2] and image[0].shape == (27, 27)
    start = int(one.positions[0, 0])
    rows = torch.arange(14)[:, None]
    assert torch.equal(one.positions, start + rows * 15 + torch.arange(14))
    assert torch.equal(two.positions, one.positions + 14 * 15)
    assert float(one.x_edges[0, 1]) == 27 * 192 / 384 and float(one.y_edges[-1, 1]) == 378 / 4
    with torch.no_grad():
        embeds = made.embed(request.pixels, *request.extras).embeds[0]
    assert len(embeds) == request.layout.prefix_length
    newline = made.model.model.image_newline
    for grid in (one, two):
        assert torch.equal(embeds[grid.positions[:, -1] + 1], newline.expand(14, -1))
    frame = base.ImageProcessor(384).preprocess(frames[1])["pixel_values"]
    with torch.no_grad():
        seen = made.model.model.mm_projector(made.model.model.vision_tower(frame))
    # bilinear halving of 27 to 14: token (0, 0) lies at 0.4643 patches along both sides
    near, far = 1 - 13 / 28, 13 / 28
    corner = seen[0].view(27, 27, -1)[:2, :2]
    wanted = near * near * corner[0, 0] + far * far * corner[1, 1]
    wanted = wanted + near * far * (corner[0, 1] + corner[1, 0])
    assert torch.allclose(embeds[two.positions[0, 0]], wanted, atol=1e-5)
    again = made.prepare_again(request, list(request.images[0]))
    assert torch.equal(again.pixels, request.pixels)


def test_maps_of_a_video_are_maps_of_its_frames():
    forward = bound(adapter())
    found = captum_dcam.explain_generation(forward, [0])
    assert len(found.maps) == 3 and all(bool(m.any()) for m in found.maps)


@pytest.mark.parametrize(
    "change", ({"mm_newline_position": "one_token"}, {"add_faster_video": True})
)
def test_other_packings_of_videos_are_refused(change):
    made = adapter(**change)
    with pytest.raises(InputError, match="give load_pretrained_model overwrite_config"):
        made.prepare([[video()]], [PROMPT])
    assert made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    assert set(VIDEO) == {"mm_spatial_pool_stride", "mm_spatial_pool_mode", "mm_newline_position"}
