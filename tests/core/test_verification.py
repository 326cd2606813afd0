"""What ``wrap`` finds before the first map: wrong buffers, a wrong processor, another replay."""

import contextlib
import dataclasses
import threading
import warnings

import pytest
import tiny
import torch
from doubles import dream_vl, lavida, llada_v
from torch import nn
from typer.testing import CliRunner

import captum_dcam
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.cli.app import app
from captum_dcam.errors import InputError, MethodError, ReplayError
from captum_dcam.mini.loading import MiniImageProcessor, MiniProcessor
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.verification import check_replay, difference

#: family → model, processor, decoding
MADE = {
    "mini": (tiny.model, tiny.processor, {"gen_length": 4}),
    "lavida": (lavida.model, lavida.processor, {"gen_length": 4}),
    "lavida-dream": (lambda: lavida.model("dream"), lavida.processor, {"gen_length": 4}),
    "llada_v": (llada_v.model, llada_v.processor, {"gen_length": 4}),
    "dream_vl": (dream_vl.model, dream_vl.processor, {"gen_length": 4}),
}
every = pytest.mark.parametrize("family", MADE)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(LladaVAdapter, "ids", llada_v.IDS)


def wrapped(family, model=None, **options):
    make, processor, _ = MADE[family]
    return captum_dcam.wrap(make() if model is None else model, processor(), **options)


def generated(adapter, family, **more):
    forward = DenoisingForward(adapter, 1)
    request = adapter.prepare([[tiny.picture(size=(84, 56))]], ["what is this ?"])
    forward.generate(request, **{**MADE[family][2], **more})
    return forward


def explained(adapter, family):
    picture, settings = tiny.picture(size=(84, 56)), MADE[family][2]
    return captum_dcam.explain(adapter, picture, "what is this ?", preset="base", **settings)


@contextlib.contextmanager
def drifting(model, after):
    """A hook that remembers: from its call number ``after`` on the head answers otherwise."""
    calls = []

    def hook(_module, _args, output):
        calls.append(1)
        return output * 1.05 if len(calls) > after else output

    handle = head_of(model).register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def head_of(model):
    names = ("lm_head", "model.transformer.ff_out", "norm")
    known = dict(model.named_modules())
    return next(known[name] for name in names if name in known)


def calls_of(family):
    """How often a generation runs the head."""
    model = MADE[family][0]()
    with drifting(model, 10**9) as calls:
        generated(wrapped(family, model, verify=False), family)
    return len(calls)


# -- buffers ---------------------------------------------------------------------------------------


class Rotary(nn.Module):
    dim, base = 8, 500.0

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([-6.7e8, 4.6e-41, 0, 1]), persistent=False)


class Positions(nn.Module):
    num_positions = 5

    def __init__(self):
        super().__init__()
        self.register_buffer("position_ids", torch.full((1, 5), 9), persistent=False)


@every
def test_wrong_buffers_are_told_and_computed_again(family):
    model = MADE[family][0]()
    model.rotary, model.positions = Rotary(), Positions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(family, model, verify=False)
    assert model.rotary.inv_freq[0] < 0
    told = r": 1 rotary table and 1 table of position ids\. .* before is not to be trusted"
    with pytest.warns(UserWarning, match=told) as seen:
        wrapped(family, model)
    assert seen[0].filename == __file__  # the caller's line, not the library's
    assert model.rotary.inv_freq.tolist() == pytest.approx([500 ** (-i / 4) for i in range(4)])
    assert model.positions.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(family, model)


def test_a_repaired_model_answers_as_one_that_was_never_wrong():
    right, model = generated(wrapped("dream_vl"), "dream_vl"), dream_vl.model()
    model.model.rotary_emb.inv_freq = torch.full((8,), -6.7e8)
    with pytest.warns(UserWarning, match=r": 1 rotary table\."):
        found = generated(wrapped("dream_vl", model), "dream_vl")
    assert torch.equal(found.trajectory.tokens, right.trajectory.tokens)
    assert torch.equal(found.trajectory.confidence, right.trajectory.confidence)


# -- processors ------------------------------------------------------------------------------------


def other_words():
    """A tokenizer of another checkpoint: fewer words, none of them a mask."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate("<unk> <image> <|image_pad|> what is this".split())}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def more_words(count):
    found = other_words()
    found.add_tokens([f"word{i}" for i in range(count)])
    return found


def with_tokenizer(family, tokenizer):
    processor = MADE[family][1]()
    if family == "mini":
        return MiniProcessor(processor.image_processor, tokenizer, processor.grid)
    if family == "dream_vl":
        processor.tokenizer = tokenizer
        return processor
    return tokenizer, processor[1]


def with_images(family):
    processor = MADE[family][1]()
    if family == "mini":
        return MiniProcessor(MiniImageProcessor(128), processor.tokenizer, 16)
    if family == "dream_vl":
        processor.image_processor.patch_size = 16
        return processor
    module = llada_v if family == "llada_v" else lavida
    return processor[0], module.ImageProcessor(224)


@every
@pytest.mark.parametrize("words", (0, 5000))
def test_a_tokenizer_of_another_vocabulary_is_named(family, words):
    given = with_tokenizer(family, more_words(words))
    with pytest.raises(InputError, match=r"do not fit: .*; load both from one"):
        captum_dcam.wrap(MADE[family][0](), given)


def test_the_mask_that_a_tokenizer_lacks_is_named():
    with pytest.raises(InputError, match=r"of 6 tokens, has none with the id 90, the model's mask"):
        captum_dcam.wrap(lavida.model(), with_tokenizer("lavida", other_words()))
    with pytest.raises(InputError, match=r"has 5006 tokens, the model 96 embeddings"):
        captum_dcam.wrap(lavida.model(), with_tokenizer("lavida", more_words(5000)))


@every
def test_an_image_processor_of_another_size_is_named(family):
    with pytest.raises(InputError, match=r"224 px|128 px|16, 2, 2"):
        captum_dcam.wrap(MADE[family][0](), with_images(family))


# -- replays ---------------------------------------------------------------------------------------


@every
def test_a_replay_that_differs_is_found_before_the_first_map(family):
    count, model = calls_of(family), MADE[family][0]()
    adapter = wrapped(family, model)
    forward = DenoisingForward(adapter, 1)
    request = adapter.prepare([[tiny.picture(size=(84, 56))]], ["what is this ?"])
    with drifting(model, count), pytest.raises(ReplayError) as caught:
        forward.generate(request, **MADE[family][2])
    assert not forward.bound and adapter.unverified
    for text in ("step ", "computed again", "had probability", "a hook", "verify=False"):
        assert text in str(caught.value)
    with drifting(model, count), pytest.raises(ReplayError):
        explained(adapter, family)  # it is found again, until it is right or switched off
    with drifting(model, count):
        assert explained(wrapped(family, model, verify=False), family).maps
    assert explained(adapter, family).maps and not adapter.unverified


@every
def test_checking_changes_nothing(family):
    with torch.random.fork_rng(devices=[]):
        found = []
        for verify in (True, False):
            torch.manual_seed(3)
            model = MADE[family][0]()
            handle = head_of(model).register_forward_hook(lambda *_: torch.rand(1) and None)
            made = explained(wrapped(family, model, verify=verify), family)
            found.append((made.maps[0], made.trajectory.confidence, torch.get_rng_state()))
            handle.remove()
    for checked, unchecked in zip(*found, strict=True):
        assert torch.equal(checked, unchecked)


@every
def test_once_per_adapter(family):
    count, model = calls_of(family), MADE[family][0]()
    adapter = wrapped(family, model)
    with drifting(model, 10**9) as calls:
        generated(adapter, family)
        first = len(calls)
        generated(adapter, family)
        assert count < first <= count + 2  # one step, behind a prefill where there is one
        assert len(calls) == first + count


def test_threads_check_one_replay():
    model = tiny.model()
    adapter, errors = wrapped("mini", model), []

    def work():
        try:
            generated(adapter, "mini")
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    with drifting(model, 10**9) as calls:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    replay = 2  # behind its prefill
    assert not errors and len(calls) == 3 * calls_of("mini") + replay


def test_costs_count_the_methods_passes_alone():
    rows = []
    for verify in (True, False):
        adapter = wrapped("mini", verify=verify)
        found = captum_dcam.compare(
            adapter, tiny.picture(), "what is this ?", methods=["saliency", "attention"],
            gen_length=4, errors="raise",
        )  # fmt: skip
        rows.append([(r.cost.forwards, r.cost.backwards, r.maps[0]) for r in found.rows])
    for one, other in zip(*rows, strict=True):
        assert one[:2] == other[:2] and torch.equal(one[2], other[2])


def test_forced_answers_have_no_generation_to_compare():
    adapter = wrapped("mini")
    request = adapter.prepare([[tiny.picture()]], ["what is this ?"])
    force(DenoisingForward(adapter, 1), "a red circle", request)
    assert adapter.unverified


def test_an_answer_of_stop_tokens_alone_leaves_the_check_to_the_next():
    forward = generated(wrapped("mini"), "mini")
    end = next(iter(forward.adapter.stop_ids))
    empty = dataclasses.replace(
        forward.trajectory, tokens=torch.full_like(forward.trajectory.tokens, end)
    )
    assert not check_replay(forward.adapter, forward.request, empty)
    assert check_replay(forward.adapter, forward.request, forward.trajectory)


def test_half_precision_and_batches_pass():
    for dtype in (torch.bfloat16, torch.float16):
        for cache in tiny.CACHES:
            made = captum_dcam.wrap(tiny.model(dtype=dtype), tiny.processor(), cache=cache)
            forward = DenoisingForward(made)
            pictures = [[tiny.picture(i)] for i in range(3)]
            forward.generate(made.prepare(pictures, ["what is this ?"] * 3), gen_length=4)
            assert not made.unverified


@pytest.mark.parametrize(("size", "far"), ((1e-5, False), (1e-2, True)))
def test_how_far_is_too_far(size, far):
    """Log-odds by hand: ``size`` of the largest logit moves them by twice as much at most."""
    forward = generated(wrapped("mini"), "mini")
    step, t = 2, forward.trajectory
    with torch.no_grad():
        logits = forward.replay(torch.tensor([0]), torch.tensor([step]))
    (position,) = (t.commit_step[0] == step).nonzero()[0].tolist()
    token = int(t.tokens[0, position])
    largest = float(logits[0, position].abs().max())
    same = difference(forward.adapter, t, step, logits)
    assert (same.position, same.far) == (position, False)
    assert same.replayed == pytest.approx(same.recorded, rel=1e-6)
    moved = logits.clone()
    moved[0, position] -= size * largest
    moved[0, position, token] += 2 * size * largest
    found = difference(forward.adapter, t, step, moved)
    odds = same.recorded / (1 - same.recorded) * torch.tensor(2 * size * largest).exp()
    assert found.replayed == pytest.approx(float(odds / (1 + odds)), rel=1e-4)
    assert found.far is far
    moved[0, position, token] = torch.nan
    assert difference(forward.adapter, t, step, moved).far


def test_the_command_line_says_it_in_one_line_and_switches_it_off(monkeypatch, tmp_path):
    def differs(*_arguments):
        raise ReplayError("step 3 of the generation, computed again, is another")

    monkeypatch.setattr("captum_dcam.model.verification.check_replay", differs)
    call = ["explain", "--gen-length", "4", "-w", "nouns", "-o", str(tmp_path / "out"), "--json"]
    found = CliRunner().invoke(app, call)
    assert found.exit_code == 2 and "step 3 of the generation" in found.output
    assert "Traceback" not in found.output
    assert CliRunner().invoke(app, [*call, "--load", "verify=false"]).exit_code == 0


def test_verify_is_true_or_false():
    for make in (wrapped, lambda _family, **options: captum_dcam.load("mini", **options)):
        with pytest.raises(InputError, match="verify is 'no': expected True or False"):
            make("mini", verify="no")
    assert captum_dcam.load("mini").unverified
    assert not captum_dcam.load("mini", verify=False).unverified


# -- models that accelerate has spread -------------------------------------------------------------


def spread(model, first="disk", folder=None):
    """All of the model on the CPU, through accelerate's hooks; its first module offloaded."""
    accelerate = pytest.importorskip("accelerate")
    names = [f"model.{n}" for n, _ in getattr(model, "model", nn.Module()).named_children()]
    names += [n for n, _ in model.named_children() if n != "model"]
    names += [n for n, _ in model.named_parameters() if n == "model.image_newline"]
    owner = next(n for n in names if n.rpartition(".")[2] != "vision_tower")
    places = dict.fromkeys(names, "cpu") | {owner: first}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    return model


@every
def test_requests_of_an_offloaded_model_lie_where_it_computes(family, tmp_path):
    expected = generated(wrapped(family), family).trajectory
    adapter = wrapped(family, spread(MADE[family][0](), folder=tmp_path))
    assert any(p.is_meta for p in adapter.model.parameters())
    assert adapter.device == adapter.prepare([[tiny.picture()]], ["a"]).pixels.device
    assert adapter.device == torch.device("cpu")
    found = generated(adapter, family).trajectory
    assert torch.equal(found.tokens, expected.tokens) and not adapter.unverified


def test_a_spread_llada_v_is_no_cached_one():
    from doubles import llada_v_caches as caches

    plain = explained(wrapped("llada_v"), "llada_v")
    model = spread(llada_v.model(), first="cpu")
    assert all("_old_forward" in vars(block) for block in model.model.layers)
    adapter = wrapped("llada_v", model)
    assert torch.equal(explained(adapter, "llada_v").maps[0], plain.maps[0]) and not adapter.fast
    under = llada_v.model()
    caches.register_fast_dllm_hook(under)
    over = spread(llada_v.model(), first="cpu")
    caches.register_fast_dllm_hook(over)
    assert wrapped("llada_v", over).fast and wrapped("llada_v", spread(under, "cpu")).fast
    caches.register_cache_LLaDA_V(model)
    under = llada_v.model()
    caches.register_cache_LLaDA_V(under)
    for cached in (model, spread(under, first="cpu")):
        with pytest.raises(MethodError, match="dLLM-Cache has replaced the forward of"):
            generated(wrapped("llada_v", cached), "llada_v")


def test_a_spread_model_changes_its_type(tmp_path):
    from captum_dcam.adapters.common.loading import typed

    model = spread(lavida.model(dtype=torch.bfloat16), folder=tmp_path)
    with pytest.raises(RuntimeError, match="can't move a model"):
        model.to(torch.float32)
    adapter = wrapped("lavida", typed(model, torch.float32))
    plain = lavida.model(dtype=torch.bfloat16).to(torch.float32)
    found, wanted = (generated(a, "lavida") for a in (adapter, wrapped("lavida", plain)))
    assert torch.equal(found.trajectory.confidence, wanted.trajectory.confidence)
