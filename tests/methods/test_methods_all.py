"""What holds for every registered method, whoever wrote it."""

import contextlib
import functools
from dataclasses import fields, replace

import awkward
import numpy as np
import pytest
import tiny
import torch
from methods import made

from captum_dcam.errors import BudgetExhaustedError, MethodError
from captum_dcam.methods import METHODS, AttributionTask, Budget, metered, method, method_names
from captum_dcam.model.answers import force
from captum_dcam.model.forward import single
from captum_dcam.model.words import resolve


def have_grad_cam():
    try:
        import pytorch_grad_cam  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # also where torch and torchvision do not fit
        return False
    return True


GRAD_CAM = have_grad_cam()
#: settings with few passes, so that all methods run on all states in seconds
QUICK = {"steps": 2, "samples": 2, "permutations": 1, "channels": 3, "concepts": 3, "stride": 4}
MORE = {
    "eagle": {"regions": 4, "batch_size": 32},
    "igos_pp": {"size": 4, "points": 1, "steps": 1, "l1": 0.0},
    "kernel_shap": {"samples": 12},
    "lime": {"samples": 12},
    "llm_attribution": {"regions": 4},
    "pgc_sess": {"scales": 2},
}
every = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n,
            marks=pytest.mark.skipif(
                "grad-cam" in METHODS[n].facts.needs and not GRAD_CAM,
                reason="needs the extra grad-cam",
            ),
        )
        for n in method_names()
    ],
)


def quick(name):
    known = {f.name for f in fields(METHODS[name])}
    return method(name, **{k: v for k, v in {**QUICK, **MORE.get(name, {})}.items() if k in known})


#: one generation for all tests that only read it
shared = functools.cache(tiny.bound)


def task_of(cache="prefix", positions=(0, 3), seed=0, **settings):
    forward = single(shared(cache, **settings))
    generator = torch.Generator().manual_seed(seed)
    return AttributionTask(forward, made.targets(forward, positions), "commit", generator)


def plain_gradient():
    """What autograd makes of operations that methods give other rules."""
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    y = torch.nn.functional.silu(x) * x * x.softmax(-1)
    return torch.autograd.grad(y.sum(), x)[0].tolist()


def odd(forward):
    """The forward's model in a state that nobody would leave it in; gives what that is."""
    model = forward.adapter.model.train()
    model.layers[2].eval()
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    return state(forward)


def state(forward):
    """Everything that a method must leave as it was."""
    model = forward.adapter.model
    request = forward.request
    return {
        "hooks": tiny.hooks(model) + tiny.hooks(forward.tap),
        "edit": forward.tap.edit,
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
        "pixels": (request.pixels.requires_grad, request.pixels.grad is None),
        "values": float(sum(p.double().sum() for p in model.parameters())),
        "pixel values": float(request.pixels.double().sum()),
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "grad mode": torch.is_grad_enabled(),
        "attention": model.config._attn_implementation,
        "trajectory": forward.trajectory.tokens.tolist(),
        "kept": sorted(forward.trajectory.kept.keys() - {"embedded"}),  # which any call may add
        "operations": plain_gradient(),
    }


#: a map that is cut off at 0 block after block can be 0 everywhere
DARK = ("pgc_refinecam",)
#: blind to the word, and drawn anew for each
DRAWN = ("pgc_randomcam",)


@every
@pytest.mark.parametrize("cache", tiny.CACHES)
def test_no_method_is_blind(name, cache):
    """Maps of tokens committed at the first, a middle and the last step are there, and differ."""
    forward = single(shared(cache, layer=1, block_length=8))
    order = forward.trajectory.commit_step[0].argsort().tolist()
    positions = (order[0], order[len(order) // 2], order[-1])
    if METHODS[name].facts.target_blind:  # image states differ from step to step
        positions = (order[0],) * 3
    tokens = [(5 * n + 7) % forward.adapter.vocabulary for n in range(3)]  # three different words
    targets = tuple(made.Target(str(p), (p,), (t,)) for p, t in zip(positions, tokens, strict=True))
    found = quick(name).attribute(AttributionTask(forward, targets))
    assert bool(found.done.all()), found.note
    maps = found.maps[0]
    assert maps.shape == (3, 8, 8) and maps.dtype == torch.float32 and maps.device.type == "cpu"
    assert bool(maps.isfinite().all()) and not maps.requires_grad
    lit = [bool(m.any()) for m in maps]
    assert any(lit) if name in DARK else all(lit)
    same = [torch.equal(maps[0], m) for m in maps[1:]]
    assert all(same) if METHODS[name].facts.target_blind and name not in DRAWN else not any(same)
    if METHODS[name].facts.text:
        assert found.text.shape[0] == 3 and bool(found.text.nan_to_num().any(1).all())


@every
def test_nothing_is_left_behind(name):
    task = made.task_of("prefix", (0, 3))
    before = odd(task.forward)
    chosen = quick(name)
    chosen.check(task)
    chosen.attribute(task)
    assert state(task.forward) == before


@every
@pytest.mark.parametrize(("cache", "call"), (("prefix", 1), ("none", 2)))
def test_nothing_is_left_behind_after_an_exception(name, cache, call):
    """In the first call of the model, and in the second where there is one."""
    task = made.task_of(cache, (0, 5))
    before = odd(task.forward)
    block = task.forward.adapter.blocks[-1]
    calls = []

    def explode(*_):
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError("in the middle")

    handle = block.register_forward_hook(explode)
    with pytest.raises(ZeroDivisionError) if call == 1 else contextlib.suppress(ZeroDivisionError):
        quick(name).attribute(task)
    handle.remove()
    after = state(task.forward)  # while a hook of the user's is there, records are out of date
    assert calls and {**after, "kept": before["kept"]} == before


@every
def test_same_seed_same_bits(name):
    stochastic = METHODS[name].facts.stochastic
    tasks = [task_of("prefix", (0,), seed=s) for s in ((1, 1, 2) if stochastic else (1, 2))]
    first, *others = (quick(name).attribute(p).maps[0] for p in tasks)
    assert torch.equal(first, others[0])
    assert not stochastic or not torch.equal(first, others[1])


@every
def test_half_precision_models(name):
    task = task_of("prefix", (0, 3), dtype=torch.bfloat16)
    found = quick(name).attribute(task)
    assert bool(found.maps[0].isfinite().all()) and bool(found.maps[0].any())


@every
def test_several_pictures_give_several_maps(name):
    task = task_of("prefix", (0, 3), images=2)
    found = quick(name).attribute(task)
    assert [m.shape for m in found.maps] == [(2, 8, 8)] * 2


@every
def test_an_answer_of_one_token(name):
    task = task_of("none", (0,), gen_length=1)
    found = quick(name).attribute(task)
    assert bool(found.done.all()) and found.maps[0].shape == (1, 8, 8)


@every
def test_an_exhausted_budget_never_looks_complete(name):
    task = task_of("prefix", (0, 3))
    chosen = quick(name)
    with metered(task.forward) as cost:
        chosen.attribute(task)
    task = task_of("prefix", (0, 3))
    passes = max(1, cost.forwards - 1)
    try:
        with metered(task.forward, Budget(passes=passes)) as spent:
            found = chosen.attribute(task)
    except BudgetExhaustedError:
        return
    assert spent.forwards <= passes
    assert cost.forwards == 1 or not bool(found.done.all())


@every
def test_its_record_builds_it_again(name):
    chosen = quick(name)
    record = {k: v for k, v in chosen.describe().items()}
    assert method(record.pop("name"), **record).describe() == chosen.describe()


#: methods that stretch or filter a word's map after its tokens have been added up, or search for a
#: word's tokens together
REFINED = (
    *("diffusion_cam", "diffusion_cam_paper", "tam", "tam_over", "arc", "msea_arc"),
    *("eagle", "igos_pp"),
)


#: they cut one image per grid out of the pixels
ONE_GRID = ("pgc_scorecam", "pgc_sess")


@functools.cache
def two_tokens(one_grid):
    """A forward, and a word of two tokens that are written at different steps: "star" and "s"."""
    if one_grid:
        forward, text = tiny.bound("none", layer=awkward.LAYER), "red circle"
        force(forward, "a red circle .")
    else:
        forward, text = awkward.alone("mini", "none", 0), "stars"
    (word,) = resolve(forward.adapter, forward.trajectory.tokens[0].tolist(), text)
    first, second = forward.trajectory.commit_step[0, list(word.positions)]
    assert first != second
    return forward, word


@every
def test_a_word_is_all_its_tokens_each_in_its_own_state(name):
    (forward, word), facts = two_tokens(name in ONE_GRID), METHODS[name].facts
    pairs = zip(word.positions, word.token_ids, strict=True)
    parts = [made.Target("", (position,), (token,)) for position, token in pairs]
    whole, *alone = (
        torch.cat([m.flatten() for m in quick(name).attribute(AttributionTask(forward, (t,))).maps])
        for t in (word, *parts)
    )
    assert all(tiny.relative(whole, one) > 1e-3 for one in alone)
    if not facts.stochastic and name not in REFINED and facts.group != "pytorch-grad-cam":
        assert tiny.relative(whole, sum(alone)) < 1e-3


#: methods that read the context's tokens too, each at its own commit step, or bring their own state
WITH_CONTEXT = ("tam", "tam_over", "arc", "msea_arc")


@every
@pytest.mark.parametrize("cache", tiny.CACHES)
def test_a_step_is_a_score_like_the_others(name, cache):
    committed = task_of(cache, (3,))
    step = committed.step(3)
    at, other = (replace(task_of(cache, (3,)), score=s) for s in (step, (step + 3) % 8))
    found, elsewhere = (quick(name).attribute(task) for task in (at, other))
    assert bool(found.done.all()) and bool(elsewhere.maps[0].isfinite().all())
    if name not in WITH_CONTEXT:
        assert torch.equal(found.maps[0], quick(name).attribute(committed).maps[0])


def without(adapter, foil):
    """The adapter's model, all of whose logits are less that of a foil."""
    whole = type(adapter).denoise

    def denoise(memory, *state):
        logits = whole(adapter, memory, *state)
        return logits - logits[..., foil, None]

    adapter.denoise = denoise


#: the foil takes the place of the likeliest rivals
RIVALS = ("finer_cam",)


@every
@pytest.mark.parametrize("cache", tiny.CACHES)
def test_a_word_with_a_foil_is_the_difference_of_logits(name, cache):
    """As of the word without a foil in a model whose every logit is less the foil's."""
    plain, other = (task_of(cache, (3,)) for _ in range(2))
    (word,) = plain.targets
    foil = next(i for i in (5, 6) if i != word.token_ids[0])
    task = replace(plain, targets=(replace(word, foil_ids=(foil,)),))
    if not METHODS[name].facts.foils:
        for call in (quick(name).attribute, quick(name).check):
            with pytest.raises(MethodError, match=f"'{name}' differentiates no difference"):
                call(task)
        return
    found = quick(name).attribute(task).maps[0]
    if name in RIVALS:
        assert found.any()
        return
    adapter = other.forward.adapter
    without(adapter, foil)
    try:
        expected = quick(name).attribute(other).maps[0]
    finally:
        del adapter.denoise
    assert tiny.relative(found, expected) < 1e-4
    own = quick(name).attribute(task_of(cache, (3,))).maps[0]
    assert METHODS[name].facts.target_blind or tiny.relative(found, own) > 1e-3
