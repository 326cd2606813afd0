"""One way from words to refined maps: nesting, users' refinements, repeated words, budgets."""

import dataclasses
import json

import pytest
import tiny
import torch
from calibration.made_maps import FITTED
from evaluation import made

import captum_dcam
from captum_dcam import DiffusionCAM, compare_generation, explain_generation, maps
from captum_dcam.calibration import Chain, collect
from captum_dcam.data import dataset
from captum_dcam.evaluation import Variant, evaluate
from captum_dcam.maps import Reading
from captum_dcam.methods import METHODS, AttributionTask, Budget, metered, method
from captum_dcam.model.answers import force
from captum_dcam.presets import PRESETS, preset, write_preset
from captum_dcam.refine import (
    SICD,
    Compose,
    MinMax,
    NamedRefinement,
    min_max,
    paper_refinements,
    register_refinement,
)
from captum_dcam.refine.base import REFINEMENTS


@pytest.fixture(scope="module")
def scene():
    """An answer in which a function word stands twice."""
    forward = tiny.bound("prefix", layer=2)
    force(forward, "a red circle and a blue star .")
    return forward


@pytest.fixture
def forward(scene):
    """The same generation with nothing remembered."""
    fresh = scene.twin()
    fresh.bind(scene.request, scene.trajectory)
    return fresh


class Seen:
    """A refinement of a user's own, which keeps the repeated maps that it is given."""

    def __init__(self):
        self.repeated = []

    def __call__(self, maps, context=None):
        self.repeated.append(context.repeated_maps)
        return maps

    def describe(self):
        return {"name": "seen"}


@dataclasses.dataclass(frozen=True)
class Probe(NamedRefinement):
    """Gives maps back as they are."""

    def __call__(self, maps, context=None):
        return maps


@pytest.fixture
def probe():
    register_refinement("probe")(Probe)
    yield
    REFINEMENTS.remove("probe")


# -- 1: what a stage needs is found at any depth --------------------------------------------------


@pytest.mark.parametrize("depth", (1, 2, 3))
def test_nested_refinements_equal_flat_ones(forward, depth):
    nested = paper_refinements()
    for _ in range(depth):
        nested = [nested] if depth == 1 else Compose([nested])
    flat = explain_generation(forward, refinements=paper_refinements()).maps[0]
    assert torch.equal(explain_generation(forward, refinements=nested).maps[0], flat)
    without = explain_generation(forward, refinements=list(paper_refinements())[:-1]).maps[0]
    assert not torch.equal(flat, without)


@pytest.mark.parametrize("wrap", (lambda s: s, lambda s: [s], lambda s: Compose([Compose([s])])))
def test_a_users_refinement_gets_the_repeated_maps(forward, wrap):
    seen = Seen()
    explain_generation(forward, "circle", refinements=wrap(seen))
    (repeated,) = seen.repeated
    assert repeated is not None and float(repeated.max()) == 1 and float(repeated.min()) == 0


def test_a_users_refinement_gets_them_everywhere(forward):
    pixels, target = forward.request.pixels, tiny.pair(forward, 2)
    seen = Seen()
    DiffusionCAM(forward).attribute(pixels, target, refinements=[seen])
    compare_generation(forward, "circle", ["diffusion_cam_base"], refinements=[Compose([seen])])
    assert len(seen.repeated) == 2 and all(r is not None for r in seen.repeated)


# -- 2: repeated words are measured once ----------------------------------------------------------


@pytest.mark.parametrize("name", ("saliency", "diffusion_cam_base"))
def test_refinements_add_no_passes_when_the_repeated_words_are_explained(forward, name):
    bare = compare_generation(forward, None, [name]).rows[0].cost
    refined = compare_generation(forward, None, [name], refinements=[MinMax(), SICD()]).rows[0].cost
    assert (refined.forwards, refined.backwards) == (bare.forwards, bare.backwards)


def test_repeated_words_that_were_not_asked_for_are_explained_once(forward):
    def cost(words, refinements=()):
        return (
            compare_generation(forward, words, ["saliency"], refinements=refinements).rows[0].cost
        )

    alone, repeated = cost("circle").forwards, cost("a").forwards
    together = cost("circle", [MinMax(), SICD()]).forwards
    both = cost(["circle", "a"], [MinMax(), SICD()]).forwards
    assert alone < together == both and together >= repeated


# -- 3: a spent budget ----------------------------------------------------------------------------


def test_a_spent_budget_gives_no_repeated_map(forward):
    """Maps that no pass was left for are no maps of zeros: SICD has none."""
    refinements = [MinMax(), SICD()]
    found = compare_generation(
        forward, "circle", ["saliency"], refinements=refinements, budget=Budget(passes=1)
    )
    (row,) = found.rows
    assert row.complete == (True,)
    expected = SICD()(min_max(row.raw[0].relu()))
    assert torch.equal(row.maps[0], expected)
    seen = Seen()

    class Spy(SICD):
        def __call__(self, maps, context=None):
            return super().__call__(seen(maps, context), context)

    refinements = [MinMax(), Spy()]
    compare_generation(
        forward, "circle", ["saliency"], refinements=refinements, budget=Budget(passes=1)
    )
    assert seen.repeated == [None]


# -- 5: a preset file is read once ----------------------------------------------------------------


@pytest.mark.parametrize("after", ("deleted", "damaged", "edited"))
def test_a_preset_file_is_read_once(tmp_path, after):
    file = tmp_path / "mine.json"
    write_preset(file, "default", preset("default"), FITTED, {})
    forward = tiny.bound("prefix")
    pixels, target = forward.request.pixels, tiny.pair(forward, 1)
    cam = DiffusionCAM(forward, preset=str(file))
    before = cam.attribute(pixels, target)
    if after == "deleted":
        file.unlink()
    elif after == "damaged":
        file.write_text("{")
    else:
        record = json.loads(file.read_text())
        del record["digest"]
        file.write_text(json.dumps({**record, "product": "pooled", "center": False}))
    assert torch.equal(cam.attribute(pixels, target), before)


# -- all of it -------------------------------------------------------------------------------------


def _explain(forward, _folder):
    explain_generation(forward, "circle", refinements=[Probe()])


def _attribute(forward, _folder):
    pixels, target = forward.request.pixels, tiny.pair(forward, 2)
    DiffusionCAM(forward).attribute(pixels, target, refinements=[Probe()])


def _method(forward, _folder):
    task = AttributionTask(forward, explain_generation(forward, "circle", refinements=[]).targets)
    method("diffusion_cam").attribute(task)


def _compare(forward, _folder):
    compare_generation(forward, "circle", ["diffusion_cam_base"], refinements=[Probe()])


def _trial(forward, folder):
    variant = Variant("one", "diffusion_cam_base", refinements=("probe",))
    evaluate(made.plan(variants=(variant,)), folder, adapter=made.adapter(), data=made.Pictures(1))


def _calibrate(forward, _folder):
    words = collect(forward.adapter, dataset("scenes", count=1), [0], preset("base"))
    Chain(words).refined([Probe()])


@pytest.mark.parametrize("way", (_explain, _attribute, _method, _compare, _trial, _calibrate))
def test_all_refine_by_one_function(forward, probe, tmp_path, monkeypatch, way):
    """A refinement is called from :func:`captum_dcam.maps.refine_words` and from nowhere else."""
    inside, calls, original = [], [], maps.refine_words

    def spy(*args, **kwargs):
        inside.append(True)
        calls.append(len(args[0]))
        try:
            return original(*args, **kwargs)
        finally:
            inside.pop()

    def stage(self, values, context=None):
        assert inside, "a refinement was called by somebody else"
        return values

    monkeypatch.setattr(maps, "refine_words", spy)
    monkeypatch.setattr(Probe, "__call__", stage)
    default = dataclasses.replace(PRESETS["default"], refinements=lambda: Compose([Probe()]))
    monkeypatch.setitem(PRESETS, "default", default)
    way(forward, tmp_path / "store")
    assert calls


# -- remembered ------------------------------------------------------------------------------------


def test_repeated_maps_are_computed_once_per_generation(forward):
    """Bit-equal, and the second word costs what a word without refinements does."""
    pixels = forward.request.pixels
    targets = [tiny.pair(forward, n) for n in range(2)]
    fresh = []
    for target in targets:
        other = forward.twin()
        other.bind(forward.request, forward.trajectory)
        fresh.append(DiffusionCAM(other).attribute(pixels, target))
    costs = []
    cam = DiffusionCAM(forward)
    for target, expected in zip(targets, fresh, strict=True):
        with metered(forward) as cost:
            found = cam.attribute(pixels, target)
        assert torch.equal(found, expected)
        costs.append((cost.forwards, cost.backwards))
    with metered(forward) as raw:
        cam.attribute(pixels, targets[1], refinements=[])
    assert costs[1] == (raw.forwards, raw.backwards) and costs[0] > costs[1]


def test_what_was_remembered_goes_with_the_generation(forward):
    pixels, target = forward.request.pixels, tiny.pair(forward, 2)
    first = DiffusionCAM(forward).attribute(pixels, target)
    forward.generate(forward.request, gen_length=8)
    other = DiffusionCAM(forward).attribute(pixels, tiny.pair(forward, 2))
    fresh = forward.twin()
    fresh.bind(forward.request, forward.trajectory)
    assert torch.equal(DiffusionCAM(fresh).attribute(pixels, tiny.pair(fresh, 2)), other)
    assert first.shape == other.shape


def test_an_edited_tap_is_not_remembered(forward):
    """Maps of repeated words under an ablation are those of the ablated model."""
    pixels, target = forward.request.pixels, tiny.pair(forward, 2)
    plain = DiffusionCAM(forward).attribute(pixels, target)
    with forward.edited(lambda features, _grid: features.flip(-1)):
        DiffusionCAM(forward).attribute(pixels, target)
    assert torch.equal(DiffusionCAM(forward).attribute(pixels, target), plain)


def test_a_method_pays_for_its_own_repeated_maps(forward):
    """What one method remembers makes no other look cheaper."""
    names = ["diffusion_cam", method("diffusion_cam", refined=True)]
    rows = compare_generation(forward, "circle", names).rows
    assert rows[0].cost.backwards == rows[1].cost.backwards
    assert METHODS["diffusion_cam"] is type(names[1])


@pytest.mark.parametrize("changed", ("weights", "pixels"))
def test_what_is_remembered_is_computed_again_when_the_model_changes(changed):
    """Repeated words' maps are never those of other weights or pixels."""
    adapter = tiny.adapter("prefix")
    forward = captum_dcam.DenoisingForward(adapter, 1)
    forward.generate(adapter.prepare([[tiny.picture()]], [tiny.PROMPT]), keep=False, gen_length=8)
    reading, calls = Reading(), []

    def found():
        calls.append(True)
        return len(calls)

    assert forward.remembered(("x", reading), found) == 1
    assert forward.remembered(("x", reading), found) == 1
    with torch.no_grad():
        if changed == "weights":
            next(adapter.model.parameters()).mul_(1.5)
        else:
            forward.request.pixels.mul_(0.5)
    assert forward.remembered(("x", reading), found) == 2
    with forward.afresh():
        assert forward.remembered(("x", reading), found) == 3
    assert forward.remembered(("x", reading), found) == 2


def test_compare_sees_an_edited_tap():
    forward = tiny.bound("prefix")
    words = [tiny.pair(forward, 0)]
    plain = compare_generation(forward, words, ["diffusion_cam_base"]).rows[0].raw[0]
    with forward.edited(lambda features, _grid: features.flip(-1)):
        edited = compare_generation(forward, words, ["diffusion_cam_base"]).rows[0].raw[0]
    assert not torch.equal(plain, edited)


def test_some_rows_of_a_batch_are_known_by_their_pixels():
    """Every example's maps are refined in its own context, and none in another's."""
    forward = tiny.bound("prefix", batch=2)
    pixels = forward.request.pixels
    targets = [tiny.pair(forward, 0)] * 2
    args = forward.arguments(targets)
    both = DiffusionCAM(forward).attribute(pixels, targets, additional_forward_args=args)
    second = tuple(a[1:] for a in args)
    cam = DiffusionCAM(forward)
    alone = cam.attribute(pixels[1:], targets[1:], additional_forward_args=second)
    assert torch.allclose(alone, both[1:], atol=1e-4)
    assert torch.allclose(cam.attribute(pixels[1:], targets[1:]), both[1:], atol=1e-4)


def test_a_preset_that_was_found_is_taken_as_it_is():
    forward = tiny.bound("prefix")
    own = dataclasses.replace(PRESETS["base"], name="mine")
    found = explain_generation(forward, [0], preset=own)
    assert found.settings["preset"] == "mine"
    assert torch.equal(found.maps[0], explain_generation(forward, [0], preset="base").maps[0])
