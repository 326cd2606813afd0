"""Generations that others ran: read from ids and steps, replayed, written."""

import math

import pytest
import tiny
import torch
from doubles import block_checks, diffusion_vl, mineru_diffusion, nemotron_diffusion_vlm

import captum_dcam
from captum_dcam.errors import (
    InputError,
    InputTypeError,
    MethodError,
    ReplayError,
    SavedError,
)
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.reveals import Reveals, retrace, reveals_of

PROMPT = "what is this red circle"
PICTURE = tiny.picture(size=(84, 56))


def double(module, **changes):
    model = module.model(scale=3.0) if module is not diffusion_vl else module.model()
    return captum_dcam.wrap(model, module.processor(), **changes)


MADE = {
    "mini": (lambda: tiny.adapter("prefix"), "describe the image .", dict(gen_length=8)),
    "mini, full": (
        lambda: tiny.adapter("none"),
        "describe the image .",
        dict(gen_length=8, steps=4),
    ),
    "block": (
        lambda: double(diffusion_vl),
        PROMPT,
        dict(gen_length=9, remasking_strategy="low_confidence_dynamic", confidence_threshold=0.05),
    ),
    "causal block": (
        lambda: double(nemotron_diffusion_vlm, block_length=4),
        PROMPT,
        dict(gen_length=8, threshold=0.3),
    ),
}


@pytest.fixture(scope="module", params=MADE)
def written(request):
    """A generation, bound."""
    make, prompt, settings = MADE[request.param]
    forward = DenoisingForward(make(), 1)
    forward.generate(forward.adapter.prepare([[PICTURE]], [prompt]), **settings)
    return forward


def test_what_is_written_is_read_and_replayed(written, tmp_path):
    was = written.trajectory
    told = reveals_of(written.adapter, was)
    told.save(tmp_path / "answer.json")
    read = Reveals.load(tmp_path / "answer.json")
    assert read == told
    forward = written.twin()
    now = retrace(forward, read, written.request)
    for name in ("tokens", "commit_step"):
        assert torch.equal(getattr(now, name), getattr(was, name))
    assert torch.equal(now.states[0], was.states[0])
    assert (now.lengths, now.feasible, now.cache) == (was.lengths, was.feasible, was.cache)
    assert now.read_at is was.read_at is None or torch.equal(now.read_at, was.read_at)
    assert torch.allclose(now.confidence, was.confidence, atol=1e-5)
    maps = [captum_dcam.explain_generation(f, tagger="phrases").maps for f in (written, forward)]
    for one, other in zip(*maps, strict=True):
        assert one.any() and torch.allclose(one, other, atol=1e-4)


def test_an_answer_with_its_steps_is_explained_in_one_call():
    make, asked, settings = MADE["causal block"]
    adapter = make()
    was = adapter.generate(adapter.prepare([[PICTURE]], [asked]), **settings)
    told = reveals_of(adapter, was)
    given = dict(answer=told, layer=1, tagger="phrases")
    found = captum_dcam.explain(adapter, PICTURE, asked, **given)
    assert found.trajectory.steps == was.steps and not found.trajectory.forced
    with pytest.raises(InputError, match="gen_length beside an answer that is given"):
        captum_dcam.explain(adapter, PICTURE, asked, gen_length=4, **given)


def test_other_probabilities_are_no_replay(written):
    told = reveals_of(written.adapter, written.trajectory)
    stops = written.adapter.stop_ids
    at = next(i for i, t in enumerate(told.tokens) if t not in stops)
    logs = list(told.logprobs)
    logs[at] = math.log(0.5 * math.exp(logs[at]))
    with pytest.raises(ReplayError, match=rf"at position {at} had .* by its logprob .*top_p"):
        retrace(written.twin(), Reveals(told.tokens, told.steps, logs), written.request)
    logs[at] = None  # not known: not compared
    retrace(written.twin(), Reveals(told.tokens, told.steps, logs), written.request)


def test_mineru_tells_its_own_steps():
    """Its ``step_map`` counts from 1."""
    adapter = double(mineru_diffusion, block_length=4)
    request = adapter.prepare([[PICTURE]], [PROMPT])
    settings = dict(gen_length=8)
    own = adapter.options(adapter.checked(settings, torch.Generator()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(block_checks.drawn(0))
        given = adapter.inputs(request.pixels, request.extras)
        whole = {**own, "stopping_criteria": None, "gen_length": 8}
        tokens, step_map, _ = adapter.model.generate(**given, **whole)
    forward = DenoisingForward(adapter, 1)
    now = retrace(forward, Reveals(tokens[0], step_map[0] - 1), request)
    was = adapter.generate(request, generator=torch.Generator().manual_seed(0), **settings)
    assert torch.equal(now.states[0], was.states[0])
    assert torch.allclose(now.confidence, was.confidence, atol=1e-5)
    with pytest.raises(InputError, match=r"step 0 reveals no token .*with none left out"):
        retrace(forward, Reveals(tokens[0], step_map[0]), request)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    (
        (([], []), InputError, "no token"),
        (([1, 2], [0]), InputError, "1 steps for 2 tokens"),
        (([1, 2.5], [0, 0]), InputTypeError, "tokens has 2.5"),
        (("ab", [0, 0]), InputTypeError, "tokens has 'ab'"),
        (([1], None), InputTypeError, "steps has None"),
        (([1], [10**9]), InputError, "expected steps below"),
        (([1], [0], [0.5]), InputError, r"logprobs\[0\] is 0.5"),
        (([1], [0], [math.nan]), InputError, r"logprobs\[0\] is nan"),
        (([1], [0], [-1.0, -1.0]), InputError, "2 of them, expected one for each of the 1 tokens"),
        (([1], [0], "x"), InputError, "1 of them|'x'|logprobs"),
    ),
)
def test_what_is_no_answer(given, kind, said):
    with pytest.raises(kind, match=said):
        Reveals(*given)


@pytest.mark.parametrize(
    "content", ("[]", "{}", '{"tokens": [1]}', '{"tokens": [1], "steps": [0], "more": 1}', "{")
)
def test_what_is_no_file(content, tmp_path):
    path = tmp_path / "answer.json"
    path.write_text(content)
    with pytest.raises(SavedError):
        Reveals.load(path)


@pytest.fixture(scope="module")
def blocks():
    """Adapters of blocks of 4: from the sequence's start, with two tokens of the prompt in the
    first, and behind the prompt on a causal context; with their requests."""
    made = double(diffusion_vl), double(nemotron_diffusion_vlm, block_length=4)
    return [(a, a.prepare([[PICTURE]], [PROMPT])) for a in made]


@pytest.mark.parametrize(
    ("which", "steps", "said"),
    (
        (0, [0, 1, 2, 2, 3], "has 5 tokens, its last block ends at 6"),
        (0, [0, 2, 3, 3, 4, 5], "step 1 reveals no token"),
        (0, [0, 0, 0, 1, 1, 1], r"step 0 reveals tokens \[0, 1, 2\], of block 0, 1"),
        (0, [2, 2, 0, 0, 1, 1], r"step 0 reveals tokens \[2, 3\], of block 1 behind block 0"),
        (0, [0, 1, 2, -1, 3, 3], "token 3 of the answer has step -1"),
        (1, [0, 0, 1, 2], r"reveals tokens \[0, 1\]: expected token 0, the first of its block"),
        (1, [1, 0, 2, 2], r"reveals tokens \[1\]: expected token 0"),
    ),
)
def test_steps_that_no_block_decoder_takes(blocks, which, steps, said):
    adapter, request = blocks[which]
    forward = DenoisingForward(adapter, 1)
    with pytest.raises(InputError, match=said):
        retrace(forward, Reveals([10] * len(steps), steps), request)
    assert not forward.bound


def test_ids_of_another_vocabulary_and_batches(blocks):
    adapter, request = blocks[0]
    forward = DenoisingForward(adapter, 1)
    with pytest.raises(InputError, match=r"token id 99999 is none of diffusion_vl's, 0 to 119"):
        retrace(forward, Reveals([99999, 1], [0, 0]), request)
    with pytest.raises(InputError, match="2 examples"):
        retrace(
            forward, Reveals([1, 1], [0, 0]), request.rows([0, 0], request.pixels.repeat(2, 1, 1))
        )


def test_a_generation_that_ids_and_steps_do_not_tell(blocks):
    adapter, request = blocks[0]
    forward = DenoisingForward(adapter, 1)
    with pytest.raises(InputError, match="was given, not generated"):
        reveals_of(adapter, force(forward, [10] * 6, request))
    found = adapter.generate(request, gen_length=4)
    found.states[0][1, 0, 0] = 11  # written over later
    with pytest.raises(MethodError, match="writes over tokens"):
        reveals_of(adapter, found)


def test_a_family_without_masks(blocks, monkeypatch):
    adapter, request = blocks[1]
    monkeypatch.setattr(type(adapter), "mask_id", None)
    with pytest.raises(MethodError, match=r"has no mask token.*as a text or as ids"):
        retrace(DenoisingForward(adapter, 1), Reveals([5, 6, 7, 8], [0, 1, 1, 1]), request)
