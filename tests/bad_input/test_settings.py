"""Settings of every public function: of the wrong type or out of range, refused by name."""

import functools
import math

import numpy as np
import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import DenoisingForward, DiffusionCAM, compare, explain_generation, sign_check
from captum_dcam.checks import plain
from captum_dcam.comparing import compare_generation
from captum_dcam.data.files import select
from captum_dcam.data.scenes import SceneDataset
from captum_dcam.errors import DcamError, InputError
from captum_dcam.evaluation.plan import Plan, Variant
from captum_dcam.faithfulness.captum_metrics import infidelity, sensitivity_max
from captum_dcam.faithfulness.curves import deletion
from captum_dcam.files import canonical
from captum_dcam.maps import Reading
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.meter import Budget
from captum_dcam.metrics.reference_maps import oracle_map
from captum_dcam.model.answers import force
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target

SHORT = {"gen_length": 4, "block_length": 4, "steps": 2}


@functools.cache
def bound():
    return tiny.bound("prefix", **SHORT)


@functools.cache
def word():
    tokens = bound().trajectory.tokens[0].tolist()
    return Target("w", (1,), (tokens[1],))


def maps():
    return [torch.rand(1, *s) for s in bound().request.layout.shapes]


def explain(**settings):
    adapter = bound().adapter
    return captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, **{**SHORT, **settings})


def compared(**settings):
    adapter = bound().adapter
    return compare(adapter, tiny.picture(), tiny.PROMPT, [1], "attention", **{**SHORT, **settings})


def explained(**settings):
    return explain_generation(bound(), [1], **settings)


def recompared(**settings):
    return compare_generation(bound(), [1], "attention", **settings)


def attribute(**settings):
    return DiffusionCAM(bound()).attribute(
        bound().request.pixels, tiny.pair(bound(), 1), **settings
    )


def targeted(target):
    return DiffusionCAM(bound()).attribute(bound().request.pixels, target)


def forward(**settings):
    return DenoisingForward(bound().adapter, **settings)


def checked(**settings):
    return sign_check(bound(), [word()], maps(), **{"generator": draws(), **settings})


def removed(**settings):
    return deletion(bound(), [word()], maps(), **settings)


def infidel(**settings):
    return infidelity(bound(), [word()], maps(), **settings)


def sensitive(**settings):
    return sensitivity_max(bound(), [word()], lambda f, t: maps(), **settings)


def draws():
    return torch.Generator().manual_seed(0)


NO_NUMBER = ("3", b"3", [3], {}, torch.tensor([3]), 1j)
NOT_WHOLE = (*NO_NUMBER, True, False, np.True_, torch.tensor(True), 2.0, math.nan, np.float64(2))
NOT_REAL = (*NO_NUMBER, True, np.False_, torch.tensor(True))
NOT_FLAG = ("no", "True", 0, 1, 1.0, [], torch.tensor(True))
NO_GENERATOR = (3, "0", True, np.random.default_rng(0), torch.manual_seed)
NO_CHOICE = ("", "best", "Commit", 3, True, ["commit"], math.nan)
NO_SCORE = ("", "best", "Commit", -1, True, ["commit"], math.nan, *NOT_WHOLE)

#: what is called, the setting, values of a wrong type, values out of range
WHOLE = {
    "a block": (explain, "layer", NOT_WHOLE, (99, -99)),
    "a block of a forward": (forward, "layer", NOT_WHOLE, (99, -99)),
    "words per pass": (explain, "internal_batch_size", NOT_WHOLE, (0, -1)),
    "words per pass of a forward": (forward, "internal_batch_size", NOT_WHOLE, (0, -1)),
    "tokens": (explain, "gen_length", NOT_WHOLE, (0, -4)),
    "steps of decoding": (explain, "steps", NOT_WHOLE, (0, -1)),
    "tokens per block": (explain, "block_length", NOT_WHOLE, (0, -1)),
    "a step": (explain, "step", NOT_WHOLE, (99, -1)),
    "a step of attribute": (attribute, "step", NOT_WHOLE, (99, -1)),
    "an example": (explained, "example", NOT_WHOLE, (1, -1)),
    "an example to compare": (recompared, "example", NOT_WHOLE, (1, -1)),
    "a seed": (compared, "seed", NOT_WHOLE, (-1,)),
    "a seed again": (recompared, "seed", NOT_WHOLE, (-1,)),
    "a patch": (removed, "patch", NOT_WHOLE, (0,)),
    "pixels per pass": (removed, "chunk", NOT_WHOLE, (0,)),
    "controls": (removed, "controls", NOT_WHOLE, (-1,)),
    "samples": (infidel, "samples", NOT_WHOLE, (0, -3)),
    "noisy images": (sensitive, "samples", NOT_WHOLE, (0,)),
    "passes": (Budget, "passes", NOT_WHOLE, (0, -1)),
    "samples of a method": (functools.partial(method, "lime"), "samples", NOT_WHOLE, (0,)),
    "steps of a method": (
        functools.partial(method, "integrated_gradients"), "steps", NOT_WHOLE, (0,),
    ),
    "channels": (functools.partial(method, "score_cam"), "batch_size", NOT_WHOLE, (0,)),
}  # fmt: skip
REAL = {
    "a temperature": (explain, "temperature", NOT_REAL, (-1, math.nan, math.inf)),
    "a share": (checked, "share", NOT_REAL, (0, -0.1, 1.5, math.nan, math.inf)),
    "seconds": (Budget, "seconds", NOT_REAL, (0, -1, math.nan, math.inf)),
    "noise": (functools.partial(method, "noise_tunnel"), "std", NOT_REAL, (0, -1, math.nan)),
}
FLAGS = {
    "centring": (explain, "center", NOT_FLAG, ()),
    "centring of attribute": (attribute, "center", NOT_FLAG, ()),
    "centring of a reading": (Reading, "center", NOT_FLAG, ()),
    "positive only": (attribute, "relu_attributions", NOT_FLAG, ()),
    "channels summed": (attribute, "attr_dim_summation", NOT_FLAG, ()),
    "the layer's input": (attribute, "attribute_to_layer_input", NOT_FLAG, ()),
}
CHOICES = {
    "a score": (explain, "score", (), NO_SCORE),
    "a score to compare": (compared, "score", (), NO_SCORE),
    "a score of a forward": (forward, "score", (), NO_SCORE),
    "a score of a generation": (explained, "score", (), (*NO_SCORE, 99)),
    "a score of attribute": (attribute, "score", (), (*NO_SCORE, 99)),
    "a score to compare again": (recompared, "score", (), (*NO_SCORE, 99)),
    "a score of a sign check": (checked, "score", (), (*NO_SCORE, 99)),
    "a score of curves": (removed, "score", (), (*NO_SCORE, 99)),
    "every step": (explain, "every_step", NOT_FLAG, ()),
    "every step of a generation": (explained, "every_step", NOT_FLAG, ()),
    "errors": (compared, "errors", (), NO_CHOICE),
    "errors again": (recompared, "errors", (), NO_CHOICE),
    "remasking": (explain, "remasking", (), NO_CHOICE),
    "a schedule": (explain, "schedule", (), NO_CHOICE),
    "a baseline": (removed, "baseline", (), NO_CHOICE),
    "a place": (removed, "where", (), NO_CHOICE),
}
GENERATORS = {
    "of a generation": (explain, "generator", NO_GENERATOR, ()),
    "of a sign check": (checked, "generator", NO_GENERATOR, ()),
    "of curves": (removed, "generator", NO_GENERATOR, ()),
    "of infidelity": (infidel, "generator", NO_GENERATOR, ()),
    "of noise": (sensitive, "generator", NO_GENERATOR, ()),
}
CASES = [
    pytest.param(call, name, value, kind is InputError, id=f"{label}, {kind.__name__} {number}")
    for table in (WHOLE, REAL, FLAGS, CHOICES, GENERATORS)
    for label, (call, name, types, ranges) in table.items()
    for kind, values in ((TypeError, types), (InputError, ranges))
    for number, value in enumerate(values)
]


@pytest.mark.parametrize(("call", "name", "value", "in_range"), CASES)
def test_a_setting_that_cannot_be(call, name, value, in_range):
    before = bound().trajectory
    kind = (InputError,) if in_range else (TypeError, ValueError)
    with pytest.raises(DcamError) as caught:
        call(**{name: value})
    assert isinstance(caught.value, kind)
    message = str(caught.value)
    assert name in message and ("expected" in message or "not in" in message)
    assert any(text in message for text in (repr(value), str(value), repr(plain(value))))
    assert not tiny.hooks(bound()) and bound().tap.edit is None and bound().trajectory is before


PAIRS = (
    *((1, value) for value in NOT_WHOLE),
    *((value, 3) for value in NOT_WHOLE),
    *((99, 3), (-1, 3), (1, -1), (1, 10**6), (1,), (1, 2, 3), "12", 5, {1: 2}),
)


@pytest.mark.parametrize("target", PAIRS, ids=lambda t: repr(t)[:40])
def test_a_target_that_cannot_be(target):
    with pytest.raises(DcamError, match=r"target|position|token id"):
        targeted(target)
    assert not tiny.hooks(bound())


@pytest.mark.parametrize("budget", (3, "10", True, {"attention": 3}, {"attention": "10"}, [1]))
def test_a_budget_that_is_none(budget):
    with pytest.raises(DcamError, match=r"budget is .*expected Budget\(passes"):
        compared(budget=budget)


@pytest.mark.parametrize("progress", ("print", 3, ["print"]))
def test_a_progress_that_cannot_be_called(progress):
    with pytest.raises(DcamError, match=r"progress is .*expected True, a function"):
        compared(progress=progress)


@pytest.mark.parametrize("example", (*NOT_WHOLE, 1, -1), ids=repr)
def test_an_example_to_narrow_to(example):
    with pytest.raises(DcamError, match="example"):
        single(bound(), example)


# -- numbers of numpy and torch are taken where Python's are ---------------------------------------

INTEGERS = (np.int64, np.uint8, torch.tensor)


@pytest.mark.parametrize("number", INTEGERS, ids=lambda n: n.__name__)
def test_integers_of_numpy_and_torch_are_taken_and_saved(number, tmp_path):
    adapter = bound().adapter
    given = dict(layer=number(1), gen_length=number(4), block_length=number(4), steps=number(2))
    found = captum_dcam.explain(
        adapter, tiny.picture(), tiny.PROMPT, [number(1)], step=number(0),
        internal_batch_size=number(2), **given,
    )  # fmt: skip
    plain = captum_dcam.explain(
        adapter, tiny.picture(), tiny.PROMPT, [1], step=0, layer=1, internal_batch_size=2, **SHORT
    )
    assert torch.equal(found.maps[0], plain.maps[0])
    assert found.settings == plain.settings and found.targets == plain.targets
    found.save(tmp_path / "a")
    plain.save(tmp_path / "b")
    one, other = (captum_dcam.Explanation.load(tmp_path / n) for n in "ab")
    assert one.settings == other.settings
    assert one.trajectory.settings == other.trajectory.settings


@pytest.mark.parametrize("number", INTEGERS, ids=lambda n: n.__name__)
def test_targets_methods_and_budgets_of_such_integers(number, tmp_path):
    position, token = tiny.pair(bound(), 1)
    assert torch.equal(
        targeted((number(position), torch.tensor(token))), targeted((position, token))
    )
    lime = method("lime", samples=number(12), patch=number(4))
    assert lime.describe() == method("lime", samples=12, patch=4).describe()
    adapter = bound().adapter
    found = compare(
        adapter, tiny.picture(), tiny.PROMPT, [number(1)], [lime], seed=number(3),
        budget=Budget(number(50)), **SHORT,
    )  # fmt: skip
    found.save(tmp_path / "c")
    assert captum_dcam.Comparison.load(tmp_path / "c").settings["seed"] == 3


def test_words_given_as_targets_hold_such_integers(tmp_path):
    position, token = tiny.pair(bound(), 1)
    own = Target("w", (np.int64(position),), (torch.tensor(token),))
    found = explain_generation(bound(), own)
    assert torch.equal(found.maps[0], explain_generation(bound(), [position]).maps[0])
    found.save(tmp_path / "d")
    assert captum_dcam.Explanation.load(tmp_path / "d").targets[0].positions == (position,)


def test_a_forced_answer_of_such_ids():
    ids = bound().trajectory.tokens[0].tolist()
    forced = [force(bound().again(), given) for given in (ids, [np.int64(i) for i in ids])]
    assert torch.equal(forced[0].tokens, forced[1].tokens)


def test_a_task_takes_a_generator_only():
    with pytest.raises(DcamError, match="generator is 3"):
        AttributionTask(bound(), (word(),), generator=3)
    with pytest.raises(DcamError, match="score is 'best'"):
        AttributionTask(bound(), (word(),), score="best")


@pytest.mark.parametrize("number", INTEGERS, ids=lambda n: n.__name__)
def test_plans_data_and_grids_of_such_integers(number):
    variant = {"name": "diffusion_cam", "layer": number(1), "passes": number(9)}
    given = {"start": number(2), "limit": number(3), "seed": number(5), "threads": number(1)}
    made = Plan(variants=[Variant(**variant)], **given)
    same = Plan(
        variants=[Variant("diffusion_cam", layer=1, passes=9)], start=2, limit=3, seed=5, threads=1
    )
    assert made.json() == same.json() and made.digest == same.digest
    scenes = SceneDataset(number(3), number(1), number(7))
    assert scenes.ids == SceneDataset(3, 1, 7).ids
    assert canonical(dict(scenes.settings)) == canonical(dict(SceneDataset(3, 1, 7).settings))
    assert select([1, 2, 3], None, number(2), None) == [1, 2]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 2:6] = True
    assert torch.equal(oracle_map(mask, (number(4), number(4))), oracle_map(mask, (4, 4)))


@pytest.mark.parametrize("value", (True, 2.0, "2", torch.tensor(True), np.float64(2)), ids=repr)
def test_plans_data_and_grids_take_nothing_else(value):
    for make in (
        lambda: Variant("diffusion_cam", layer=value),
        lambda: Variant("diffusion_cam", passes=value),
        lambda: Plan(variants=["diffusion_cam"], seed=value),
        lambda: SceneDataset(value),
        lambda: select([1, 2, 3], None, value, None),
        lambda: oracle_map(torch.ones(8, 8, dtype=torch.bool), (value, 4)),
    ):
        with pytest.raises(InputError, match="expected"):
            make()
