"""Score-CAM and Finer-CAM against their formulas, computed another way."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam

from captum_dcam.errors import InfeasibleStepError
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.score_cam import pixel_masks
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target

NAMES = ("score_cam", "finer_cam")


def task_of(forward, *positions, score="commit"):
    targets = tuple(Target("", (p,), (tiny.pair(forward, p)[1],)) for p in positions)
    return AttributionTask(forward, targets, score)


def at_step(forward, which):
    """A position committed at the first, a middle or the last step."""
    steps = forward.trajectory.commit_step[0]
    return int(steps.argsort()[{"first": 0, "middle": len(steps) // 2, "last": -1}[which]])


def features_and_logits(forward, args):
    """Feature maps at the tap, as leaves of the logits (T, V)."""
    seen = []
    handle = forward.tap.register_forward_pre_hook(lambda _m, maps: seen.append(maps))
    logits = forward(forward.request.pixels, *args)
    handle.remove()
    return seen[0], logits[0]


def rivals_of(logits, token, count):
    return [i for i in logits.argsort(descending=True).tolist() if i != token][:count]


@pytest.mark.parametrize("which", ("first", "middle", "last"))
@pytest.mark.parametrize("weights", ("equal", "probability"))
def test_finer_cam_is_the_sum_of_grad_cams_of_single_logits(cache, which, weights):
    forward = tiny.bound(cache, images=2)
    position = at_step(forward, which)
    token, gamma = tiny.pair(forward, position)[1], 0.7
    made = method("finer_cam", gamma=gamma, comparisons=2, weights=weights)
    found = made.attribute(task_of(forward, position)).maps

    maps, logits = features_and_logits(forward, forward.arguments((position, token)))
    row = logits[position]
    rivals = rivals_of(row.detach(), token, 2)
    y = row.detach()[rivals].double()
    if weights == "equal":
        share = torch.full((2,), 0.5).double()
    else:  # d/dy of the softmax-weighted mean, by hand
        w = y.exp() / y.exp().sum()
        share = w * (1 + y - (w * y).sum())
    factors = [1.0, *(-gamma * share).tolist()]
    for i, a in enumerate(maps):
        expected = torch.zeros(a.shape[-2:]).double()
        for factor, one in zip(factors, [token, *rivals], strict=True):
            g = torch.autograd.grad(row[one], a, retain_graph=True)[0][0].double()
            for k in range(a.shape[1]):
                expected += factor * g[k].mean() * a[0, k].detach().double()
        assert tiny.relative(found[i][0], expected) < 1e-4


def test_finer_cam_is_captums_layer_grad_cam_of_the_difference(cache):
    forward = tiny.bound(cache)
    target = tiny.pair(forward, 3)
    found = method("finer_cam").attribute(task_of(forward, 3)).maps[0]

    def difference(pixels, *args):
        row = forward(pixels, *args)[:, 3]
        best = [i for i in row[0].detach().topk(4).indices.tolist() if i != target[1]][:3]
        return row[:, target[1]] - 0.6 * row[:, best].mean(1)

    expected = LayerGradCam(difference, forward.tap).attribute(
        forward.request.pixels, additional_forward_args=forward.arguments(target)
    )
    assert tiny.relative(found, expected[0].detach()) < 1e-4


@pytest.mark.parametrize("product", ("pooled", "positionwise"))
def test_finer_cam_without_comparison_is_grad_cam(cache, product):
    from captum_dcam.maps import cam
    from captum_dcam.model.gradients import target_gradients

    forward = tiny.bound(cache)
    this = task_of(forward, 2, score="teacher")
    row = target_gradients(forward, this.targets, score="teacher")[0]
    expected = cam(row.features[0], row.gradients[0], product, center=False)
    found = method("finer_cam", gamma=0.0, product=product).attribute(this)
    assert tiny.relative(found.maps[0][0], expected) < 1e-5


def score_cam_by_hand(forward, position, token, channels, baseline, probability):
    """One channel after the other; masks enlarged by torch's own interpolation."""
    args = forward.arguments((position, token))
    with torch.no_grad():
        maps, _ = features_and_logits(forward, args)
        every = torch.cat([m[0].flatten(1) for m in maps], 1).double()
        order = every.var(1).argsort(descending=True)[:channels].tolist()
        scores = []
        for k in order:
            low, high = every[k].min(), every[k].max()
            pixels = forward.request.pixels.clone()
            for i, m in enumerate(maps):
                mask = ((m[:, k : k + 1] - low) / (high - low)).float()
                mask = F.interpolate(mask, (64, 64), mode="bilinear", align_corners=False)[0]
                pixels[0, i] = pixels[0, i] * mask + baseline * (1 - mask)
            logits = forward(pixels, *args)[0, position].double()
            scores.append((logits.softmax(-1) if probability else logits)[token])
        weights = torch.stack(scores).exp()
        weights /= weights.sum()
        return [sum(w * m[0, k] for w, k in zip(weights, order, strict=True)) for m in maps]


@pytest.mark.parametrize("which", ("first", "last"))
@pytest.mark.parametrize("images", (1, 2))
def test_score_cam_is_the_sum_over_channels(cache, which, images):
    forward = tiny.bound(cache, images=images)
    position = at_step(forward, which)
    token = tiny.pair(forward, position)[1]
    for score, baseline, batch_size in (("logit", 0.0, 4), ("probability", 0.5, 6)):
        made = method(
            "score_cam", channels=6, baseline=baseline, score=score, batch_size=batch_size
        )
        found = made.attribute(task_of(forward, position)).maps
        probability = score == "probability"
        expected = score_cam_by_hand(forward, position, token, 6, baseline, probability)
        assert len(found) == images
        for one, two in zip(found, expected, strict=True):
            assert tiny.relative(one[0], two) < 1e-4


def test_score_cam_reads_every_word_on_the_same_pictures():
    """With a prefix cache N words cost the passes of one, and each gets its own map."""
    forward = tiny.bound("prefix")
    made = method("score_cam", channels=5, batch_size=2)
    with metered(forward) as cost:
        together = made.attribute(task_of(forward, 0, 3, 6))
    assert cost.forwards == 1 + 5 and cost.backwards == 0
    for n, position in enumerate((0, 3, 6)):
        alone = made.attribute(task_of(forward, position))
        assert tiny.relative(together.maps[0][n], alone.maps[0][0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_words_map_is_the_sum_of_its_tokens(cache, name):
    forward = tiny.bound(cache)
    ids = [tiny.pair(forward, p)[1] for p in (1, 6)]
    options = {"channels": 4} if name == "score_cam" else {}
    made = method(name, **options)
    word = made.attribute(AttributionTask(forward, (Target("", (1, 6), tuple(ids)),)))
    parts = made.attribute(task_of(forward, 1, 6))
    assert tiny.relative(word.maps[0][0], parts.maps[0].sum(0)) < 1e-5


def test_score_cam_on_a_spent_budget_is_an_estimate():
    forward = tiny.bound("prefix")
    made = method("score_cam", channels=9, batch_size=3)
    with metered(forward, Budget(passes=1 + 6)):
        found = made.attribute(task_of(forward, 1, 4))
    assert not found.done.any() and "6 of 9 channels" in found.note
    expected = method("score_cam", channels=6).attribute(task_of(forward, 1, 4))
    assert tiny.relative(found.maps[0], expected.maps[0]) < 1e-5
    with metered(forward, Budget(passes=1)):
        nothing = made.attribute(task_of(forward, 1))
    assert not nothing.maps[0].any() and not nothing.done.any()
    assert nothing.note and "estimate" not in nothing.note


def test_score_cam_on_a_spent_budget_keeps_finished_words():
    forward = tiny.bound("none")
    made = method("score_cam", channels=4, batch_size=4)
    first, second, third = (at_step(forward, w) for w in ("first", "middle", "last"))
    with metered(forward, Budget(passes=2 * 5)):
        two = made.attribute(task_of(forward, first, second, third))
    assert two.done.tolist() == [True, True, False] and not two.maps[0][2].any()
    # a word of which one token was not read at all: no half a sum
    ids = tuple(tiny.pair(forward, p)[1] for p in (first, second))
    with metered(forward, Budget(passes=5)):
        one = made.attribute(AttributionTask(forward, (Target("", (first, second), ids),)))
    assert not one.done.any() and not one.maps[0].any()


def test_pixel_masks_by_hand():
    mask = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    cells = torch.arange(4).view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    boxed = F.pad(cells, (0, 0, 1, 1), value=-1)  # letterboxed: rows without a token
    smooth = F.interpolate(mask[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
    found = pixel_masks([mask], boxed.expand(1, 3, 6, 4))
    assert found.shape == (1, 3, 6, 4)
    assert torch.allclose(found[0, 0, 1:5], smooth[0], atol=1e-6)
    assert (found[0, :, [0, 5]] == 1).all()
    # patches in a list (Qwen's form): every row is one token
    patches = torch.arange(4)[:, None].expand(1, 4, 5)
    assert torch.equal(pixel_masks([mask], patches)[0, :, 0], mask.flatten())
    # two grids in one plane, and rows upside down: painted
    other = torch.tensor([[[5.0]]])
    both = torch.cat((cells, torch.full((4, 1), 4)), 1)
    painted = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0])
    assert torch.equal(pixel_masks([mask, other], both[None])[0], painted[both])
    assert torch.equal(pixel_masks([mask], cells.flip(0)[None])[0], painted[cells.flip(0)])
    assert pixel_masks([mask], torch.tensor([[3, -1]]))[0].tolist() == [3.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_padding_and_answers_of_one_token(cache, name):
    options = {"channels": 4} if name == "score_cam" else {}
    made = method(name, **options)
    half = tiny.bound(cache, dtype=torch.bfloat16)
    found = made.attribute(task_of(half, 2)).maps[0]
    assert torch.isfinite(found).all() and found.any() and found.dtype == torch.float32
    short = single(tiny.bound(cache, batch=2, prompts=["describe .", tiny.PROMPT], gen_length=1))
    assert (~short.request.extras[1].bool()).any()
    assert made.attribute(task_of(short, 0)).maps[0].any()


class Burst(Exception):
    pass


def burst(*_args):
    raise Burst


def test_finer_cam_says_when_no_gradient_reaches_the_image(monkeypatch):
    forward = tiny.bound("none")
    with forward.edited(lambda f, _i: f.detach() * 0 + f.detach()):
        with pytest.raises(InfeasibleStepError, match="no gradient path"):
            method("finer_cam").attribute(task_of(forward, 1))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    (
        ("finer_cam", {"gamma": -1.0}, "gamma is -1.0"),
        ("finer_cam", {"comparisons": 0}, "comparisons is 0"),
        ("finer_cam", {"weights": "even"}, "weights is 'even'"),
        ("finer_cam", {"product": "sum"}, "product is 'sum'"),
        ("score_cam", {"channels": 0}, "channels is 0"),
        ("score_cam", {"batch_size": 1.5}, "batch_size is 1.5"),
        ("score_cam", {"score": "odds"}, "score is 'odds'"),
        ("score_cam", {"baseline": float("nan")}, "baseline is nan"),
    ),
)
def test_settings_are_checked(name, setting, message):
    with pytest.raises(ValueError, match=message):
        method(name, **setting)
