"""The papers' figures against the papers' own formulas; rows that do not agree are listed."""

import itertools
from pathlib import Path
from statistics import mean

import pytest

import captum_dcam.evaluation
from captum_dcam.errors import UnknownNameError
from captum_dcam.evaluation.published import (
    DOUBTFUL,
    figures,
    published,
    published_tables,
    read_toml,
    source,
)

FILE = Path(captum_dcam.evaluation.__file__).parent / "tables" / "published.toml"

SHARES = ("high_var", "high_mean", "low_mean", "default")
#: half a unit of the last digit of Obj-IoU, contrast, concentration and F3
ROUNDING = {
    **dict.fromkeys(("1 COCO", "1 GranDf", "2"), (0.005, 0.005, 0.005, 0.005)),
    "5": (0.05, 0.0005, 0.005, 0.05),
    **dict.fromkeys("6789", (0.05, 0.005, 0.005, 0.05)),
    "12": (0.005, 0.00005, 0.005, 0.005),
}
MODELS = {
    "LLaVA1_5-7B": "LLaVA1.5-7B",
    "LLaVA1_5-13B": "LLaVA1.5-13B",
    "InternVL2_5-2B": "InternVL2.5-2B",
    "InternVL2_5-4B": "InternVL2.5-4B",
    "InternVL2_5-8B": "InternVL2.5-8B",
    "Qwen2-VL-2B": "Qwen2-VL-2B",
    "Qwen2-VL-7B": "Qwen2-VL-7B",
}
DATA = ("COCO", "GranDf", "OpenPSG")


def f3(obj, contrast, concentration):
    return 3 / (1 / obj + 1 / (100 * min(contrast / 20, 1)) + 1 / concentration)


def f1(obj, func):
    return 2 * obj * func / (obj + func)


def span(formula, values, halves):
    """The range of a formula over all inputs that round to the printed ones."""
    shifts = itertools.product(*[(-h, h) for h in halves])
    found = [formula(*(v + s for v, s in zip(values, one, strict=True))) for one in shifts]
    return min(found), max(found)


def numbered(paper, columns):
    """(table, row, figures) of a paper's rows that have all the columns."""
    for name in published_tables():
        if name.startswith(paper):
            for label, row in figures(name).items():
                if set(columns) <= row.keys():
                    yield name, label, row


def wrong_f3():
    """Rows whose F3 is not that of the printed means; in tables of means of F3s: is above it."""
    columns = ("Obj-IoU", "Contrast", "Concentration", "F3")
    for table, label, row in numbered("Diffusion-CAM", columns):
        number = table.removeprefix("Diffusion-CAM ")
        *halves, half = ROUNDING[number]
        *parts, printed = (row[c] for c in columns)
        low, high = span(f3, parts, halves)
        of_means = number in ("1 COCO", "1 GranDf", "2")
        if printed > high + half or (of_means and printed < low - half):
            yield table, label


def wrong_f1():
    """Rows whose F1-IoU is not that of the printed IoUs; sums of two figures are twice as rough."""
    columns = ("Obj-IoU", "Func-IoU", "F1-IoU")
    for table, label, row in (*numbered("TAM", columns), *numbered("MSEA+ARC", columns)):
        if table.startswith("TAM 4"):  # gains
            continue
        half = 0.01 if label.endswith("+ Ours") else 0.005
        *parts, printed = (row[c] for c in columns)
        low, high = span(f1, parts, (half, half))
        if not low - half <= printed <= high + half:
            yield table, label


def wrong_shares():
    """Sweeps whose four branches do not add up to all maps."""
    for table, label, row in numbered("Diffusion-CAM", SHARES):
        if abs(sum(row[s] for s in SHARES) - 100) > 0.2:
            yield table, label


def other_figures():
    """Rows that repeat a row of another table with another figure."""
    same = [
        ("Diffusion-CAM 2", "Full", "Diffusion-CAM 1 COCO", "Diffusion-CAM"),
        *(
            ("Diffusion-CAM 3", f"{m}: layer 10", "Diffusion-CAM 1 COCO", m)
            for m in ("LLaVA-CAM", "Diffusion-CAM")
        ),
        *(
            (f"Diffusion-CAM {n}", row, "Diffusion-CAM 6", "0.22")
            for n, row in ((7, "0.35"), (8, "0.25"), (9, "Dynamic"))
        ),
        ("TAM 2", "Baseline", "TAM 1", "neither"),
        ("TAM 2", "Ours", "TAM 1", "ECI + RGF"),
        ("TAM 3 COCO", "CAM", "TAM 1", "neither"),
        ("TAM 3 COCO", "TAM", "TAM 1", "ECI + RGF"),
        ("MSEA+ARC 3 Qwen2-VL-2B", "neither", "TAM 1", "RGF"),
        ("MSEA+ARC 3 Qwen2-VL-2B", "Mean mitigation", "TAM 2", "ECI-mean"),
        *(
            (f"MSEA+ARC 2 {d}", f"Qwen2-VL-2B: {m}", f"MSEA+ARC 1 {d}", m)
            for d in DATA
            for m in ("CAM", "TAM", "Ours")
        ),
        *(
            (f"MSEA+ARC 1 {d}", row, f"TAM 3 {d}", row)
            for d in DATA
            for row in figures("TAM 3 COCO")
            if not row.endswith("+ Ours")
        ),
        *(
            (f"MSEA+ARC 3 {m}", row, "MSEA+ARC 2 COCO", f"{m}: {method}")
            for m in ("Qwen2-VL-2B", "LLaVA1.5-7B")
            for row, method in (("TAM", "TAM"), ("Mean + ARC", "Ours"))
        ),
    ]  # fmt: skip
    for table, row, other, label in same:
        own, theirs = figures(table)[row], figures(other)[label]
        if any(own[c] != theirs[c] for c in own.keys() & theirs.keys()):
            yield table, row


def wrong_times():
    """Rows of Table 11 that are not Table 10's pass and modules, to a millisecond."""
    base = published("Diffusion-CAM 10", "Base attribution pass", "Time (ms)")
    modules = {
        m: published("Diffusion-CAM 10", m, "Time (ms)") for m in ("AKD", "DACG", "CBA", "SICD")
    }
    total = published("Diffusion-CAM 10", "Total post-processing", "Time (ms)")
    assert total == pytest.approx(sum(modules.values()))
    expected = {"Diffusion-CAM (base)": base, "Diffusion-CAM (full)": base + total}
    expected |= {f"Base + {m}": base + t for m, t in modules.items()}
    for label, time in expected.items():
        if abs(published("Diffusion-CAM 11", label, "Time (ms)") - time) > 1:
            yield "Diffusion-CAM 11", label


def test_every_row_agrees_but_those_listed():
    checks = (wrong_f3, wrong_f1, wrong_shares, other_figures, wrong_times)
    found = {pair for check in checks for pair in check()}
    assert found == set(DOUBTFUL)
    assert len(list(numbered("", ()))) > 250


def test_the_checks_see_rows():
    """So that none of them passes for want of rows."""
    assert len(list(numbered("Diffusion-CAM", ("Obj-IoU", "Concentration", "F3")))) == 38
    assert len(list(numbered("Diffusion-CAM", SHARES))) == 19
    assert (
        sum(len(figures(t)) for t in published_tables() if "3" in t.split()[1]) == 8 + 3 * 15 + 16
    )


def test_layers_leave_room_for_a_concentration():
    """Table 3 leaves it out; F3 and the other two give it."""
    for _, row in figures("Diffusion-CAM 3").items():
        left = 3 / row["F3"] - 1 / row["Obj-IoU"] - 1 / (5 * row["Contrast"])
        assert 0 < 1 / left <= 100


def test_a_step_is_valid_where_the_sequence_holds_the_image():
    rows = figures("Diffusion-CAM 4")
    for label, row in rows.items():
        assert row["Valid"] == (row["feat_len"] >= row["img_end"])
        assert published("Diffusion-CAM 5", label, "Valid") == 200 * row["Valid"]
        assert (published("Diffusion-CAM 5", label, "F3") is None) == (not row["Valid"])
    assert sum(row["Valid"] for row in rows.values()) == 1


@pytest.mark.parametrize("number", (6, 7, 8))
def test_no_fixed_order_of_the_branches_gives_the_three_sweeps(number):
    """The branch that is asked first depends on its own bound alone; here all of them move."""
    rows = list(figures(f"Diffusion-CAM {number}").values())
    assert all(len({row[share] for row in rows}) == len(rows) for share in SHARES)


@pytest.mark.parametrize("data", DATA)
def test_tams_gains_are_differences(data):
    columns = ("Obj-IoU", "Func-IoU", "F1-IoU")
    gains = figures(f"TAM 4 {data}")
    for model, name in MODELS.items():
        rows = figures(f"MSEA+ARC 2 {data}")
        for column in columns:
            difference = rows[f"{name}: TAM"][column] - rows[f"{name}: CAM"][column]
            assert gains[model][column] == pytest.approx(difference, abs=0.011), (model, column)
    for column in columns:
        over = mean(gains[model][column] for model in MODELS)
        assert gains["Mean Improvements"][column] == pytest.approx(over, abs=0.02)


@pytest.mark.parametrize("data", DATA)
def test_gains_are_added_to_their_base(data):
    """CAM with TAM's two parts is TAM."""
    rows = figures(f"TAM 3 {data}")
    assert [r for r in rows if r.endswith("+ Ours")] == [
        f"{base} + Ours" for base in ("ArchiSurgery", "Grad-CAM++", "Layer-CAM", "CAM")
    ]
    for column, value in rows["CAM + Ours"].items():
        assert value == pytest.approx(rows["TAM"][column], abs=0.011)
    assert published("TAM 3 COCO", "Layer-CAM + Ours", "Func-IoU") == 76.93  # 84.88 - 7.95
    assert published("TAM 3 OpenPSG", "Layer-CAM + Ours", "F1-IoU") == 33.17  # 24.22 + 8.95


def test_figures_are_looked_up_one_by_one():
    assert published("Diffusion-CAM 1 COCO", "Diffusion-CAM", "F3") == 23.04
    assert published("Diffusion-CAM 1 GranDf", "Grad-CAM", "Concentration") == 75.42
    assert published("Diffusion-CAM 12", "concise", "Obj-IoU ±") == 1.53
    assert published("MSEA+ARC 3 LLaVA1.5-7B", "Mean + ARC", "F1-IoU") == 45.34
    assert published("Diffusion-CAM 3", "LLaVA-CAM: layer 10", "Concentration") is None
    assert published("Diffusion-CAM 2", "Half", "F3") is None
    assert published("Diffusion-CAM 5", "t = S/2", "F3") is None
    assert published("TAM 1", "ECI", "F3") is None


def test_every_table_names_its_source():
    for table in published_tables():
        paper, number, *part = table.split()
        said = source(table)
        assert said.startswith(f"{paper}, ") and f", Table {number} (" in said
        assert not part or part[0] in said
    assert source("TAM 3 OpenPSG").endswith("Table 3 (Qwen2-VL-2B, OpenPSG validation set)")


@pytest.mark.parametrize("function", (source, figures, lambda t: published(t, "x", "y")))
def test_unknown_tables_are_refused_with_near_names(function):
    with pytest.raises(UnknownNameError, match="did you mean 'TAM 3 COCO'"):
        function("TAM 3 Coco")


def test_rows_have_no_more_figures_than_columns():
    """A missing end is not printed; a figure too many would be lost."""
    for name, entry in read_toml(FILE).items():
        assert name.split()[0] == entry["source"].split(",")[0]
        for label, row in entry["rows"].items():
            assert len(row) <= len(entry["columns"]), (name, label)


def test_figures_cannot_be_changed():
    with pytest.raises(TypeError):
        figures("TAM 1")["ECI"]["F1-IoU"] = 0.0
    with pytest.raises(TypeError):
        figures("TAM 1")["new"] = {}
