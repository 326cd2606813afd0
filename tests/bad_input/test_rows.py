"""Rows of pixels: every row is one example's, known by its pixels or its place, or refused."""

import dataclasses
import functools

import awkward
import pytest
import tiny
import torch
from captum import metrics
from captum.attr import LayerGradCam, NoiseTunnel

from captum_dcam import DiffusionCAM
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.faithfulness import captum_metrics
from captum_dcam.maps import Reading, word_maps
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.words import Target
from captum_dcam.refine import MinMax

PRESETS = ("base", "default")


@pytest.fixture(scope="module", params=tiny.CACHES)
def forward(request):
    made = tiny.bound(request.param, batch=2, prompts=["what is this ?", "list the objects ."])
    yield made
    assert not tiny.hooks(made) and made.tap.edit is None


def targets(forward, kind):
    """Per example a target: a token, or a word of three."""
    tokens = forward.trajectory.tokens
    if kind == "token":
        return [(2 + b, int(tokens[b, 2 + b])) for b in range(len(tokens))]
    at = ((1, 2, 5), (0, 3, 4))
    return [Target(f"w{b}", at[b], tuple(tokens[b, list(at[b])].tolist())) for b in (0, 1)]


def close(found, expected):
    return tiny.relative(found, expected) < 1e-4


# -- rows that are the bound examples' own ---------------------------------------------------------


@functools.cache
def alone_of(forward, kind):
    """Every example's map, by a forward that knows nothing of the other."""
    pairs = enumerate(targets(forward, kind))
    cams = [(DiffusionCAM(single(forward, b), preset="base"), b, own) for b, own in pairs]
    return [cam.attribute(forward.request.pixels[[b]], own) for cam, b, own in cams]


ORDERS = ([0, 1], [1, 0], [1], [0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0], [0, 0, 0])


@pytest.mark.parametrize("kind", ("token", "word"))
@pytest.mark.parametrize("rows", ORDERS, ids=str)
def test_rows_in_any_order_get_their_own_examples_maps(forward, kind, rows):
    """[0, 1, 0, 1] was read as [0, 0, 1, 1] once, with relative errors of 1.5."""
    cam, own = DiffusionCAM(forward, preset="base"), targets(forward, kind)
    pixels = forward.request.pixels
    alone = alone_of(forward, kind)
    found = cam.attribute(pixels[rows], [own[b] for b in rows])
    assert close(found, torch.cat([alone[b] for b in rows]))


@pytest.mark.parametrize("preset", ("default", "paper"))
def test_rows_are_refined_in_their_own_examples_context(forward, preset):
    cam, own = DiffusionCAM(forward, preset=preset), targets(forward, "token")
    pixels = forward.request.pixels
    expected = cam.attribute(pixels, own)
    rows = [1, 0, 1]
    assert close(cam.attribute(pixels[rows], [own[b] for b in rows]), expected[rows])


def test_one_target_for_some_rows(forward):
    cam, (_, second) = DiffusionCAM(forward, preset="base"), targets(forward, "token")
    both = cam.attribute(forward.request.pixels, second)
    assert close(cam.attribute(forward.request.pixels[1:], second), both[1:])


def test_a_call_of_the_generation_is_read_for_the_rows_own_examples():
    made = tiny.bound("none", batch=2)
    cam, own = DiffusionCAM(made, preset="base"), targets(made, "token")
    both = cam.attribute(made.request.pixels, own, step=3)
    assert close(cam.attribute(made.request.pixels[[1]], own[1:], step=3), both[1:])


# -- changed rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("token", "word"))
@pytest.mark.parametrize("preset", PRESETS)
def test_noise_tunnel(forward, kind, preset):
    cam, own = DiffusionCAM(forward, preset=preset), targets(forward, kind)
    pixels = forward.request.pixels
    plain = cam.attribute(pixels, own)
    for samples, stdevs, least in ((3, 1e-6, 0.99), (2, 0.3, 0.0)):
        found = NoiseTunnel(cam).attribute(
            pixels, nt_type="smoothgrad", nt_samples=samples, stdevs=stdevs, target=own
        )
        assert found.shape == plain.shape and torch.isfinite(found).all()
        both = torch.stack((found.flatten(), plain.flatten()))
        assert torch.corrcoef(both)[0, 1] > least


@pytest.mark.parametrize(
    "family, cache, example",
    [("mini", "none", 1), ("mini", "prefix", 0), ("lavida", "prefix", 0), ("causal", "none", 1)],
)
def test_words_on_changed_pixels_are_the_changed_images_maps(family, cache, example):
    """A word of three tokens on another image, in the same answer and steps: computed by a forward
    that is bound to that image."""
    made = awkward.alone(family, cache, example)
    tokens = made.trajectory.tokens[0]
    word = Target("w", (0, 2, 3), tuple(tokens[[0, 2, 3]].tolist()))
    changed = made.request.pixels + 0.3 * torch.randn(made.request.pixels.shape)
    expected = torch.zeros(())
    for p in word.positions:  # token by token, each by Captum at its own step
        target = (p, int(tokens[p]))
        maps = LayerGradCam(made, made.tap).attribute(
            changed, target, additional_forward_args=made.arguments(target)
        )
        maps = maps if isinstance(maps, tuple) else (maps,)
        expected = expected + torch.cat([m.detach().flatten() for m in maps])
    cam = DiffusionCAM(made, preset="base")
    options = {"relu_attributions": False, "score": "commit"}
    found = cam.attribute(changed, word, **options)
    found = found if isinstance(found, tuple) else (found,)
    assert close(torch.cat([m.flatten() for m in found]), expected)
    assert torch.equal(made.trajectory.tokens[0], tokens)  # the bound generation stays
    once = word_maps(made, [word], [0], Reading(score="commit"))
    again = cam.attribute(made.request.pixels, word, **options)
    again = again if isinstance(again, tuple) else (again,)
    assert all(torch.equal(a[:, 0], b) for a, b in zip(again, once, strict=True))


@pytest.mark.parametrize("kind", ("token", "word"))
def test_captums_sensitivity_of_the_attribution(forward, kind):
    cam, own = DiffusionCAM(forward, preset="base"), targets(forward, kind)
    pixels = forward.request.pixels

    def explain(given, **options):  # Captum's metric wants a tuple
        return (cam.attribute(given, **options),)

    found = metrics.sensitivity_max(
        explain, pixels, perturb_radius=1e-4, n_perturb_samples=2, target=own
    )
    assert found.shape == (2,) and bool((found >= 0).all()) and float(found.max()) < 0.1
    assert not tiny.hooks(forward)


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_our_metrics_of_words_of_several_tokens(cache):
    made = tiny.bound(cache)
    word = targets_of_one(made)
    maps = word_maps(made, [word], [0], Reading())
    fidelity = captum_metrics.infidelity(made, [word], maps, samples=4)
    change = captum_metrics.sensitivity_max(
        made, [word], lambda f, words: word_maps(f, words, [0] * len(words), Reading()), samples=2
    )
    for found in (fidelity, change):
        assert found.shape == (1,) and bool((found >= 0).all()) and torch.isfinite(found).all()


def targets_of_one(forward):
    tokens = forward.trajectory.tokens[0]
    return Target("w", (1, 2, 5), tuple(tokens[[1, 2, 5]].tolist()))


def test_an_edited_tap_is_seen_by_words_on_changed_pixels(forward):
    cam, own = DiffusionCAM(forward, preset="base"), targets(forward, "word")
    changed = forward.request.pixels + 0.01
    plain = cam.attribute(changed, own)
    with forward.edited(lambda features, _grid: features.flip(-1)):
        assert not close(cam.attribute(changed, own), plain)


def test_rows_of_a_record_are_its_examples():
    """With a last step of each token's own, as an answer of several canvases has it."""
    made = tiny.bound("none", batch=2)
    steps = made.trajectory.steps
    last = torch.arange(16).view(2, 8) % steps
    read = torch.arange(steps)[:, None, None] <= last
    record = dataclasses.replace(made.trajectory, read_at=read)
    found = record.rows([1, 0, 1])
    for row, example in enumerate((1, 0, 1)):
        one, other = found.single(row), record.single(example)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(
            one.final_step, last[[example]]
        )
        for name in ("states", "final_state"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                assert torch.equal(a, b)
        assert found.step_of(row, 3, "final") == record.step_of(example, 3, "final")
        assert found.step_of(row, 3, "commit") == record.step_of(example, 3, "commit")
    request = made.request.rows([1, 0, 1], made.request.pixels[[1, 0, 1]])
    assert request.batch == 3 and request.prompts[1] == made.request.prompts[0]


def test_rows_of_a_conversation_remember_what_was_asked():
    made = awkward.alone("causal", "prefix", 1)
    rows = made.request.rows([0, 0], made.request.pixels.repeat_interleave(2, 0))
    assert rows.asked == made.request.asked * 2 and len(rows.images) == rows.batch == 2


# -- refused ---------------------------------------------------------------------------------------


def noised(pixels, rows):
    return pixels[rows] + 0.1 * torch.randn(pixels[rows].shape)


REFUSED = [
    (
        "order",
        lambda p: noised(p, [0, 1, 0, 1]),
        InputError,
        "row 1 is nearer to another.*than to 0",
    ),
    (
        "order",
        lambda p: noised(p, [1, 0]),
        InputError,
        "row 0 is nearer to another example.*single",
    ),
    ("order", lambda p: noised(p, [1, 1, 0, 0]), InputError, "row 0 is nearer.*repeat_interleave"),
    ("count", lambda p: noised(p, [0]), InputError, "1 rows of pixels for a bound batch of 2"),
    ("count", lambda p: noised(p, [0, 0, 1]), InputError, "3 rows .* nor each example as often"),
    ("size", lambda p: p[..., :32], InputError, r"shape \(2, 1, 3, 64, 32\): expected rows"),
    ("size", lambda p: p[0], InputError, r"shape \(1, 3, 64, 64\): expected rows \(1, 3, 64, 64\)"),
    ("size", lambda p: p[:0], InputError, r"shape \(0, 1, 3, 64, 64\): expected rows"),
    ("size", lambda p: p.repeat(1, 2, 1, 1, 1), InputError, "of another size is a request of its"),
    ("dtype", lambda p: p.double(), InputTypeError, "pixels are torch.float64: expected torch.fl"),
    ("dtype", lambda p: p.half(), InputTypeError, r"torch.float16: expected torch.float32.*\.to\("),
    ("dtype", lambda p: p.bfloat16(), InputTypeError, "pixels are torch.bfloat16"),
    ("dtype", lambda p: p.long(), InputTypeError, "pixels are torch.int64: expected a floating"),
    ("dtype", lambda p: p.numpy(), (InputTypeError, AssertionError), "ndarray|Tensor"),
    ("device", lambda p: p.to("meta"), InputError, "pixels are on meta: expected cpu"),
    ("inputs", lambda p: (p, p), InputError, "inputs are 2 tensors: expected one"),
    ("finite", lambda p: p * torch.nan, InputError, "NaN or infinite"),
]


@pytest.mark.parametrize("kind", ("token", "word"))
@pytest.mark.parametrize("_what, change, error, words", REFUSED)
def test_refused_by_name(forward, kind, _what, change, error, words):
    given, own = change(forward.request.pixels), targets(forward, kind)
    cam = DiffusionCAM(forward)
    with pytest.raises(error, match=words):
        cam.attribute(given, [own[0]] * len(given) if torch.is_tensor(given) else own)
    assert not tiny.hooks(forward) and not forward.request.pixels.requires_grad


@pytest.mark.parametrize("case", [c for c in REFUSED if c[0] in ("size", "dtype")])
def test_captums_own_methods_are_told_the_same(forward, case):
    _, change, error, words = case
    own = targets(forward, "token")
    if not torch.is_tensor(given := change(forward.request.pixels)):
        return
    with pytest.raises(error, match=words):
        forward(given, *forward.arguments(own))


def test_rows_of_pixels_and_of_arguments_belong_together(forward):
    own = targets(forward, "token")
    args = forward.arguments(own)
    pixels = forward.request.pixels
    for given in (pixels[1:], pixels.repeat_interleave(2, 0)):
        with pytest.raises(InputError, match=r"rows of pixels with \[2, 2, 2\] rows of additional"):
            forward(given, *args)


def test_rows_of_one_image_in_two_examples_are_told_by_their_places():
    shared = tiny.adapter("prefix")
    image = tiny.picture()
    made = DenoisingForward(shared, 1)
    prompts = ["what is this ?", "list the objects ."]
    made.generate(shared.prepare([[image], [image]], prompts), gen_length=8)
    cam, own = DiffusionCAM(made, preset="base"), targets(made, "token")
    pixels = made.request.pixels
    both = cam.attribute(pixels, own)
    assert not close(both[:1], both[1:])
    with pytest.raises(InputError, match="rows equal the pixels of several examples"):
        cam.attribute(torch.cat((pixels, pixels)), own + own)
    with pytest.raises(InputError, match="rows equal the pixels of several examples"):
        cam.attribute(pixels[1:], own[1:])
    second = tuple(a[1:] for a in made.arguments(own, "final"))
    said = cam.attribute(pixels[1:], own[1:], second)  # arguments say whose rows they are
    assert close(said, both[1:])
    needs_no_example = cam.attribute(pixels[1:], own[1:], second, refinements=[MinMax()])
    assert float(needs_no_example.max()) == 1
