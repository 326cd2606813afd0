"""The suite ``inventions``: from labelled answers to tables and a calibrator, each step by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from evaluation import made_results
from typer.testing import CliRunner

from captum_dcam.calibration import fit_calibrator
from captum_dcam.cli.app import app
from captum_dcam.data import dataset
from captum_dcam.errors import CalibrationError, StoreError
from captum_dcam.evaluation import evaluate
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.spans import SIGNALS, read_spans
from captum_dcam.evaluation.suites import Setting, suite
from captum_dcam.evaluation.tables import Results, table
from captum_dcam.evaluation.words import read_answer
from captum_dcam.methods.lens import lens_logits
from captum_dcam.metrics import SCORE_FEATURES, auroc
from captum_dcam.model.sequence import hidden_states, image_positions
from captum_dcam.model.words import located_words, words_of
from captum_dcam.presets import preset
from captum_dcam.truth.rivals import internal_confidence, prelim_attention


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two damages of ten scenes, by random weights, whose every answer is an invention."""
    folder = tmp_path_factory.mktemp("inventions")
    adapter = tiny.adapter("prefix")
    setting = Setting(adapter, "mini", {"name": "scenes", "count": 10}, limit=10,
                      generation={"gen_length": 12})  # fmt: skip
    for part in suite("inventions", setting):
        if part.name in ("inventions-noise-0.8", "inventions-premise"):
            evaluate(part.plan, folder / part.name, adapter=adapter)
    return folder


def test_a_suite_damages_scenes_and_reads_the_labels_of_others():
    parts = {p.name: p.plan for p in suite("inventions", made_results.setting())}
    assert parts["inventions-noise-0.8"].dataset["strength"] == 0.8
    assert {"inventions-none", "inventions-premise", "inventions-occlusion-1"} < parts.keys()
    for name, answer in (("repope", "generated"), ("halloc", "own_text"), ("coco", "generated")):
        (part,) = suite("inventions", Setting(made_results.Six(), "m", {"name": name}))
        assert part.name == "inventions" and part.plan.answer["name"] == answer
        assert part.plan.words == ("labelled",)


def test_spans_are_their_worst_words(results):
    frames = [Frame(f) for f in sorted(results.iterdir())]
    spans = read_spans(frames)
    expected = []
    for number, frame in enumerate(frames):
        for record in map(json.loads, (frame.folder / "results.jsonl").open()):
            scores = record["variants"].get("diffusion_cam", {}).get("scores", {})
            of = {}
            for n, word in enumerate(record["words"]):
                assert word["kind"] == "labelled" and scores["true"][n] == (word["label"] == "true")
                of.setdefault(word["span"], []).append(n)
            for own in of.values():
                expected.append(
                    (
                        number,
                        record["words"][own[0]]["label"] == "true",
                        min(scores["probability"][n] for n in own),
                        -max(scores["entropy"][n] for n in own),
                    )
                )
    found = zip(
        spans.parts.tolist(),
        spans.true.tolist(),
        spans.signals["probability"].tolist(),
        spans.signals["entropy"].tolist(),
        strict=True,
    )
    assert np.allclose(sorted(found), sorted(expected)) and len(expected) > 10
    assert spans.features.shape == (len(spans), len(SCORE_FEATURES))
    halves = spans.fitting
    assert set(spans.images[halves].tolist()).isdisjoint(spans.images[~halves].tolist())


def test_labels_are_those_that_the_data_set_gives(results):
    """Words of the stored answers against the sample's own judgement, character by character."""
    for folder in results.iterdir():
        frame = Frame(folder)
        data = dataset(**frame.header["plan"]["dataset"])
        for record in frame.records:
            judged = data.sample(record["id"]).judged(record["answer"])
            said = [w for s in judged for w in s.text.split()]
            assert [w["text"] for w in record["words"]] == said
            labels = [s.label for s in judged for _ in s.text.split()]
            assert [w["label"] for w in record["words"]] == labels


def test_words_of_overlapping_spans_are_not_true_by_one_of_them():
    forward = tiny.bound("prefix")
    text, located = located_words(forward.adapter, forward.trajectory.tokens[0].tolist())
    (start, stop), word = located[1]
    span = SimpleNamespace(start=start, stop=stop, label="true")
    wide = SimpleNamespace(start=0, stop=stop, label="invented")
    answer = read_answer(forward, (), lambda given: (span, wide) if given == text else ())
    found = answer.words
    assert [w.label for w in found[:3]] == ["invented", "invented", None]
    assert [w.span for w in found[:3]] == [1, 1, None] and found[1].target == word


def test_tables_show_auroc_of_every_signal(results):
    found = table("inventions-more", results)
    spans = read_spans([Frame(f) for f in sorted(results.iterdir())])
    cell = found.cell("probability at the commit step", "AUROC")
    assert cell.value == pytest.approx(auroc(spans.signals["probability"], spans.true))
    assert cell.low <= cell.value <= cell.high
    labels = [label for label, _ in found.rows]
    assert {s.label for s in SIGNALS} - {"map: overlap inside the phrase"} <= set(labels)
    assert "images that it was not fitted on" in labels[-1]
    by_part = table("inventions", results)
    assert by_part.cell("phrases", "all") == len(spans)
    assert by_part.cell("invented", "all") == int((~spans.true).sum())
    marked = table("inventions-calibrated", results)
    assert marked.cell("all", "true") == int(spans.true[~spans.fitting].sum())
    with pytest.raises(StoreError, match="evaluate --suite inventions"):
        table("inventions", Results(results / "none"))


def test_a_calibrator_is_fitted_on_one_half_and_tried_on_the_other(results, tmp_path, monkeypatch):
    monkeypatch.setattr("captum_dcam.calibration.calibrator.LEAST", 1000)
    with pytest.raises(CalibrationError, match="expected at least 1000 of each"):
        fit_calibrator(results)
    monkeypatch.setattr("captum_dcam.calibration.calibrator.LEAST", 1)
    monkeypatch.setattr("captum_dcam.evaluation.tables.inventions.LEAST", 1)
    fit, tried = fit_calibrator(results)
    spans = read_spans([Frame(f) for f in sorted(results.iterdir())])
    rows = spans.features[spans.fitting]
    assert np.allclose(fit.mean, rows.mean(0)) and fit.model and "mini" in fit.fitted_on
    held = ~spans.fitting
    probability = fit.probability(spans.features[held])
    assert tried["auroc"][0] == pytest.approx(auroc(probability, spans.true[held]))
    true = spans.true[held]
    marked = float((probability[~true] < 0.5).double().mean())
    assert tried["invented_marked"] == pytest.approx(marked)
    file = tmp_path / "preset.json"
    asked = ["calibrate", "--inventions", str(results), "-o", str(file)]
    run = CliRunner().invoke(app, asked)
    assert run.exit_code == 0 and "Tried on" in run.stdout, run.output
    assert preset(file).calibrator == fit
    other = CliRunner().invoke(app, [*asked, "--labels"])
    assert other.exit_code != 0 and "beside --inventions" in other.output


def test_rivals_are_read_by_hand(cache):
    """Internal confidence block after block; prelim attention between nothing and everything."""
    forward = tiny.bound(cache)
    targets = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())[:2]
    found = internal_confidence(forward, targets)
    for target, value in zip(targets, found.tolist(), strict=True):
        least = 1.0
        for position, token in zip(target.positions, target.token_ids, strict=True):
            step, best = forward.trajectory.step_of(0, position, "commit"), 0.0
            for block in range(len(forward.adapter.blocks)):
                hidden, _ = hidden_states(forward, block, step)
                every = range(forward.adapter.vocabulary)
                hidden = hidden.detach()[image_positions(forward)]
                logits = lens_logits(forward.adapter, hidden, every)
                best = max(best, float(logits.softmax(0)[token].max()))
            least = min(least, best)
        assert value == pytest.approx(least, abs=1e-5)
    prelim = prelim_attention(forward, targets)
    first = [int(forward.trajectory.commit_step[0, t.positions[0]]) == 0 for t in targets]
    assert bool(((prelim >= 0) & (prelim < 1)).all())
    for value, alone in zip(prelim.tolist(), first, strict=True):
        assert (value == 0) == alone
    assert torch.equal(prelim, prelim_attention(forward, targets))
