"""Block diffusion on a causal prefix: where blocks lie, what is recorded, and what is refused."""

import pytest
import tiny
import torch
from doubles import diffusion_vl, fast_dvlm, mineru_diffusion, nemotron_diffusion_vlm, sdar_vl

import captum_dcam
from captum_dcam.adapters.common.block import BlockLog, Blocks
from captum_dcam.adapters.common.block_loop import REPEATS, repeated
from captum_dcam.errors import InfeasibleStepError, InputError, SettingError, TargetError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target

MASK = 9
PROMPT = "what is this red circle"  # with its image 30 tokens: two more than whole blocks of 4


def adapter(**changes):
    return captum_dcam.wrap(diffusion_vl.model(**changes), diffusion_vl.processor())


def prepared(made, prompt=PROMPT):
    return made.prepare([[tiny.picture(size=(84, 56))]], [prompt])


def bound(made=None, **settings):
    forward = DenoisingForward(adapter() if made is None else made, 1)
    forward.generate(prepared(forward.adapter), **{"gen_length": 8, **settings})
    return forward


# -- where blocks lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", range(1, 14))
@pytest.mark.parametrize("length", (1, 3, 4, 8))
def test_blocks_counted_from_the_start(prompt, length):
    blocks = Blocks(length, prompt, 0)
    assert blocks.stored == prompt // length * length
    total = blocks.whole(5)
    assert total >= 5 and (prompt + total) % length == 0 and total - 5 < length
    places = [p for n in range(20) for p in range(*blocks.span(n))]
    assert places == list(range(len(places)))
    whole = torch.ones(9, 9).tril().repeat_interleave(length, 0).repeat_interleave(length, 1)
    stop = blocks.stored + 2 * length
    if stop <= len(whole):
        assert torch.equal(blocks.seen(blocks.stored, stop), whole[blocks.stored : stop, :stop] > 0)


@pytest.mark.parametrize("prompt", (1, 5, 8, 11))
def test_blocks_behind_a_prompt_that_is_prefilled_whole(prompt):
    """Its own blocks are counted back from its end, the first perhaps not whole."""
    blocks = Blocks(4, prompt, prompt)
    assert (blocks.stored, blocks.tail, blocks.whole(5)) == (prompt, 0, 8)
    seen = blocks.seen(0, prompt + 8)
    for query in range(prompt + 8):
        end = prompt + ((query - prompt) // 4 + 1) * 4
        assert seen[query].tolist() == [key < end for key in range(prompt + 8)]


# -- what is recorded -----------------------------------------------------------------------------


def logits(rows, token):
    """(1, rows, 10) with 2.0 at a token."""
    out = torch.zeros(1, rows, 10)
    out[..., token] = 2.0
    return out


def test_a_token_commits_at_its_last_change_and_a_storing_pass_is_no_step():
    """An editing decoder writes over what it has written; the second block is left with a mask."""
    log = BlockLog(MASK, blocks=Blocks(4, 6, 0), total=6)
    for number, own, token in (
        (0, [[MASK, MASK]], 3),
        (0, [[3, MASK]], 4),
        (0, [[5, 4]], 6),  # the visible token was changed, and is once more
    ):
        log.step(number, torch.tensor(own))
        log.scored(logits(4, token))  # of the prompt's tail, too
    log.stored(0, torch.tensor([[6, 4]]))
    log.step(1, torch.tensor([[MASK] * 4]))
    log.scored(logits(4, 7))
    log.close(torch.tensor([[6, 4, 7, MASK, 7, 7]]))
    assert log.tokens.tolist() == [[6, 4, 7, MASK, 7, 7]]
    assert log.spans == [(0, 2), (0, 2), (0, 2), (2, 6)]
    assert log.commit_step.tolist() == [[2, 1, 3, 3, 3, 3]]
    assert log.read_at[:, 0].sum(1).tolist() == [2, 2, 2, 4]
    sure = float(logits(1, 7)[0, 0].softmax(-1)[7])
    assert log.confidence[0].tolist() == pytest.approx([sure, sure, sure, 0, sure, sure])


def test_blocks_that_were_not_begun_are_cut():
    log = BlockLog(MASK, blocks=Blocks(2, 4, 0), total=8)
    log.step(0, torch.tensor([[MASK, MASK]]))
    log.scored(logits(2, 1))
    log.stored(0, torch.tensor([[1, 1]]))
    log.close(torch.tensor([[1, 1, MASK]]))
    assert log.states.shape == (1, 1, 2) and log.confidence.shape == (1, 2)


def test_the_answer_ends_with_the_block_that_ends_it():
    made = adapter()
    end = made.model.config.end_token_id
    made.model.lm_head.weight.data[end] = (
        made.model.lm_head.weight[10] * 1.5
    )  # token 10 comes third
    found = bound(made, gen_length=40).trajectory
    assert end in found.tokens[0, -4:].tolist() and found.tokens.shape[1] < 40
    assert (found.tokens.shape[1] + 30) % 4 == 0 and end in made.stop_ids


def test_calls_are_the_prefill_and_the_steps():
    forward = bound(steps=2)
    found = forward.trajectory
    assert found.lengths == (28, *[4] * found.steps) and found.own_calls
    assert found.feasible == (0,)
    (row,) = target_gradients(forward, [Target("x", (2,), (5,))])
    assert row.gradients[0].any()
    for step in range(found.steps):
        with pytest.raises(InfeasibleStepError, match="4 tokens from position 28"):
            found.check_call(step + 1)


def test_a_step_inside_a_stored_block_is_not_read():
    forward = bound()
    last = forward.trajectory.steps - 1
    with pytest.raises(InfeasibleStepError, match=rf"step {last} computes no logits of token 0"):
        forward.arguments((0, 5), score=last)
    assert forward.trajectory.step_of(0, 0, "final") == 1


def test_a_given_answer_may_end_inside_a_block():
    """What ends an answer fills the block, and is no token of it."""
    made = adapter()
    request = prepared(made)
    found = force(DenoisingForward(made, 1), "this is red", request)
    assert found.tokens.shape == (1, 3) and found.confidence.all()
    end = made.processor.tokenizer.pad_token_id
    filled = torch.tensor([[*found.tokens[0].tolist(), end, end, end]])
    with torch.no_grad():
        memory = made.prefill(made.embed(request.pixels, *request.extras))
        short, whole = (made.denoise(memory, ids) for ids in (found.tokens, filled))
    assert torch.allclose(short, whole[:, :3], atol=1e-5)  # kernels depend on the rows' number


@pytest.mark.parametrize("name", ("logit_lens", "attention", "tam", "saliency", "cp_lrp"))
def test_methods_run(name):
    forward = bound()
    token = int(forward.trajectory.tokens[0, 5])
    maps = method(name).attribute(AttributionTask(forward, (Target("x", (5,), (token,)),))).maps[0]
    assert maps.shape[-2:] == (2, 3) and maps.isfinite().all() and maps.any()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "said"),
    (
        (64, "prefill holds 0 of the prompt's 30 tokens, whole blocks of 64: the other 30"),
        (16, "prefill holds 16 of the prompt's 30 .*put 4 tokens or more of text behind it"),
    ),
)
def test_an_image_that_no_call_holds(length, said):
    with pytest.raises(InfeasibleStepError, match=rf"image span ends at 20 but the {said}"):
        prepared(adapter(bd3lm_block_size=length))


@pytest.mark.parametrize(
    ("given", "said"),
    (
        (dict(block_length=8), "block_length is 8: .*blocks of 4; it is the model's own"),
        (dict(gen_length=300), "302 are asked for .*whole blocks of 4.*context is 256"),
        (dict(temperature=1.0), "sampling needs a generator"),
        (dict(cfg_scale=1.0), "unknown setting 'cfg_scale' of DiffusionVL: upstream's generate"),
        (dict(steps=0), "steps is 0"),
        (dict(top_k=0), "top_k is 0"),
        (dict(remasking_strategy="sequential"), "remasking_strategy is 'sequential'"),
    ),
)
def test_settings_that_cannot_work(given, said):
    made = adapter()
    request = prepared(made)
    ran = []
    made.model.register_forward_hook(lambda *_: ran.append(1))
    made.decoder.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises((InputError, SettingError), match=said):
        made.generate(request, **{"gen_length": 8, **given})
    assert not ran


@pytest.fixture
def unsettled():
    """A model that writes the mask everywhere, so that no token ever settles."""
    made = adapter()
    at = torch.tensor([made.mask_id])
    made.head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, at, 99.0))
    return made


def test_tokens_that_never_settle_are_not_explained(unsettled):
    found = bound(unsettled, gen_length=2).trajectory
    assert found.tokens.tolist() == [[unsettled.mask_id] * 2] and not found.confidence.any()
    with pytest.raises(TargetError, match="no word to explain"):
        captum_dcam.explain(unsettled, tiny.picture(size=(84, 56)), PROMPT, gen_length=2)
    with pytest.raises(InputError, match=r"left with masks when its steps ran out.*more steps"):
        bound(unsettled, gen_length=8)


def test_a_model_of_another_class():
    from captum_dcam.adapters.diffusion_vl import DiffusionVLAdapter

    with pytest.raises(InputError, match="is a Linear: expected DiffusionVL_Qwen2_5_VL_For"):
        DiffusionVLAdapter(torch.nn.Linear(2, 2), diffusion_vl.processor())


# -- a prompt that is prefilled whole --------------------------------------------------------------


def whole(length=mineru_diffusion.LENGTH, **settings):
    """MinerU-Diffusion's double with a generation."""
    model = mineru_diffusion.model(scale=4.0)
    made = captum_dcam.wrap(model, mineru_diffusion.processor(), block_length=length)
    return bound(made, generator=torch.Generator().manual_seed(0), **settings)


def test_a_block_may_be_longer_than_a_prompt_that_is_prefilled_whole():
    found = whole(40, gen_length=3, dynamic_threshold=0.1).trajectory
    assert found.tokens.shape == (1, 40)
    assert found.lengths == (32, *[40] * found.steps) and found.feasible == (0,)


@pytest.mark.parametrize(
    ("given", "said"),
    (
        (dict(temperature=0), "temperature is 0: .*above 0, .*no greedy mode"),
        (dict(block_length=8), "block_length is 8: .*blocks of 4; give it to load or wrap"),
        (dict(remasking_strategy="sequential"), "upstream has low_confidence_dynamic alone"),
        (dict(generator=None), "sampling needs a generator"),
    ),
)
def test_sampled_settings_that_cannot_work(given, said):
    made = whole().adapter
    draws = torch.Generator().manual_seed(0)
    with pytest.raises((InputError, SettingError), match=said):
        made.generate(prepared(made), **{"gen_length": 8, "generator": draws, **given})


@pytest.mark.parametrize("length", (0, 2.5, "4"))
def test_a_block_length_that_is_none(length):
    with pytest.raises((InputError, TypeError), match=r"block_length is"):
        whole(length)


# -- a loop that is a script's ---------------------------------------------------------------------


def scripted(length=sdar_vl.LENGTH):
    model = sdar_vl.model(scale=3.0)
    return captum_dcam.wrap(model, sdar_vl.processor(), block_length=length)


def test_fewer_steps_than_tokens_where_they_could_write_over_the_prompt():
    made = scripted()
    request = prepared(made)
    assert request.layout.prefix_length % 4 == 1
    with pytest.raises(InputError, match=r"denoising_steps is 2 .*last 1 stand in the first.*=4"):
        made.generate(request, gen_length=4, denoising_steps=2)
    found = made.generate(request, gen_length=4, steps=2, remasking_strategy="sequential")
    assert found.commit_step.tolist() == [[0, 0, 1, 2, 2, 3, 3]]
    other = made.prepare([[tiny.picture(size=(84, 56))]], [f"{PROMPT} this is a"])
    assert other.layout.prefix_length % 4 == 0
    assert made.generate(other, gen_length=4, steps=1).steps == 1


def test_a_block_left_with_masks():
    made = scripted()
    at = torch.tensor([made.mask_id])
    made.head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, at, 99.0))
    with pytest.raises(InputError, match="ends at position 3 of the answer was left with masks"):
        made.generate(prepared(made), gen_length=4)


def test_what_ends_in_copies():
    assert repeated([1, 2] * REPEATS) and repeated([3, *[7] * REPEATS])
    assert not repeated([1, 2] * (REPEATS - 1)) and not repeated([7] * (REPEATS - 1))
    assert not repeated([*[7] * REPEATS, 3])


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (dict(vision_aspect_ratio="square"), "vision_aspect_ratio is 'square': expected anyres"),
        (dict(image_token_index=3), "the tokenizer's id of <image> is .*the model's is 3"),
    ),
)
def test_another_processor_or_configuration(change, said):
    model = sdar_vl.model()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(InputError, match=said):
        prepared(captum_dcam.wrap(model, sdar_vl.processor(), block_length=4))


def test_tiles_of_another_size():
    parts = sdar_vl.processor()
    parts.image_processor.size = {"height": 56, "width": 56}
    with pytest.raises(InputError, match="tiles of 56 px, the vision tower takes 28"):
        captum_dcam.wrap(sdar_vl.model(), parts)


@pytest.mark.parametrize("make", (adapter, lambda: whole().adapter, scripted))
def test_demos_are_settings_of_their_family(make):
    made = make()
    demo = made.facts.decodings["demo"]
    read = made.checked(made.decoding("demo", {}), torch.Generator())
    assert {name: read[name] for name in demo} == demo


# -- all families of blocks ------------------------------------------------------------------------

FAMILIES = {
    "diffusion_vl": adapter,
    "mineru_diffusion": lambda: whole_adapter(),
    "sdar_vl": lambda: scripted(),
    "nemotron_diffusion_vlm": lambda: causal(nemotron_diffusion_vlm),
    "fast_dvlm": lambda: causal(fast_dvlm),
}


def whole_adapter(length=4):
    model = mineru_diffusion.model(scale=4.0)
    return captum_dcam.wrap(model, mineru_diffusion.processor(), block_length=length)


def causal(double, length=4, **changes):
    model = double.model(scale=3.0, **changes)
    return captum_dcam.wrap(model, double.processor(), block_length=length)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def drawn(made, **settings):
    return bound(made, generator=torch.Generator().manual_seed(0), **settings)


def test_a_step_of_another_block(family):
    forward = drawn(family)
    last = forward.trajectory.steps - 1
    with pytest.raises(InfeasibleStepError, match=rf"step {last} computes no logits of token 0"):
        forward.arguments((0, 5), score=last)
    with pytest.raises(
        InfeasibleStepError, match=rf"{last + 1}: this generation has {last + 1} st"
    ):
        forward.arguments((0, 5), score=last + 1)
    with pytest.raises(InfeasibleStepError, match="hooked sequence has 4 tokens from position"):
        captum_dcam.explain_generation(forward, step=1, tagger="phrases")


def test_the_commit_of_a_token_that_never_settles(family):
    """By whatever name: a position, a pair, a target of one's own, Captum's target."""
    if family.family == "sdar_vl":
        pytest.skip("its script refuses such a block")
    at = torch.tensor([family.mask_id])
    family.head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, at, 99.0))
    forward = drawn(family, gen_length=2)
    assert not forward.trajectory.confidence.any()
    for words in (0, [1], (0, 10), [Target("x", (0,), (10,))], [Target("x", (0, 1), (10, 11))]):
        with pytest.raises(TargetError, match=r"token \d of the answer never settled.*more steps"):
            captum_dcam.explain_generation(forward, words, tagger="phrases")
    with pytest.raises(TargetError, match="never settled"):
        forward.arguments((0, 10))
    assert len(forward.arguments((0, 10), score="final")) == len(forward.arguments(score="final"))


def test_an_image_in_the_tail_of_a_scripts_prompt():
    """Images are in the prefill, which holds whole blocks, wherever these are counted from 0."""
    with pytest.raises(InfeasibleStepError, match=r"prefill holds 128 of the prompt's 145 tokens"):
        prepared(scripted(64))
    with pytest.raises(InfeasibleStepError, match=r"prefill holds 0 of .* take a smaller block"):
        prepared(scripted(200))


@pytest.mark.parametrize("make", (whole_adapter, lambda n: causal(fast_dvlm, n)))
def test_a_block_that_no_context_holds(make):
    made = make(300)
    with pytest.raises(InputError, match=r"300 are asked for \(whole blocks of 300\).*is 256"):
        drawn(made, gen_length=1)


# -- blocks on a causal context --------------------------------------------------------------------


@pytest.mark.parametrize("double", (nemotron_diffusion_vlm, fast_dvlm))
def test_an_answer_that_ends_inside_a_block(double):
    """What stands behind its end in the block is no part of it, but is there when a step is
    replayed; every state of a given answer is the family's own."""
    made = causal(double)
    end = made.processor.tokenizer.eos_token_id
    plain = drawn(made, threshold=0.3).trajectory
    made.head.weight.data[end] = made.head.weight[int(plain.tokens[0, 5])] * 1.5
    forward = drawn(made, threshold=0.3, gen_length=16)
    found = forward.trajectory.tokens[0].tolist()
    assert end in found and len(found) % 4 == 0 and len(found) < 16
    assert set(found[found.index(end) + 1 :]) <= {made.mask_id}
    final = forward.trajectory.final_state[0]
    assert made.mask_id not in final
    assert final[0, : found.index(end)].tolist() == found[: found.index(end)]


def test_a_decoder_that_computes_other_blocks():
    made = causal(fast_dvlm)
    own = made.model.generate
    made.model.generate = lambda **given: own(**{**given, "block_size": 8})
    with pytest.raises(InputError, match=r"computes 8 tokens .*expected a block of 4; it decodes"):
        made.generate(prepared(made), gen_length=8)


@pytest.mark.parametrize(
    ("given", "said"),
    (
        (dict(steps=5), "steps is 5: expected a multiple of the 2 blocks"),
        (dict(causal_context=False), "the context is causal"),
        (dict(temperature=1.0, generator=None), "sampling needs a generator"),
        (dict(block_length=8), "blocks of 4; give it to load or wrap"),
    ),
)
def test_settings_of_a_causal_context_that_cannot_work(given, said):
    made = causal(nemotron_diffusion_vlm)
    with pytest.raises((InputError, SettingError), match=said):
        made.generate(prepared(made), **{"gen_length": 8, **given})


def test_sampling_on_a_causal_context_is_replayed():
    """The check of the first generation would refuse it otherwise."""
    made = causal(nemotron_diffusion_vlm)
    found = drawn(made, temperature=1.0, steps=4)
    assert not made.unverified and found.trajectory.confidence.all()
