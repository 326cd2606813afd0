"""The base map against Captum's, against plain autograd, and against finite differences."""

import numpy as np
import pytest
import tiny
import torch
from captum.attr import LayerGradCam

from captum_dcam import DiffusionCAM
from captum_dcam.errors import InfeasibleStepError, LayerError
from captum_dcam.maps import Reading, word_maps
from captum_dcam.model import gradients as vjp
from captum_dcam.model.words import Target

SCORES = ("commit", "final", "teacher", 2)


def by_hand(forward, example, position, token, step, layer):
    """Image features and gradients (D, 8, 8) without tap, adapter or cache: blocks in a loop."""
    model, request = forward.model, forward.request
    prefix = request.layout.prefix_length
    t = forward.trajectory
    canvas = t.tokens[example] if step == t.steps else t.states[0][step, example]
    ids = torch.cat((request.extras[0][example], canvas))[None]
    assert request.extras[1].all()  # no padding here
    length = ids.shape[1]
    segments = (prefix, length - prefix) if t.cache == "prefix" else (length,)
    with torch.no_grad():
        hidden = model.embed(ids, request.pixels[example : example + 1])
        rope = model.rope(torch.arange(length)[None], hidden.dtype)
        masks = (None,) * len(segments)
        for block in model.layers[: layer + 1]:
            hidden = block(hidden, rope, segments, masks)[0]
    leaf = hidden[:, :64].clone().requires_grad_()
    rest = torch.cat((leaf, hidden[:, 64:].detach()), dim=1)
    for block in model.layers[layer + 1 :]:
        rest = block(rest, rope, segments, masks)[0]
    score = model.unembed(rest[:, prefix:])[0, position, token]
    (gradient,) = torch.autograd.grad(score, leaf)
    return leaf.detach()[0].T.reshape(-1, 8, 8), gradient[0].T.reshape(-1, 8, 8)


def grad_cam(features, gradients):
    """Eq. 4 in numpy: channel weights are the mean gradients."""
    a, g = features.double().numpy(), gradients.double().numpy()
    weights = np.array([channel.mean() for channel in g])
    return torch.tensor(np.maximum(sum(w * c for w, c in zip(weights, a, strict=True)), 0))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("relu", (True, False))
def test_base_map_is_captums_layer_grad_cam(cache, score, relu):
    forward = tiny.bound(cache, batch=2, steps=4)
    for position in (0, 5):
        target = tiny.pairs(forward, position)
        args = forward.arguments(target, score)
        pixels = forward.request.pixels
        expected = LayerGradCam(forward, forward.tap).attribute(
            pixels, target, additional_forward_args=args, relu_attributions=relu
        )
        cam = DiffusionCAM(forward, preset="base")
        got = cam.attribute(pixels, target, score=score, relu_attributions=relu)
        given = cam.attribute(pixels, target, args, relu_attributions=relu)
        assert got.shape == (2, 1, 8, 8) and got.any()
        assert torch.equal(got, given)
        assert tiny.relative(got, expected.detach()) < 1e-5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("layer", (0, 2))
def test_base_map_is_plain_autograds(cache, score, layer):
    forward = tiny.bound(cache, layer=layer, batch=2, dtype=torch.float64, seed=1)
    position = 3
    target = tiny.pairs(forward, position)
    got = DiffusionCAM(forward, preset="base").attribute(
        forward.request.pixels, target, score=score
    )
    for example, (_, token) in enumerate(target):
        step = forward.trajectory.step_of(example, position, score)
        f, g = by_hand(forward, example, position, token, step, layer)
        assert tiny.relative(got[example, 0], grad_cam(f, g)) < 1e-9


def test_the_last_block_has_no_path(cache):
    forward = tiny.bound(cache, dtype=torch.float64)
    _, gradient = by_hand(forward, 0, 2, 5, 1, 2)
    assert gradient.any()
    # Block 3 is the last: the response is read from its output, the image's part of it is not.
    _, gradient = by_hand(forward, 0, 2, 5, 1, 3)
    assert not gradient.any()
    with pytest.raises(LayerError, match="deepest usable block of mini is 2"):
        forward.adapter.check_layer(3)
    forward.layer = 3  # past the check: still no silent map of zeros
    forward.trajectory.kept.clear()
    with pytest.raises(InfeasibleStepError, match="no gradient path"):
        vjp.target_gradients(forward, [Target("x", (2,), (5,))])
    with pytest.raises(InfeasibleStepError, match="no gradient path"):
        DiffusionCAM(forward).attribute(forward.request.pixels, (2, 5), score="final")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("product", ("pooled", "positionwise", "plus_plus"))
def test_many_words_at_once_equal_one_at_a_time(cache, score, product):
    forward = tiny.bound(cache, batch=2, steps=4)
    wanted = [(b, p) for b in (0, 1) for p in (0, 1, 4, 7)]
    targets = [Target("", (p,), (tiny.pair(forward, p, b)[1],)) for b, p in wanted]
    examples = [b for b, _ in wanted]
    reading = Reading(score, product, True, backward="constant_norms")
    (many,) = word_maps(forward, targets, examples, reading)
    cam = DiffusionCAM(forward)
    ones = {
        p: cam.attribute(
            forward.request.pixels,
            tiny.pairs(forward, p),
            score=score,
            product=product,
            center=True,
            backward=reading.backward,
            relu_attributions=False,
            refinements=[],
        )
        for p in {p for _, p in wanted}
    }
    for n, (b, p) in enumerate(wanted):
        assert tiny.relative(many[n], ones[p][b, 0]) < 1e-4


@pytest.mark.parametrize("chunk", (1, 3, 16))
def test_the_size_of_a_batch_changes_rounding_alone(chunk):
    forward = tiny.bound("none")
    targets = [Target("", (p,), (7,)) for p in range(8)]
    found = vjp.target_gradients(forward, targets, chunk=chunk)
    reference = vjp.target_gradients(forward, targets)
    for a, b in zip(found, reference, strict=True):
        assert a.target == b.target
        assert tiny.relative(a.gradients[0], b.gradients[0]) < 1e-4


def test_a_sum_of_tokens_is_eq_2(cache):
    """The pooled map is linear in the gradient: the map of a sum is the sum of the maps."""
    forward = tiny.bound(cache, dtype=torch.float64)
    singles = [tiny.pair(forward, p) for p in (1, 2, 6)]
    both = Target("three", *zip(*singles, strict=True))
    cam = DiffusionCAM(forward, preset="base")
    pixels = forward.request.pixels
    for score in SCORES:
        found = cam.attribute(pixels, both, score=score, relu_attributions=False)
        parts = [cam.attribute(pixels, s, score=score, relu_attributions=False) for s in singles]
        assert tiny.relative(found, sum(parts)) < 1e-9
        rectified = cam.attribute(pixels, both, score=score)
        assert torch.equal(rectified, found.relu())


@pytest.mark.parametrize("keep", (True, False))
def test_gradients_agree_with_finite_differences(cache, keep):
    """With a prefix cache the path runs through cached keys and values."""
    forward = tiny.bound(cache, dtype=torch.float64, keep=keep, images=2)
    position, token = tiny.pair(forward, 2)
    step = forward.trajectory.step_of(0, position, "commit")
    (row,) = vjp.target_gradients(forward, [Target("", (position,), (token,))])
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        along = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in row.features]

        def logit(eps, along=along):
            with forward.edited(lambda f, i: f + eps * along[i]), torch.no_grad():
                logits = forward.replay(torch.tensor([0]), torch.tensor([step]))
            return float(logits[0, position, token])

        h = 1e-5
        slope = (logit(h) - logit(-h)) / (2 * h)
        exact = sum(float((d * x).sum()) for d, x in zip(along, row.gradients, strict=True))
        assert slope == pytest.approx(exact, rel=1e-6, abs=1e-9)
        assert abs(exact) > 1e-6


def test_pixels_that_want_a_gradient_change_nothing(cache):
    forward = tiny.bound(cache)
    cam, target = DiffusionCAM(forward, preset="base"), tiny.pair(forward, 1)
    pixels = forward.request.pixels.clone().requires_grad_()
    got = cam.attribute(pixels, target)
    assert not got.requires_grad and pixels.grad is None and pixels.requires_grad
    assert tiny.relative(got, cam.attribute(forward.request.pixels, target)) < 1e-5


@pytest.mark.parametrize("step", (0, 3))
def test_a_step_can_be_chosen(cache, step):
    forward = tiny.bound(cache, dtype=torch.float64)
    cam, target = DiffusionCAM(forward, preset="base"), tiny.pair(forward, 6)
    pixels = forward.request.pixels
    if cache == "prefix" and step > 0:
        with pytest.raises(InfeasibleStepError, match=r"ends at 64 .* has 8 tokens.*step 3"):
            cam.attribute(pixels, target, step=step)
        return
    got = cam.attribute(pixels, target, step=step)
    read = forward.trajectory.steps - 1 if cache == "prefix" else step
    f, g = by_hand(forward, 0, *target, read, 1)
    assert tiny.relative(got[0, 0], grad_cam(f, g)) < 1e-9
    several = word_maps(forward, [Target("", *zip(target))], [0], Reading("final", step=step))
    assert tiny.relative(several[0].relu(), got[0]) < 1e-9


def test_padding_is_invisible(cache):
    """A batch with prompts of unequal length explains each as it would alone."""
    prompts = ["describe the image .", "is there a red circle ?", ""]
    together = tiny.bound(cache, batch=3, prompts=prompts, dtype=torch.float64)
    for b, prompt in enumerate(prompts):
        alone = type(together)(together.adapter, 1)
        request = together.adapter.prepare([[tiny.picture(10 * b)]], [prompt])
        alone.generate(request, gen_length=8)
        assert torch.equal(alone.trajectory.tokens[0], together.trajectory.tokens[b])
        targets = [Target("", (p,), (9,)) for p in (0, 5)]
        one = word_maps(alone, targets, [0, 0], Reading("commit", "positionwise", True))[0]
        many = word_maps(together, targets, [b, b], Reading("commit", "positionwise", True))[0]
        assert tiny.relative(many, one) < 1e-9
