"""Tables against sums over the stored lines, their formats, and what they say is missing."""

import csv
import io
import json
import re
from pathlib import Path
from statistics import mean, median

import pytest
from evaluation import made_results

from captum_dcam.errors import StoreError, UnknownNameError
from captum_dcam.evaluation import frame
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.published import read_toml
from captum_dcam.evaluation.suites import suite
from captum_dcam.evaluation.table import Column, Figure, Table, with_published
from captum_dcam.evaluation.tables import TABLES, Results, engine, register_table, table
from captum_dcam.metrics import Reliability, auroc

#: those of inventions are of a suite of its own, which ``test_inventions`` measures
NAMES = tuple(n for n in TABLES if n != "summary" and not n.startswith("inventions"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_results.results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def results(folder):
    """The same, each part read once."""
    return Results(folder)


@pytest.fixture
def few_resamples(monkeypatch):
    """Where the width of an interval is not asked for."""
    monkeypatch.setattr(frame, "RESAMPLES", 20)


def lines(folder, part, kind="results"):
    text = next((folder / part).glob(f"{kind}-*.jsonl")).read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [line.get("record", line) for line in found]


def column(folder, part, variant, metric, kinds=None):
    """Every stored value of a metric: {(image, word): value}."""
    out = {}
    for line in lines(folder, part):
        own = line["variants"][variant].get("scores", {}).get(metric, [])
        for n, (word, value) in enumerate(zip(line["words"], own, strict=True)):
            if value is not None and (kinds is None or word["kind"] in kinds):
                out[line["index"], n] = value
    return out


def harmonic(*parts):
    return len(parts) / sum(1 / p for p in parts)


def noted(question, variants):
    """A question of a frame, which notes whom it is about."""

    def ask(self, variant, *rest, **chosen):
        variants.append(variant)
        return question(self, variant, *rest, **chosen)

    return ask


@pytest.fixture(scope="module")
def made(results):
    """Every table by name, and the variants that it asks a frame for."""
    tables, asked, now = {}, {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "RESAMPLES", 20)
        for question in ("values", "texts", "status"):
            patch.setattr(Frame, question, noted(getattr(Frame, question), now))
        for name in NAMES:
            now.clear()
            tables[name], asked[name] = table(name, results), set(now)
    return tables, asked


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_made_and_written_in_three_formats(made, name):
    found = made[0][name]
    assert found.rows and found.name == name and found.title
    assert any(isinstance(c, Figure | str | int) for _, cells in found.rows for c in cells)
    assert "seed 0" in found.markdown() or "thread" in found.markdown()
    body = [line for line in found.markdown().splitlines() if line.startswith("|")]
    assert len(body) == len(found.rows) + 2
    rows = list(csv.reader(io.StringIO(found.csv())))
    assert len(rows) == len(found.rows) + 1 and len({len(r) for r in rows}) == 1
    assert found.latex().count(r"\\") == len(found.rows) + 1


def test_means_and_differences_are_those_of_the_words(folder, results):
    found = table("comparison", results)
    names = ("ours/affinity", "paper/full", "tam")
    f3 = {name: column(folder, "objects", name, "f3") for name in names}
    own = found.cell("TAM", "F3 %")
    assert own.value == pytest.approx(100 * mean(f3["tam"].values()))
    assert own.low < own.value < own.high
    ahead = found.cell("Diffusion-CAM, paper preset", "default ahead by")
    pairs = [f3["ours/affinity"][k] - f3["paper/full"][k] for k in f3["paper/full"]]
    assert ahead.value == pytest.approx(100 * mean(pairs))
    assert found.cell("Diffusion-CAM, default preset", "default ahead by") is None
    parts = [
        mean(column(folder, "objects", "tam", m).values())
        for m in ("obj_iou", "contrast", "concentration")
    ]
    expected = 100 * harmonic(parts[0], parts[1] / 20, parts[2])
    assert found.cell("TAM", "F3 of means %").value == pytest.approx(expected)


def test_modules_gain_over_their_own_base(folder, results):
    found = table("ablation", results)
    for base in ("paper", "ours"):
        first = column(folder, "objects", f"{base}/base", "f3")
        other = column(folder, "objects", f"{base}/+cba", "f3")
        expected = 100 * mean(other[k] - first[k] for k in first)
        assert found.cell(f"{base}: +cba", "F3 gained").value == pytest.approx(expected)
        assert found.cell(f"{base}: base", "F3 gained") is None


def test_gating_counts_branches(folder, results):
    found = table("gating-high_std", results)
    routes = [
        route
        for line in lines(folder, "objects")
        for route in line["variants"]["paper/dacg:high_std=0.18"]["scores"]["dacg_route"]
    ]
    share = 100 * routes.count("low_mean") / len(routes)
    assert found.cell("high_std = 0.18", "low_mean %").value == pytest.approx(share)
    total = sum(found.cell("high_std = 0.18", f"{b} %").value for b in set(routes))
    assert total == pytest.approx(100)


def test_only_the_prefill_holds_the_image_behind_a_cache(folder, results):
    found = table("feasibility", results)
    assert found.cell("prefix: prefill", "verdict") == "PASS"
    assert found.cell("prefix: t = 0.5 S", "valid") == "0/8"
    assert found.cell("prefix: all calls", "valid") == "8/40"
    assert found.cell("full: t = 0.75 S", "verdict") == "PASS"
    assert found.cell("full: all calls", "valid") == "32/32"


def test_steps_that_fail_are_counted_and_explained(tmp_path):
    fails = [f"at {share}" for share in ("0.25", "0.5", "0.75")]
    made_results.results(tmp_path, "feasibility", fails=fails)
    found = table("steps", tmp_path)
    assert found.cell("prefix: prefill", "valid") == "8/8"
    assert found.cell("prefix: t = 0.5 S", "valid") == "0/8"
    assert found.cell("prefix: t = 0.5 S", "F3 %") is None
    assert any("MethodError: cannot" in note for note in found.notes)


def test_cost_is_the_median_of_generation_run_and_stages(folder, results):
    found = table("cost", results)
    whole = []
    for line in lines(folder, "objects", "costs"):
        run = next(r for r in line["runs"] if "paper/full" in r["variants"])
        stages = sum(s for _, s in line["variants"]["paper/full"]["stages"])
        whole.append(1000 * (line["generation"] + run["seconds"] + stages))
    assert found.cell("paper: full", "ms an image").value == pytest.approx(median(whole))


def test_f1_is_that_of_the_means(folder, results):
    found = table("tam-comparison", results)
    objects = mean(column(folder, "plausibility", "tam", "phrase_iou", ("object",)).values())
    functions = column(folder, "plausibility", "tam", "func_iou_image", ("function",))
    expected = 100 * harmonic(objects, mean(functions.values()))
    assert found.cell("TAM", "F1-IoU %").value == pytest.approx(expected)


def test_rivals_are_compared_on_the_same_words_and_signs_say_better(folder, results):
    found = table("rivals", results)
    own = column(folder, "faithfulness", "diffusion_cam", "deletion")
    other = column(folder, "faithfulness", "tam", "deletion")
    cell = found.cell("TAM", "deletion")
    assert cell.value == pytest.approx(mean(other[k] - own[k] for k in own))  # lower is better
    starred = [label for label, _ in found.rows if label.endswith("*")]
    assert starred, "methods of many passes are marked"


def test_placebo_uses_the_words_that_have_one(folder, results):
    found = table("placebo", results)
    own = column(folder, "plausibility", "tam", "obj_iou")
    other = column(folder, "plausibility", "tam", "placebo_obj_iou")
    expected = 100 * mean(own[k] - other[k] for k in other)
    row = dict(found.rows)["TAM"]
    assert row[0] == len(other) and row[3].value == pytest.approx(expected)


def test_reliability_is_fitted_on_some_images_and_tried_on_others(folder, results):
    found = table("reliability", results)
    read = Frame(folder / "plausibility")
    from captum_dcam.evaluation.tables.reliable import FIT_EVERY, word_features

    features, labels, images = word_features(read, "tam")
    fit = images % FIT_EVERY == 0
    assert bool(fit.any()) and not bool(fit.all())
    score = Reliability.fit(features[fit], labels[fit])
    expected = auroc(score.probability(features[~fit]), labels[~fit])
    assert found.cell("tam", "AUROC").value == pytest.approx(expected)


def test_every_row_of_a_specification_is_measured_by_its_part():
    plans = {part.name: part.plan for part in suite("all", made_results.setting())}
    content = read_toml(Path(engine.__file__).with_name("tables.toml"))["tables"]
    checked = 0
    for entry in content.values():
        entry = {**content.get(entry.get("like", ""), {}), **entry}
        for _, variant, *_ in entry.get("rows", ()):
            names = {v.name.split("@")[0] for v in plans[entry["parts"][0]].variants}
            assert variant in names, (entry["title"], variant)
            checked += 1
    assert checked > 90


def test_a_part_that_was_not_measured_says_how_to(tmp_path):
    with pytest.raises(StoreError, match="evaluate --suite objects"):
        table("comparison", tmp_path)
    with pytest.raises(StoreError, match="evaluate --suite economy"):
        table("economy", tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'comparison'"):
        table("comparson", tmp_path)


FAILING = ("paper/full", "ours/full", "oracle", "llava_cam@2", "paper/base", "diffusion_cam", "tam")


@pytest.mark.parametrize("fails", FAILING)
def test_tables_stand_when_a_variant_failed_everywhere(tmp_path, few_resamples, made, fails):
    """Those that ask for it; costs are asked of nobody, and stand in every table of costs."""
    for name in ("objects", "feasibility", "plausibility", "faithfulness", "sanity"):
        made_results.results(tmp_path, name, count=2, fails=(fails,))
    read = Results(tmp_path)
    touched = [n for n, own in made[1].items() if fails in own or n.startswith("cost")]
    touched = [name for name in touched if name != "economy"]
    assert len(touched) > 2
    for name in touched:
        assert table(name, read).markdown()


def test_cost_leaves_out_the_images_on_which_a_variant_failed(tmp_path, monkeypatch):
    one, calls = made_results.made, []

    def sometimes(generator, plan, kinds, cache, fails):
        calls.append(plan)
        return one(generator, plan, kinds, cache, ("paper/+akd",) if len(calls) == 3 else ())

    monkeypatch.setattr(made_results, "made", sometimes)
    made_results.results(tmp_path, "objects")
    assert table("cost", tmp_path).cell("paper: +akd", "ms an image").value > 0


def test_results_are_the_same_every_time(folder):
    for name in ("comparison", "rivals"):
        assert table(name, folder).csv() == table(name, Results(folder)).csv()


# -- the table itself ------------------------------------------------------------------------------


def small(**changes):
    settings = dict(
        name="t",
        title="A title",
        columns=(Column("a %", better="up"), Column("b", 2), Column("a %", published=True)),
        rows=(
            ("one", (Figure(1.26, 1, 1.5), None, Figure(2))),
            ("two & more", (Figure(2), "text", None)),
        ),
        notes=("a note",),
        first="row",
    )
    return Table(**{**settings, **changes})


def test_markdown_shows_intervals_arrows_and_gaps():
    text = small().markdown()
    assert "### A title" in text and text.rstrip().endswith("a note")
    assert re.search(r"one +\| +1\.3 \[1\.0, 1\.5\] +\| +– +\| +2\.0", text)
    assert "a % ↑" in text and "published: a %" in text


def test_csv_splits_intervals_into_columns():
    rows = list(csv.reader(io.StringIO(small().csv())))
    assert rows[0] == ["row", "a %", "a % low", "a % high", "b", "published a %"]
    assert rows[1] == ["one", "1.26", "1", "1.5", "", "2"]
    assert rows[2] == ["two & more", "2", "", "", "text", ""]


def test_latex_escapes():
    text = small().latex()
    assert r"two \& more" in text and r"a \% $\uparrow$" in text and r"\toprule" in text


def test_empty_columns_are_not_shown_on_the_terminal():
    shown = small(rows=(("one", (Figure(1.0), None, None)),)).shown()
    assert [c.name for c in shown.columns] == ["a %"] and shown.rows[0][1] == (Figure(1.0),)


def test_rows_must_fit_and_names_stay_unique():
    with pytest.raises(ValueError, match="row 'x': 1 cells for 3 columns"):
        small(rows=(("x", (None,)),))
    with pytest.raises(ValueError, match=r"table 'comparison' belongs to .* already"):
        register_table("comparison")(lambda results: small())


def test_published_columns_hold_only_what_was_published():
    heads, cells = with_published([Column("a"), Column("b")], [[1.0, None], [None, None]])
    assert [h.name for h in heads] == ["a"] and heads[0].published
    assert cells == [[Figure(1.0)], [None]]
