"""Every family's explanations say of themselves what the embedded model's do."""

from pathlib import Path

import pytest
import torch

from captum_dcam import explain_generation, sign_check, word_scores
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.sequence import hidden_states, padded
from captum_dcam.testing.__main__ import cases_in
from captum_dcam.testing.case import explained, target_at

CASES = {c.name: c for c in cases_in(Path(__file__).parents[1] / "adapters" / "cases")}


#: a step runs a part of the answer behind a cache of an earlier pass: no pass has all states
APART = {"lavida_o, use_fast_dlm", "llada_v, Fast-dLLM"}


@pytest.mark.parametrize("name", CASES)
def test_trust_of_every_family(name):
    """All parts there; the relevance of text is gradient × activation of a pass made by hand."""
    case = CASES[name]
    forward = case.bound(case.make(torch.float32))
    targets = [target_at(forward, place) for place in explained(forward)[:2]]
    found = explain_generation(forward, targets, trust=True)
    trust, number = found.trust, len(targets)
    assert trust.localises.shape == (number,) and not trust.calibrated
    assert bool(((trust.localises >= 0) & (trust.localises <= 1)).all())
    assert all(
        len(word) == len(t.positions) for word, t in zip(trust.candidates, targets, strict=True)
    )
    falls = sign_check(forward, targets, found.maps, torch.Generator().manual_seed(0))
    assert torch.allclose(trust.signs, falls, atol=1e-4) and bool(falls.isfinite().all())
    step = [forward.trajectory.step_of(0, t.positions[0], "commit") for t in targets]
    own = [float(trust.probabilities[s, n]) for n, s in enumerate(step)]
    sure = [float(forward.trajectory.confidence[0, t.positions[0]]) for t in targets]
    assert own == pytest.approx(sure, abs=2e-3)
    text = text_relevance(forward, targets, score="commit")
    apart = name in APART
    assert bool(text.values[:, text.tokens.prompt :].isnan().all()) == apart
    for n, target in enumerate(() if apart else targets):
        by_hand = products(forward, step[n], target)[text.tokens.positions]
        seen = ~text.values[n].isnan()
        scale = by_hand[seen].abs().max().clamp(min=1e-12)
        assert float((text.values[n][seen] - by_hand[seen]).abs().max() / scale) < 1e-3
    scores = word_scores(forward, targets)
    assert scores.probability.tolist() == pytest.approx(sure, abs=2e-3)


def products(forward, step, target):
    """(L,) gradient × activation of every token, by a pass in which all states are leaves."""
    leaves = []

    def leaf(hidden, _block):
        leaves.append(hidden.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        _, logits = hidden_states(forward, forward.layer, step, leaf)
        logits[target.positions[0], target.token_ids[0]].backward()
    rows = [(h * h.grad)[0].sum(-1) if h.grad is not None else h[0].sum(-1) * 0 for h in leaves]
    values = torch.cat(rows).detach().float()
    length = forward.request.layout.prefix_length + forward.trajectory.tokens.shape[1]
    return padded(values, length)
