"""ARCC and EAGLE's AMCR and CSR against images edited one by one."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from faithfulness.cases import explain, maps, same, state, words
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from captum_dcam.faithfulness import REMOVED, Arcc, Corrections, arcc, correction
from captum_dcam.methods.edited import with_pixels

FRACTIONS = (0.0, 0.3, 0.6, 0.9)


def edited(forward, gone):
    """The image whose tokens ``gone`` (64,) have its mean colour."""
    pixels = forward.request.pixels
    where = gone.view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return torch.where(where, pixels.mean((-2, -1), keepdim=True), pixels)


def scores(forward, pixels, target):
    """Logits (V,) of every token of a word at its own step, one pass a token."""
    out = []
    for position, token in zip(target.positions, target.token_ids, strict=True):
        with torch.no_grad():
            logits = forward(pixels, *forward.arguments((position, token)))
        out.append(logits[0, position].double())
    return out


def test_correction_equals_images_edited_by_hand(cache):
    """The word of the answer stands for the right one; the lowest of a map goes first."""
    forward = tiny.bound(cache)
    targets, given_maps = words(forward), maps(forward)
    found = correction(forward, targets, given_maps, fractions=FRACTIONS, chunk=3)
    assert found.fractions.tolist() == [round(64 * f) / 64 for f in FRACTIONS]
    for n, target in enumerate(targets):
        order = given_maps[0][n].flatten().argsort()
        for s, count in enumerate(round(64 * f) for f in FRACTIONS):
            gone = torch.zeros(64, dtype=torch.bool)
            gone[order[:count]] = True
            logits = scores(forward, edited(forward, gone), target)
            right = [int(o.argmax()) == t for o, t in zip(logits, target.token_ids, strict=True)]
            assert bool(found.right[n, s]) == all(right)


@given(
    right=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5),
    budget=st.sampled_from((0.0, 0.1, 0.3, 0.95)),
)
@settings(max_examples=25)
def test_amcr_and_csr_by_hand(right, budget):
    found = Corrections(torch.tensor(FRACTIONS, dtype=torch.float64), torch.tensor(right))
    area = [min([f for f, r in zip(FRACTIONS, row, strict=True) if r], default=1) for row in right]
    assert found.area.tolist() == area
    assert found.amcr == pytest.approx(sum(area) / len(area))
    won = [a <= budget for a in area]
    assert found.success_rate(budget) == pytest.approx(sum(won) / len(won))


def stretch(values):
    values = values.clamp_min(0).double().flatten()
    return (values - values.min()) / (values.max() - values.min())


def test_arcc_equals_its_parts_by_hand(cache):
    forward = tiny.bound(cache)
    targets, given_maps = words(forward), [m.abs() for m in maps(forward)]  # no ties at 0
    before = state(forward)
    found = arcc(
        forward, targets, given_maps, explain, baseline="mean", fractions=(0.25, 0.5), chunk=5
    )
    assert same(state(forward), before)
    for n, target in enumerate(targets):
        own = stretch(given_maps[0][n])
        mask = F.interpolate(own.float().view(1, 1, 8, 8), (64, 64), mode="bilinear")
        again = explain(with_pixels(forward, forward.request.pixels * mask), (target,))[0][0]
        r = np.corrcoef(own, stretch(again))[0, 1]
        order, probability = own.argsort(descending=True), {}
        for key, ranks in (("most", order), ("least", order.flip(0))):
            for count in (16, 32):
                gone = torch.zeros(64, dtype=torch.bool)
                gone[ranks[:count]] = True
                logits = scores(forward, edited(forward, gone), target)
                logs = [o.log_softmax(-1)[t] for o, t in zip(logits, target.token_ids, strict=True)]
                probability[key, count] = float(torch.stack(logs).mean().exp())
        removal = sum(probability["least", c] - probability["most", c] for c in (16, 32)) / 4
        assert float(found.complexity[n]) == pytest.approx(float(own.mean()))
        assert float(found.coherency[n]) == pytest.approx((1 + r) / 2, rel=1e-3)
        assert float(found.removal[n]) == pytest.approx(removal, rel=1e-3, abs=1e-6)


#: coherency, complexity, removal
PARTS = ((0.9, 0.2, 0.3), (0.5, 0.05, 0.5), (0.7, 0.4, -0.1), (0.0, 0.2, 0.2), (0.6, 1.0, 0.2))


def test_arcc_is_a_harmonic_mean():
    found = Arcc(*torch.tensor(PARTS, dtype=torch.float64).T).value
    for value, (coherency, complexity, removal) in zip(found.tolist(), PARTS, strict=True):
        own = [coherency, 1 - complexity, min(max(2 * removal, 0), 1)]
        assert value == pytest.approx(stats.hmean(own) if min(own) > 0 else 0)


def test_arcc_is_the_packages():
    """Theirs adds 1e-8 before it divides."""
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.arcc", exc_type=ImportError)
    parts = np.array(PARTS).T
    metric = theirs.ARCC(base_method=None)
    metric.coherency, metric.complexity, metric.road = (lambda *_, p=p: p for p in parts)
    expected = metric(None, None, None, None)
    found = Arcc(*torch.from_numpy(parts)).value
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    some = np.random.default_rng(0).random((3, 8, 8))
    assert theirs.Complexity()(some).tolist() == pytest.approx(some.mean((1, 2)).tolist())


@pytest.mark.parametrize(
    ("test", "setting", "message"),
    [
        (correction, {"fractions": (0.0, 1.0)}, r"fractions are \[0.0, 1.0\]"),
        (correction, {"fractions": ()}, r"fractions are \[\]"),
        (correction, {"baseline": "black"}, "baseline is 'black'"),
        (arcc, {"fractions": (0.0, 0.5)}, "between 0 and 1"),
        (arcc, {"chunk": 0}, "chunk is 0"),
    ],
)
def test_settings_are_checked(test, setting, message):
    forward = tiny.bound("prefix")
    more = (explain,) if test is arcc else ()
    with pytest.raises(ValueError, match=message):
        test(forward, words(forward), maps(forward), *more, **setting)
    with pytest.raises(ValueError, match="no target is given"):
        test(forward, (), (), *more)
    assert REMOVED[0] == 0 and REMOVED[-1] < 1
