"""Answers with holes in every family: its own decoding, started from a canvas that is partly given.

A canvas without given tokens decodes as the family's plain generation; given ones stand in every
state and stay; what fills the holes is read, replayed, at the step that committed it.
"""

from pathlib import Path

import pytest
import torch

from captum_dcam.errors import InputError, MethodError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.infill import given_by
from captum_dcam.model.trajectory import NO_STEP, Given
from captum_dcam.testing.__main__ import cases_in

CASES = {case.name: case for case in cases_in(Path(__file__).parent / "cases")}
#: one mode per decoding loop
LOOPS = (
    *("mini, prefix", "lavida-llada, prefix", "lavida-dream, prefix", "lavida-dream, full"),
    *("lavida_o, full", "llada_v, full, guided", "mmada, full", "dream_vl, full"),
    *("diffusion_vl, static", "mineru_diffusion, a token a step", "sdar_vl, sequential"),
    "diffusion_gemma, 2 canvases",
)


def filled(case, adapter, given, **changes):
    """A forward with the case's generation, started with given tokens."""
    forward = DenoisingForward(adapter, 0)
    request = adapter.prepare([[case.picture()]], [case.prompt])
    forward.generate(request, generator=case.generator(), given=given, **case.settings | changes)
    return forward


@pytest.mark.parametrize("name", LOOPS)
def test_a_canvas_is_filled_by_the_familys_own_decoding(name):
    case = CASES[name]
    adapter = case.make(torch.float32)
    plain = case.bound(adapter).trajectory
    length = plain.tokens.shape[1]
    nothing = torch.zeros(1, length, dtype=torch.bool)
    same = filled(case, adapter, Given(torch.zeros_like(plain.tokens), nothing)).trajectory
    for one, other in zip(same.states, plain.states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(same.tokens, plain.tokens) and torch.equal(same.confidence, plain.confidence)
    assert torch.equal(same.commit_step, plain.commit_step) and same.lengths == plain.lengths

    place = torch.arange(length)[None]
    at = (place % 3 == 1) | ((place >= 4) & (place < 8) & (length >= 8))  # a whole block, too
    word = next(t for t in plain.tokens[0].tolist() if t not in adapter.stop_ids)
    given = Given(torch.full_like(plain.tokens, word), at)
    adapter.unverified = True  # the replay is checked
    changes = {"denoising_steps": 4} if "denoising_steps" in case.settings else {}
    forward = filled(case, adapter, given, **changes)
    made = forward.trajectory
    assert not adapter.unverified
    assert torch.equal(made.given, at) and torch.equal(made.tokens[at], given.tokens[at])
    canvas = made.states[0]
    seen = at.expand_as(canvas) if made.read_at is None else at & made.read_at
    assert bool((canvas == given.tokens)[seen].all())
    assert made.commits(0, [1]) == (NO_STEP,) and bool((made.confidence[at] == 0).all())
    if adapter.mask_id is not None:
        assert not bool((made.tokens == adapter.mask_id).any())
        assert bool((canvas[0] == adapter.mask_id)[~at].all()) or made.confidence[0, 0] > 0
    hole = int((made.confidence[0] > 0).nonzero()[0, 0])
    target = hole, int(made.tokens[0, hole])
    logits = forward(forward.request.pixels, *forward.arguments(target))
    state = made.state_at(torch.tensor([0]), made.commit_step[0, [hole]])
    odds = adapter.confidence_of(logits, made.tokens, *state)
    assert float(odds[0, hole].detach()) == pytest.approx(float(made.confidence[0, hole]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("llada_v, Fast-dLLM", {}, MethodError, "Fast-dLLM makes a canvas of its own"),
        ("lavida_o, use_fast_dlm", {}, InputError, "use_fast_dlm takes no draft"),
        ("llada_v, full", {"stopping_criteria": ["x"]}, InputError, "would cut the given words"),
        ("llada_v, full", {"generation_suffix": "red"}, InputError, "write it at the answer's end"),
        ("mmada, full, guided", {}, InputError, "cfg_scale is 1.5, .* leave it at 0"),
        ("lavida-dream, prefix", {"schedule": "shift"}, InputError, "4 steps .* for 2 holes"),
        ("sdar_vl, sequential", {}, InputError, "denoising_steps is 3 .* give denoising_steps=4"),
        ("mineru_diffusion, dynamic", {}, InputError, "denoising_steps is 2 for blocks of 4"),
    ],
)
def test_what_a_decoding_cannot_do_beside_given_tokens_is_refused(name, changes, error, message):
    adapter = CASES[name].make(torch.float32)
    at = torch.ones(1, 8, dtype=torch.bool)
    at[:, 4:6] = False
    given = Given(torch.full((1, 8), 7), at)
    with pytest.raises(error, match=message):
        filled(CASES[name], adapter, given, **changes)


def test_a_family_that_writes_from_left_to_right_says_why_it_cannot():
    adapter = CASES["qwen2_vl, full"].make(torch.float32)
    with pytest.raises(MethodError, match=r"cannot fill the holes of 'a \[MASK\]': .* left to rig"):
        given_by(adapter, "a [MASK]")
