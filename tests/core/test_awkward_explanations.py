"""Explanations of an awkward batch are those of each example alone, and do as they are told."""

import awkward
import pytest
import tiny
import torch
from captum.attr import NoiseTunnel
from plain import plain

import captum_dcam
from captum_dcam import DiffusionCAM, explain_generation, sign_check
from captum_dcam.maps import Reading, word_maps
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.words import resolve
from captum_dcam.presets import preset
from captum_dcam.refine import SICD, MinMax

both = pytest.mark.parametrize("cache", awkward.CACHES)
#: families whose batches hold two examples
batched = pytest.mark.parametrize("family", [f for f in awkward.FAMILIES if awkward.BATCH[f] > 1])
presets = pytest.mark.parametrize("name", ("default", "paper"))
EXACT = torch.float64


def targets_of(forward):
    """For every example the pair of another position."""
    tokens = forward.trajectory.tokens.tolist()
    return [(p, row[p]) for p, row in zip((1, 3), tokens, strict=False)]


# -- what an explanation says ----------------------------------------------------------------------

SAID = {
    ("mini", 0): ("a red circle and a stars two hearts in the", "what is this ?"),
    ("mini", 1): ("of the moons of the five rings .", "describe the image in detail ."),
    ("lavida", 0): ("a red dogs on a mat on the cats", "what is this ?"),
    ("causal", 0): ("a red circles is a blue squares", "what is red ?"),
    ("causal", 1): ("the image is reds the a what", "the image is what circle ?"),
}


@pytest.mark.parametrize(("family", "example"), SAID)
def test_the_answer_is_told_without_its_ends(family, example):
    forward = awkward.bound(family)
    found = explain_generation(forward, example=example, preset="base")
    answer, prompt = SAID[family, example]
    assert (found.answer, found.prompt) == (answer, prompt)
    assert "".join(found.token_texts).strip() == answer
    assert list(found.words) == answer.removesuffix(" .").split()
    tokens = forward.trajectory.tokens[example]
    stops = [int(t) in forward.adapter.stop_ids for t in tokens]
    assert [text == "" for text in found.token_texts] == stops and any(stops)
    assert torch.equal(found.trajectory.tokens[0], tokens)
    assert torch.equal(found.trajectory.commit_step[0], forward.trajectory.commit_step[example])
    assert torch.equal(found.trajectory.confidence[0], forward.trajectory.confidence[example])
    shown = awkward.pictures(family, example)
    assert [i.tobytes() for i in found.images] == [i.tobytes() for i in shown]


@batched
@both
@presets
@pytest.mark.parametrize("example", (0, 1))
def test_an_example_is_explained_as_alone(family, cache, name, example):
    found = explain_generation(
        awkward.bound(family, cache, dtype=EXACT), example=example, preset=name
    )
    alone = explain_generation(awkward.alone(family, cache, example, dtype=EXACT), preset=name)
    assert found.targets == alone.targets and found.commit_steps() == alone.commit_steps()
    for own, other in zip(found.maps + found.peaks, alone.maps + alone.peaks, strict=True):
        assert own.any() and tiny.relative(own, other) < 1e-4


def test_peaks_are_the_maxima_of_each_grids_own_maps():
    forward = awkward.bound("mini", dtype=EXACT)
    targets = resolve(forward.adapter, forward.trajectory.tokens[1].tolist(), None)
    raw = word_maps(forward, targets, [1] * len(targets), Reading("final"))
    found = explain_generation(forward, example=1, preset="paper")
    for peaks, maps in zip(found.peaks, raw, strict=True):
        assert torch.equal(peaks, maps.relu().amax((1, 2)).float())


def test_focus_and_pixels_are_those_of_the_grid(tmp_path):
    """The tiny model's cells are 10 x 7.5 px; the second grid begins with the sixth row."""
    forward = awkward.bound("mini")
    made = explain_generation(forward, example=1, preset="base", product="positionwise")
    for found in (made, captum_dcam.Explanation.load(made.save(tmp_path / "x"))):
        for grid, first, shape in ((0, 0, (5, 6)), (1, 5, (3, 8))):
            for number, word in enumerate(found.words[:3]):
                maps = found.maps[grid][number].double()
                assert torch.equal(found.maps[grid][number], made.maps[grid][number])
                row, column = divmod(int(maps.argmax()), shape[1])
                focus = found.focus(number, grid)
                box = (10 * column, 7.5 * (row + first), 10 * (column + 1), 7.5 * (row + first + 1))
                assert maps.any() and focus["peak"] == pytest.approx(box)
                x, y = torch.arange(shape[1]) + 0.5, torch.arange(shape[0]) + first + 0.5
                center = (maps.sum(0) @ x.double(), maps.sum(1) @ y.double())
                expected = [float(c / maps.sum() / 8) for c in center]
                assert focus["center"] == pytest.approx(expected)
                assert found.focus(word, grid) == found.focus(found.words.index(word), grid)
            pixels = found.pixel_maps(grid).sum(0)
            inside = torch.zeros(60, 80, dtype=torch.bool)
            inside[int(7.5 * first) : int(7.5 * (first + shape[0])), : 10 * shape[1]] = True
            assert not pixels[~inside].any() and pixels[inside].any()


# -- what refinements are told ---------------------------------------------------------------------


class Notes:
    """A refinement that changes nothing and notes what it is told."""

    def __init__(self):
        self.seen = []

    def __call__(self, maps, context=None):
        self.seen.append((tuple(maps.shape[-2:]), context.image_size, context.steps))
        return maps

    def describe(self):
        return {"name": "notes"}


@pytest.mark.parametrize("family", awkward.FAMILIES)
def test_refinements_are_told_of_the_grids_own_image(family):
    forward, notes = awkward.bound(family), Notes()
    sizes = [(i.height, i.width) for i in awkward.pictures(family)]
    shapes, steps = forward.request.layout.shapes, forward.trajectory.steps
    expected = [(shape, sizes[n % len(sizes)], steps) for n, shape in enumerate(shapes)]
    explain_generation(forward, 1, refinements=notes)
    assert notes.seen == expected and steps == forward.trajectory.tokens.shape[1]
    notes.seen.clear()
    pixels = forward.request.pixels
    DiffusionCAM(forward).attribute(pixels, targets_of(forward), refinements=[notes])
    assert notes.seen == expected * forward.request.batch


# -- what Captum's methods are given ---------------------------------------------------------------


@batched
@both
@presets
def test_every_row_of_attribute_is_its_example(family, cache, name):
    forward = awkward.bound(family, cache, dtype=EXACT)
    targets = targets_of(forward)
    cam = DiffusionCAM(forward, preset=name)
    found = cam.attribute(forward.request.pixels, targets)
    for b, target in enumerate(targets):
        alone = awkward.alone(family, cache, b, dtype=EXACT)
        expected = explain_generation(alone, target, preset=name).maps
        for own, other in zip(found, expected, strict=True):
            assert other.any() and tiny.relative(own[b], other) < 1e-4


@batched
@both
@pytest.mark.parametrize(("name", "samples"), (("default", 2), ("base", None)))
def test_noise_tunnel_reads_every_example_in_the_states_of_its_word(family, cache, name, samples):
    """With next to no noise it is the attribution itself, also in parts of two samples."""
    forward = awkward.bound(family, cache, dtype=EXACT)
    targets = targets_of(forward)
    found = NoiseTunnel(DiffusionCAM(forward, preset=name)).attribute(
        forward.request.pixels,
        nt_type="smoothgrad",
        nt_samples=3,
        nt_samples_batch_size=samples,
        stdevs=1e-9,
        target=targets,
    )
    for b, target in enumerate(targets):
        alone = awkward.alone(family, cache, b, dtype=EXACT)
        expected = explain_generation(alone, target, preset=name).maps
        for own, other in zip(found, expected, strict=True):
            assert own.shape[0] == 2 and tiny.relative(own[b], other) < 1e-4


def test_a_chosen_step_has_image_states_and_logits_of_its_own():
    """Without a cache; in every entrance, and in what NoiseTunnel repeats. By one plain pass."""
    forward = awkward.bound("mini", "none", dtype=EXACT)
    targets, step = targets_of(forward), {"step": 4}
    cam, pixels = DiffusionCAM(forward, preset="base"), forward.request.pixels
    found = cam.attribute(pixels, targets, **step)
    noisy = NoiseTunnel(cam).attribute(pixels, nt_samples=3, stdevs=1e-9, target=targets, **step)
    for b, (position, token) in enumerate(targets):
        one = explain_generation(forward, (position, token), example=b, preset="base", **step)
        state = plain("mini", "none", b, 4)
        features = state.grids(state.hidden())
        gradients = state.grids(state.gradient([(position, token)]))
        for grid, (f, g) in enumerate(zip(features, gradients, strict=True)):
            expected = (f * g.mean((0, 1))).sum(-1).relu()
            for maps in (found[grid][b, 0], noisy[grid][b, 0], one.maps[grid][0]):
                assert expected.any() and tiny.relative(maps, expected) < 1e-4


@both
def test_gradients_are_taken_as_grad_kwargs_say(cache):
    """Captum hands them to autograd: an example's output counts as often as they say."""
    forward = awkward.bound("mini", cache, dtype=EXACT)
    cam, targets = DiffusionCAM(forward, preset="base"), targets_of(forward)
    pixels, weights = forward.request.pixels, (2.0, 5.0)
    found = cam.attribute(
        pixels, targets, grad_kwargs={"grad_outputs": [torch.tensor(w).double() for w in weights]}
    )
    plainly = cam.attribute(pixels, targets)
    for own, other in zip(found, plainly, strict=True):
        for b, weight in enumerate(weights):
            assert other[b].any() and tiny.relative(own[b], weight * other[b]) < 1e-9


def test_the_layers_input_is_what_an_edit_is_given():
    forward = awkward.bound("mini", "none", dtype=EXACT)
    cam, targets = DiffusionCAM(forward, preset="base"), targets_of(forward)
    options = {"relu_attributions": False, "attr_dim_summation": False}
    with forward.edited(lambda f, grid: f + 1 + grid):
        given, left = (
            cam.attribute(
                forward.request.pixels, targets, attribute_to_layer_input=read_input, **options
            )
            for read_input in (True, False)
        )
    ones = cam.attribute(forward.request.pixels, targets, **options)
    for grid in (0, 1):  # the same pooled gradients, times values that the edit has raised
        raised = left[grid] - given[grid]
        assert torch.allclose(raised, raised[:, :, :1, :1].expand_as(raised), atol=1e-9)
        assert raised.abs().amax() > 1e-3 * ones[grid].abs().amax()


# -- what is given in place of a preset's ----------------------------------------------------------

OTHER = {"score": "teacher", "product": "plus_plus", "center": True}


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("name", ("base", "default"))
def test_an_option_takes_the_place_of_the_presets(option, name):
    """In both entrances: of one example, and of Captum's attribute."""
    forward = awkward.bound("mini", dtype=EXACT)
    value = {"center": False, "product": "pooled"}.get(option) if name == "default" else None
    given = {option: OTHER[option] if value is None else value, "refinements": []}
    plainly = preset(name)
    reading = plainly.reading(**{option: given[option]})
    assert reading != plainly.reading()
    targets = targets_of(forward)
    found = DiffusionCAM(forward, preset=name).attribute(
        forward.request.pixels, targets, relu_attributions=False, **given
    )
    for b, pair in enumerate(targets):
        (target,) = resolve(forward.adapter, forward.trajectory.tokens[b].tolist(), pair)
        signed = word_maps(forward, [target], [b], reading)
        before = word_maps(forward, [target], [b], plainly.reading())
        one = explain_generation(forward, pair, example=b, preset=name, **given)
        for grid in (0, 1):
            assert tiny.relative(before[grid], signed[grid]) > 1e-3
            assert tiny.relative(found[grid][b], signed[grid]) < 1e-6
            assert tiny.relative(one.maps[grid], signed[grid].relu()) < 1e-5
        assert one.settings[option] == given[option]


CALLS = (
    {"words": ["stars", "red"]},
    {"layer": 2},
    {"preset": "paper"},
    {"score": "teacher"},
    {"product": "plus_plus"},
    {"center": False},
    {"step": 3},
    {"refinements": [MinMax()]},
    {"refinements": []},
)


@pytest.mark.parametrize("given", CALLS, ids=str)
def test_explain_hands_on_all_that_it_is_given(given):
    """It generates, then explains as what is bound would be."""
    made = awkward.adapter("mini", "none", EXACT)
    (image,), prompt = awkward.pictures("mini", 1), awkward.PROMPTS["mini"][0]
    given = {"words": "stars", **given}
    found = captum_dcam.explain(made, image, prompt, **{"layer": 1, **given})
    forward = DenoisingForward(made, given.get("layer", 1))
    forward.generate(made.prepare([[image]], [prompt]))
    rest = {k: v for k, v in given.items() if k != "layer"}
    expected = explain_generation(forward, **rest)
    plainly = explain_generation(forward.again(1), "stars")
    assert found.settings == expected.settings and found.targets == expected.targets
    assert found.settings["layer"] == given.get("layer", 1) % 4
    for own, other in zip(found.maps, expected.maps, strict=True):
        assert torch.allclose(own, other, atol=1e-6)
    same = found.words == plainly.words and all(
        torch.allclose(own, other, atol=1e-6)
        for own, other in zip(found.maps, plainly.maps, strict=True)
    )
    assert not same


# -- what is remembered ----------------------------------------------------------------------------


def test_what_is_remembered_belongs_to_one_example_and_one_reading():
    """One forward, asked again and again, answers as a new one."""
    debias = [MinMax(), SICD(gate=False, omega_rep=1.0, omega_out=0.0, lambda_max=1.0)]
    kept = awkward.bound("mini")
    asked = [
        {"example": b, "score": score, "product": product, "center": center}
        for b in (0, 1)
        for score, product, center in (
            ("commit", "positionwise", True),
            ("commit", "positionwise", False),
            ("commit", "pooled", True),
            ("teacher", "positionwise", True),
        )[: 4 - 3 * b]
    ]
    for given in asked:
        found, expected = (
            explain_generation(f, 1, refinements=debias, **given).maps for f in (kept, kept.again())
        )
        for own, other in zip(found, expected, strict=True):
            assert torch.equal(own, other)


def test_nothing_is_remembered_of_an_edited_model():
    debias = [MinMax(), SICD(gate=False, omega_rep=1.0, omega_out=0.0, lambda_max=1.0)]
    forward = awkward.bound("mini", dtype=EXACT).again()

    def maps():
        return explain_generation(forward, 1, example=1, refinements=debias).maps[1]

    before = maps()
    with forward.edited(lambda f, _grid: f.flip(-1)):
        edited = maps()
    assert torch.equal(maps(), before)
    other = forward.again()
    with other.edited(lambda f, _grid: f.flip(-1)):
        assert torch.equal(
            explain_generation(other, 1, example=1, refinements=debias).maps[1], edited
        )
    assert not torch.equal(edited, before)


# -- the sign --------------------------------------------------------------------------------------


@batched
@pytest.mark.parametrize("score", ("commit", "teacher"))
def test_the_sign_is_checked_on_the_example_and_its_grids(family, score):
    forward, example = awkward.bound(family, dtype=EXACT), 1
    alone = awkward.alone(family, example=example, dtype=EXACT)
    tokens = alone.trajectory.tokens[0].tolist()
    (target,) = (
        w
        for w in resolve(alone.adapter, tokens, None)
        if w.positions == (2, 3) or w.positions == (3, 4)
    )
    drawn = torch.Generator().manual_seed(1)
    maps = [torch.rand(1, *shape, generator=drawn) for shape in alone.request.layout.shapes]
    found, expected = (
        sign_check(
            f, [target], maps, torch.Generator().manual_seed(0), example=b, score=score, share=0.2
        )
        for f, b in ((forward, example), (alone, 0))
    )
    assert tiny.relative(found, expected) < 1e-4 and expected.abs().min() > 1e-4
    masks = [m[0] >= m[0].flatten().topk(round(0.2 * m[0].numel())).values[-1] for m in maps]

    def erased(features, grid):
        return torch.where(masks[grid], features.mean((-2, -1), keepdim=True), features)

    def sure():  # one token after the other, each in its own state
        odds = []
        for pair in zip(target.positions, target.token_ids, strict=True):
            with torch.no_grad():
                logits = alone(alone.request.pixels, *alone.arguments(pair, score))
            odds.append(float(logits[0, pair[0]].log_softmax(-1)[pair[1]]))
        return sum(odds) / len(odds)

    before = sure()
    with alone.edited(erased):
        assert float(found[0, 0]) == pytest.approx(before - sure(), rel=1e-4)
    whole = sign_check(
        forward, [target], maps, torch.Generator(), example=example, score=score, share=1
    )
    assert float(whole[0, 0]) == float(whole[0, 1]) != float(found[0, 0])  # nothing is left


NOUNS = {
    ("mini", 0): ["circle", "stars", "hearts"],
    ("mini", 1): ["moons", "rings"],
    ("lavida", 0): ["dogs", "mat", "cats"],
}


@pytest.mark.parametrize(("family", "example"), NOUNS)
def test_nouns_of_one_and_of_many(family, example):
    forward = awkward.bound(family)
    found = explain_generation(forward, "nouns", example=example, preset="base")
    assert list(found.words) == NOUNS[family, example]


@both
def test_a_forward_hands_its_settings_to_its_copies(cache):
    made = awkward.adapter("mini", cache)
    forward = DenoisingForward(made, 2, "teacher", internal_batch_size=3)
    forward.bind(awkward.bound("mini", cache).request, awkward.bound("mini", cache).trajectory)
    with forward.edited(lambda f, _grid: f):
        for other in (forward.twin(), forward.again(), single(forward, 1)):
            assert (other.layer, other.score, other.internal_batch_size) == (2, "teacher", 3)
        assert single(forward, 1).tap.edit is forward.tap.edit
    assert forward.twin(0).layer == 0 and forward.again(1).layer == 1
    assert not forward.twin().bound and forward.again().request is forward.request
    alone = single(forward, 1)
    visible = alone.arguments()[-1]  # of the score teacher
    assert torch.equal(visible[0], forward.trajectory.tokens[1])
    ids, seen = (e[0] for e in alone.request.extras)
    assert torch.equal(ids, forward.request.extras[0][1])
    assert torch.equal(seen, forward.request.extras[1][1])


@both
def test_arguments_are_each_examples_own_state(cache):
    forward = awkward.bound("mini", cache)
    targets = targets_of(forward)
    ids, mask, canvas = forward.arguments(targets)
    assert torch.equal(ids, forward.request.extras[0])
    assert torch.equal(mask, forward.request.extras[1])
    for b, (position, _) in enumerate(targets):
        expected = forward.trajectory.tokens[b].clone()
        expected[position] = forward.adapter.mask_id
        assert torch.equal(canvas[b], expected)
    shown = forward.arguments(targets, "teacher")[-1]
    assert torch.equal(shown, forward.trajectory.tokens)
