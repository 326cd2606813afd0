"""Deletion and insertion against single forward passes on pictures edited by hand."""

import numpy as np
import pytest
import tiny
import torch
from faithfulness.cases import maps, same, state, word, words
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse import linalg

from captum_dcam.errors import MethodError
from captum_dcam.faithfulness import BASELINES, Curves, deletion, insertion
from captum_dcam.methods import AttributionTask, edited
from captum_dcam.methods.edited import read, with_pixels
from captum_dcam.model.forward import single

KINDS = {"deletion": deletion, "insertion": insertion}


def probability(forward, pixels, target, score="commit"):
    """Geometric mean over the tokens, one forward pass a token."""
    task = AttributionTask(forward, (target,), score)
    logs = []
    for position, token in zip(target.positions, target.token_ids, strict=True):
        with torch.no_grad():
            logits = forward(pixels, *task.arguments(position))
        logs.append(logits[0, position].double().log_softmax(-1)[token])
    return float(torch.stack(logs).mean().exp())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["commit", "teacher"])
@pytest.mark.parametrize("patch", [1, 3])
def test_equals_pictures_edited_by_hand(cache, kind, score, patch):
    forward = tiny.bound(cache)
    targets, given_maps = words(forward), maps(forward)
    got = KINDS[kind](
        forward, targets, given_maps, patch=patch, score=score, fractions=(0, 0.3, 0.6, 1), chunk=3
    )
    pixels, side = forward.request.pixels, 8
    mean = pixels.mean((-2, -1), keepdim=True)
    cells = [(y, x) for y in range(0, 8, patch) for x in range(0, 8, patch)]
    counts = [round(f * len(cells)) for f in (0, 0.3, 0.6, 1)]
    assert got.fractions.tolist() == pytest.approx([c / len(cells) for c in counts])
    for n, target in enumerate(targets):
        height = {
            (y, x): float(given_maps[0][n, y : y + patch, x : x + patch].mean()) for y, x in cells
        }
        order = sorted(cells, key=lambda c: -height[c])
        for s, count in enumerate(counts):
            gone = order[:count] if kind == "deletion" else order[count:]
            edited = pixels.clone()
            for y, x in gone:
                box = slice(y * side, (y + patch) * side), slice(x * side, (x + patch) * side)
                edited[..., box[0], box[1]] = mean.expand_as(pixels)[..., box[0], box[1]]
            expected = probability(forward, edited, target, score)
            assert float(got.probability[n, s]) == pytest.approx(expected, rel=1e-4)


def test_at_the_tap_equals_edits_by_hand(cache):
    forward = tiny.bound(cache, images=2)
    targets, given_maps = words(forward), maps(forward)
    got = deletion(forward, targets, given_maps, where="tap", fractions=(0, 0.25, 1))
    ranked = torch.cat([m.flatten(1) for m in given_maps], 1)
    for n, target in enumerate(targets):
        for s, count in enumerate((0, 32, 128)):
            gone = torch.zeros(128, dtype=torch.bool)
            gone[ranked[n].argsort(descending=True)[:count]] = True
            masks = [m.view(8, 8) for m in gone.split(64)]

            def erase(features, grid, masks=masks):
                mean = features.flatten(2).mean(2)[..., None, None]
                return torch.where(masks[grid], mean, features)

            with forward.edited(erase):
                expected = probability(forward, forward.request.pixels, target)
            assert float(got.probability[n, s]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("where", ["pixels", "tap"])
def test_ends_meet_and_chunks_do_not_matter(cache, where):
    forward = tiny.bound(cache)
    targets, given_maps = words(forward), maps(forward)
    some = {"where": where, "controls": 2, "fractions": (0, 0.2, 0.5, 1)}
    gone = deletion(forward, targets, given_maps, **some)
    come = insertion(forward, targets, given_maps, **some, chunk=1)
    torch.testing.assert_close(gone.probability[:, 0], come.probability[:, -1], rtol=1e-4, atol=0)
    torch.testing.assert_close(gone.probability[:, -1], come.probability[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(gone.control[:, -1], gone.probability[:, -1], rtol=1e-4, atol=0)
    other = deletion(forward, targets, given_maps, **some, chunk=100)
    torch.testing.assert_close(gone.probability, other.probability, rtol=1e-4, atol=0)
    torch.testing.assert_close(gone.control, other.control, rtol=1e-4, atol=0)


def test_any_step_left_padding_and_one_token():
    """Batched prompts of different lengths, an answer of one token, every position."""
    prompts = [tiny.PROMPT, "where is the red circle ?"]
    forward = single(tiny.bound("prefix", batch=2, prompts=prompts), 0)
    assert not bool(forward.request.extras[1].all())  # padded
    every = tuple(word(forward, p) for p in range(8))
    got = deletion(forward, every, maps(forward, 8), fractions=(0, 1), controls=0)
    for n, target in enumerate(every):
        expected = probability(forward, forward.request.pixels, target)
        assert float(got.probability[n, 0]) == pytest.approx(expected, rel=1e-4)
        assert got.probability[n, 0] != got.probability[n, 1]
    short = tiny.bound("none", gen_length=1)
    assert deletion(short, (word(short, 0),), maps(short, 1)).probability.shape == (1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", BASELINES)
def test_dtypes_and_baselines(dtype, baseline):
    forward = tiny.bound("prefix", dtype=dtype)
    got = deletion(forward, words(forward), maps(forward), baseline=baseline, fractions=(0, 0.2, 1))
    assert got.probability.dtype == torch.float64 and torch.isfinite(got.probability).all()
    assert (got.probability[:, 1] != got.probability[:, 0]).all()


def test_same_generator_same_result_and_flat_maps_are_random():
    forward = tiny.bound("prefix")
    targets, flat = words(forward), tuple(torch.zeros(2, 8, 8) for _ in range(1))

    def run(seed):
        g = torch.Generator().manual_seed(seed)
        return deletion(forward, targets, flat, fractions=(0, 0.3, 1), generator=g)

    assert torch.equal(run(1).probability, run(1).probability)
    assert torch.equal(run(1).control, run(1).control)
    assert not torch.equal(run(1).probability, run(2).probability)


def test_scores_of_a_curve():
    fractions = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    rows = torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.2, 0.4]], dtype=torch.float64)
    control = torch.tensor([[0.9, 0.7, 0.1], [0.2, 0.2, 0.4]], dtype=torch.float64)
    got = Curves("deletion", fractions, rows, control)
    assert got.auc.tolist() == pytest.approx([0.25 * (1.2 + 0.4), 0.25 * (0.4 + 0.6)])
    assert got.gain.tolist() == pytest.approx([0.2, 0])
    assert got.supported.tolist() == [True, False]
    assert got.normalized[0].tolist() == pytest.approx([1, 0.25, 0])
    assert got.normalized[1].isnan().all() and got.normalized_auc[1].isnan()
    come = Curves("insertion", fractions, rows.flip(1), control.flip(1))
    assert come.gain.tolist() == pytest.approx([-0.2, 0])
    assert come.normalized[0].tolist() == pytest.approx([0, 0.25, 1])
    with pytest.raises(ValueError, match="controls=1"):
        _ = Curves("deletion", fractions, rows, rows[:, :0]).gain


@pytest.mark.parametrize("known_share", [0.2, 0.6])
def test_inpainting_solves_laplace(known_share):
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    values = (torch.sin(x / 5) + y / 8)[None].double()
    known = torch.rand(1, 24, 20, generator=g) < known_share
    got = edited.harmonic(values, known, torch.zeros(1, 1, 1).double())[0]
    # exact: every unknown pixel is the mean of its neighbours
    index = torch.arange(480).view(24, 20)
    matrix, right = sparse.lil_matrix((480, 480)), np.zeros(480)
    for r in range(24):
        for c in range(20):
            i = int(index[r, c])
            matrix[i, i] = 1
            if known[0, r, c]:
                right[i] = values[0, r, c]
                continue
            for a, b in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                j = int(index[min(max(a, 0), 23), min(max(b, 0), 19)])
                matrix[i, j] = matrix[i, j] - 0.25
    exact = torch.from_numpy(linalg.spsolve(matrix.tocsr(), right)).view(24, 20)
    assert torch.equal(got[known[0]], values[0][known[0]])
    assert float((got - exact).abs().max()) < 0.02 * float(values.max() - values.min())


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_inpainting_stays_between_what_is_known(height, width, share, seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(2, height, width, generator=g)
    known = torch.rand(2, height, width, generator=g) < share
    got = edited.harmonic(values, known, torch.full((2, 1, 1), 7.0))
    for one, mask, found in zip(values, known, got, strict=True):
        if not mask.any():
            assert (found == 7).all()
            continue
        low, high = one[mask].min(), one[mask].max()
        assert ((found >= low - 1e-6) & (found <= high + 1e-6)).all()


def test_fills_leave_the_rest_alone():
    forward = tiny.bound("prefix", images=2)
    pixels, removed = forward.request.pixels, torch.zeros(2, 128, dtype=torch.bool)
    removed[1, :8] = True  # the first row of tokens of the first picture
    for baseline in BASELINES:
        got = edited.pixel_fill(forward, baseline)(removed)
        assert torch.equal(got[0], pixels[0])
        assert torch.equal(got[1, 1], pixels[0, 1])
        assert torch.equal(got[1, 0, :, 8:], pixels[0, 0, :, 8:])
        assert not torch.equal(got[1, 0, :, :8], pixels[0, 0, :, :8])
    mean = pixels[0, 0].mean((-2, -1), keepdim=True)
    got = edited.pixel_fill(forward, "mean")(removed)[1, 0, :, :8]
    torch.testing.assert_close(got, mean.expand(got.shape))


def test_copies_read_as_the_original(cache):
    forward = tiny.bound(cache)
    g = torch.Generator().manual_seed(3)
    pixels = forward.request.pixels + 0.3 * torch.randn(
        3, *forward.request.pixels.shape[1:], generator=g
    )
    wanted = [(row, target) for target in words(forward) for row in (2, 0)]
    got = read(with_pixels(forward, pixels), wanted, chunk=2)
    for value, (row, target) in zip(got.exp(), wanted, strict=True):
        assert float(value) == pytest.approx(
            probability(forward, pixels[row : row + 1], target), rel=1e-4
        )


class Burst(Exception):
    pass


@pytest.mark.parametrize("where", ["pixels", "tap"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(cache, where, fails):
    forward = tiny.bound(cache)
    forward.train()
    before = state(forward)
    handle = None
    if fails:

        def burst(*_args):
            raise Burst

        handle = forward.model.layers[3].register_forward_hook(burst)
        with pytest.raises(Burst):
            deletion(forward, words(forward), maps(forward), where=where)
        handle.remove()
    else:
        deletion(forward, words(forward), maps(forward), where=where, fractions=(0, 1))
    assert same(before, state(forward))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"baseline": "black"}, "baseline is 'black'"),
        ({"where": "moon"}, "where is 'moon'"),
        ({"patch": 0}, "patch is 0"),
        ({"chunk": True}, "chunk is True"),
        ({"controls": -1}, "controls is -1"),
        ({"fractions": (0, 0.5)}, "from 0 to 1"),
        ({"fractions": (0, 0.5, 0.2, 1)}, "increasing"),
    ],
)
def test_errors_teach(settings, says):
    forward = tiny.bound("prefix")
    with pytest.raises(ValueError, match=says):
        deletion(forward, words(forward), maps(forward), **settings)


def test_wrong_maps_targets_and_families(monkeypatch):
    forward = tiny.bound("prefix")
    with pytest.raises(ValueError, match=r"expected \[\(2, 8, 8\)\]"):
        deletion(forward, words(forward), maps(forward, 3))
    with pytest.raises(ValueError, match="NaN"):
        deletion(forward, words(forward), [maps(forward)[0] * float("nan")])
    with pytest.raises(ValueError, match="at least one word"):
        deletion(forward, (), [torch.zeros(0, 8, 8)])
    both = tiny.bound("prefix", batch=2)
    with pytest.raises(ValueError, match=r"model\.forward\.single"):
        deletion(both, words(both), maps(both))
    from captum_dcam.model.adapter import Adapter

    monkeypatch.setattr(type(forward.adapter), "pixel_tokens", Adapter.pixel_tokens)
    with pytest.raises(MethodError, match="does not tell"):
        deletion(forward, words(forward), maps(forward))
    deletion(forward, words(forward), maps(forward), where="tap", fractions=(0, 1))
