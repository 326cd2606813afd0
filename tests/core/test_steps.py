"""Maps of every denoising step, against one explanation per step."""

import json
from dataclasses import replace

import awkward
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import captum_dcam
from captum_dcam import Explanation, explain_generation, explain_steps
from captum_dcam.errors import ExplanationError, InfeasibleStepError, InputError, WrongTypeError
from captum_dcam.model.answers import force
from captum_dcam.model.words import Target
from captum_dcam.refine import Compose, Gaussian
from captum_dcam.results.schema import check_explanation

PRESETS = ("default", "paper", "base")


def slow(forward, words, **how):
    """Maps (S, N, h, w) and peaks (S, N) per grid by an explanation per step."""
    found = [
        explain_generation(forward, words, score=s, **how) for s in range(forward.trajectory.steps)
    ]
    maps = [torch.stack(grid) for grid in zip(*(f.maps for f in found), strict=True)]
    peaks = [torch.stack(grid) for grid in zip(*(f.peaks for f in found), strict=True)]
    return maps, peaks


def together(maps, peaks):
    """The scale over a word's steps and all grids, word after word."""
    out = [torch.zeros_like(m) for m in maps]
    for n in range(maps[0].shape[1]):
        most = max(p[:, n].max() for p in peaks)
        for s in range(len(maps[0])):
            highest, peak = max(m[s, n].max() for m in maps), max(p[s, n] for p in peaks)
            for own, m in zip(out, maps, strict=True):
                own[s, n] = m[s, n] / highest * peak / most if highest > 0 else 0
    return out


def by_hand(forward, example, target):
    """(S,) probability of the least sure token, from the whole forward."""
    found = []
    for step in range(forward.trajectory.steps):
        with torch.no_grad():
            logits = forward.replay(torch.tensor([example]), torch.tensor([step]))[0]
        odds = logits.double().softmax(-1)
        pairs = zip(target.positions, target.token_ids, strict=True)
        found.append(min(float(odds[p, t]) for p, t in pairs))
    return torch.tensor(found)


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_one_explanation_per_step(cache, preset):
    """Two examples, several grids, a word of two tokens, repeated words that SICD subtracts."""
    forward, words = awkward.bound("mini", cache), ["circle", "stars", "a"]
    found = explain_steps(forward, words, preset=preset)
    maps, peaks = slow(forward, words, preset=preset)
    assert found.words == ("circle", "stars", "a", "a") and len(found.maps) == 2
    for own, most, each, highest in zip(
        found.maps, found.peaks, together(maps, peaks), peaks, strict=True
    ):
        assert own.shape == (12, 4, *each.shape[2:]) and own.dtype == torch.float32
        assert tiny.relative(most, highest) < 1e-5 and tiny.relative(own, each) < 1e-5
    brightest = torch.stack([m.amax((0, 2, 3)) for m in found.maps]).amax(0)
    assert torch.allclose(brightest, torch.ones(4))
    for n, target in enumerate(found.targets):
        assert tiny.relative(found.probabilities[:, n], by_hand(forward, 0, target)) < 1e-5


def test_another_example_and_other_refinements(cache):
    forward = awkward.bound("mini", cache)
    stages = [Gaussian()]  # nothing brings maps to their own maximum
    found = explain_steps(forward, ["rings"], example=1, refinements=stages)
    maps, peaks = slow(forward, ["rings"], example=1, refinements=stages)
    for own, each in zip(found.maps, together(maps, peaks), strict=True):
        assert tiny.relative(own, each) < 1e-5


def test_a_word_is_as_probable_at_its_step_as_the_generation_has_it(cache):
    forward = tiny.bound(cache, steps=4)
    t = forward.trajectory
    found = explain_steps(forward, list(range(8)), refinements=[])
    at = found.probabilities[t.commit_step[0], torch.arange(8)]
    assert tiny.relative(at, t.confidence[0]) < 1e-5


@pytest.mark.parametrize("size", (None, 3))
def test_passes_are_one_prefill_and_the_steps_in_batches(size, monkeypatch):
    forward = tiny.bound("prefix")
    forward.internal_batch_size = size
    calls, rows = [], []
    prefill, denoise = forward.adapter.prefill, forward.adapter.denoise
    monkeypatch.setattr(forward.adapter, "prefill", lambda e: calls.append(1) or prefill(e))
    monkeypatch.setattr(
        forward.adapter, "denoise", lambda m, *s: rows.append(len(s[0])) or denoise(m, *s)
    )
    products, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: products.append(1) or grad(*a, **k))
    # exact: torch.autograd.grad is called twice where a mode sees it
    explain_steps(forward, [0, 3, 5], backward="exact", refinements=[])
    assert sum(calls) == 1 and sum(rows) == 8 * 3 and max(rows) == (size or 16)
    assert sum(products) == 8 * 3 + len(rows)


def test_nothing_is_left_behind(cache):
    forward = tiny.bound(cache)
    before = tiny.hooks(forward.model)
    first, second = (explain_steps(forward, [2]) for _ in range(2))
    assert torch.equal(first.maps[0], second.maps[0])
    assert tiny.hooks(forward.model) == before and forward.tap.edit is None
    assert not any(p.grad is not None for p in forward.model.parameters())


def test_with_a_foil_the_probability_is_still_the_words():
    forward = tiny.bound("prefix")
    own = [2]
    plain, other = (explain_steps(forward, own, foil=f, refinements=[]) for f in (None, "heart"))
    assert torch.equal(plain.probabilities, other.probabilities)
    assert not torch.equal(plain.maps[0], other.maps[0])
    assert other.targets[0].foil_ids is not None


# -- with an explanation ---------------------------------------------------------------------------


def test_an_explanation_holds_and_saves_them(cache, tmp_path):
    adapter = tiny.adapter(cache)
    how = dict(words=[1, 2], gen_length=8, steps=4, refinements=[])
    found = captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, every_step=True, **how)
    plain = captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, **how)
    assert torch.equal(found.maps[0], plain.maps[0]) and plain.steps is None
    assert found.steps.targets == found.targets and found.steps.maps[0].shape == (4, 2, 8, 8)
    back = Explanation.load(found.save(tmp_path / "out")).steps
    assert back.targets == found.targets
    for name, values in found.steps.tensors().items():
        assert torch.equal(back.tensors()[name], values), name
    assert Explanation.load(plain.save(tmp_path / "plain")).steps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("steps.probabilities"), "without 'steps.probabilities'"),
        (lambda t: t.pop("steps.peaks.0"), "without 'steps.peaks.0'"),
        (lambda t: t.update({"steps.maps.0": t["steps.maps.0"][1:]}), r"'steps.maps.0' is float32"),
        (
            lambda t: t.update({"steps.peaks.0": t["steps.peaks.0"].long()}),
            "is int64",
        ),
        (lambda t: t.update({"read_at": torch.ones(3, 1, 8).bool()}), "'read_at' is bool"),
    ],
)
def test_damage_is_seen(change, message, tmp_path):
    forward = tiny.bound("prefix", steps=4)
    found = explain_generation(forward, [1], every_step=True)
    tensors = {k: v.clone() for k, v in found._tensors().items()}
    change(tensors)
    save_file(tensors, tmp_path / "t")
    manifest = json.loads((found.save(tmp_path / "out") / "manifest.json").read_text())
    with pytest.raises(ExplanationError, match=message):
        check_explanation(manifest, load_file(tmp_path / "t"), found.images)


# -- what has no steps -----------------------------------------------------------------------------


def test_what_excludes_it_is_refused_before_any_work(monkeypatch):
    adapter = tiny.adapter("none")
    for name in ("prepare", "generate", "embed", "denoise"):
        monkeypatch.setattr(adapter, name, pytest.fail)

    def explained(**how):
        captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, **how)

    with pytest.raises(InfeasibleStepError, match=r"given, not generated.* leave out every_step"):
        explained(every_step=True, answer="a red circle")
    with pytest.raises(InputError, match="step is 3 together with every_step"):
        explained(every_step=True, step=3)
    with pytest.raises(WrongTypeError, match="every_step is 1"):
        explained(every_step=1)


def test_a_given_answer_has_none():
    forward = tiny.bound("prefix")
    force(forward, "a red circle")
    for call in (explain_steps, lambda f: explain_generation(f, every_step=True)):
        with pytest.raises(InfeasibleStepError, match="given, not generated"):
            call(forward)


def test_steps_that_do_not_compute_a_word_say_nothing(cache):
    """As of two canvases of four tokens, four steps each."""
    forward = tiny.bound(cache)
    own = torch.arange(8) // 4
    read = own[:, None, None] == own
    two = forward.again(trajectory=replace(forward.trajectory, read_at=read))
    found = explain_steps(two, [1, 6], refinements=Compose([]))
    whole = explain_steps(forward, [1, 6], refinements=Compose([]))
    there = found.probabilities.isnan().logical_not()
    assert there.T.tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]
    assert tiny.relative(found.peaks[0][there], whole.peaks[0][there]) < 1e-5
    assert not found.maps[0][~there].any() and not found.peaks[0][~there].any()
    words = [Target("both", (3, 4), (5, 6))]
    with pytest.raises(InfeasibleStepError, match="no step of mini computes all tokens of 'both'"):
        explain_steps(two, words)
