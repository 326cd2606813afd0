"""Benchmarks run: their figures are for the documents, not for tests."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from captum.attr import LayerGradCam

from captum_dcam import DenoisingForward, explain_generation, load
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.methods import method_names
from captum_dcam.metrics import localization
from captum_dcam.model.words import words_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_large_models_benchmark_on_its_smallest_size(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    large = pytest.importorskip("large")
    large.main("tiny", "cpu", "float32", None, None, 64, 64, 6, 2, 3, 1, 0, tmp_path / "large.json")
    report = json.loads((tmp_path / "large.json").read_text())
    names = [(row["cache"], row["what"]) for row in report["rows"]]
    work = ["generation alone", "generation, recorded", "one word, raw map", "one word", "3 words"]
    assert names == [(cache, name) for cache in ("prefix", "none") for name in work]
    assert all(row["seconds"] > 0 and row["peak GiB"] > 0 for row in report["rows"])
    assert len(large.markdown(report).splitlines()) == 2 + len(names) + 2
    shape = large.SHAPES["8b"]
    each = 4 * shape.width**2 + 3 * shape.width * shape.mlp
    assert 7e9 < shape.blocks * each + 2 * shape.vocabulary * shape.width < 8.5e9


def test_memory_is_counted_without_values(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory = pytest.importorskip("memory")
    with memory.Live() as live:
        first = torch.empty(300, device="meta")
        view, other = first[:10], first * 2
        assert live.bytes == live.peak == 2 * 1536  # 1200 bytes each, in units of 512
        del first, other
        assert live.bytes == 1536 and view.numel() == 10
        del view
        assert (live.bytes, live.peak) == (0, 3072)
    asked = dict.fromkeys(("width", "blocks", "heads", "mlp", "vocabulary"), 0)
    few = {"prefix": [90], "answer": [8], "words": [1, 3], "card": 1.0, "dtype": "float32"}
    for cache in ("prefix", "none"):
        path = tmp_path / f"{cache}.json"
        memory.main("tiny", **asked, cache=cache, rows=[1, 0], **few, output=path)
        one, fitting = json.loads(path.read_text())
        assert one["generation alone"] <= one["generation, recorded"]
        assert one["1 word"] <= one["3 words"] < fitting["3 words"]
        weights = memory.adapter_of(memory.SHAPES["tiny"], torch.float32, cache).model.parameters()
        assert one["generation alone"] * memory.GIB > sum(w.nbytes for w in weights)


def test_position_bias_is_told_from_what_images_show(monkeypatch):
    """Maps of objects that lie low, with and without a factor that grows with the token's place."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bias = pytest.importorskip("position_bias")
    draws = torch.Generator().manual_seed(0)
    low = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None] ** 2
    shown = torch.rand(80, 6, 5, generator=draws, dtype=torch.float64) * low
    turned = shown.flip((1, 2))
    place = torch.linspace(0.5, 1.5, 30, dtype=torch.float64).view(6, 5)

    def rows(factor):
        both = [m * factor / (m * factor).sum((1, 2), keepdim=True) for m in (shown, turned)]
        return torch.stack(both).mean(0)[:, None]

    plain, biased = (bias.intervals(rows(f), 0)[0] for f in (torch.ones_like(place), place))
    for (value, least, most), none in zip(plain.tolist(), (0, 0, 0.5), strict=True):
        assert least - 1e-12 <= none <= most + 1e-12 and abs(value - none) < 1e-9
    assert biased[0, 1] > 0.3 and biased[2, 1] > 0.53
    order = torch.arange(30, dtype=torch.float64)
    assert bias.correlation(3 * order + 1, order) == pytest.approx(1)
    assert bias.correlation(torch.ones(30, dtype=torch.float64), order) == 0


def test_maps_with_equal_refinements(monkeypatch, tmp_path, capsys):
    """The default's stored F3 is that of what explain shows; what is measured is not done again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    maps = pytest.importorskip("maps")
    kept, first = torch.get_num_threads(), maps.rows_of(None)[0]
    asked = {"words": 1, "questions": 0, "modules": 1, "curves": 0, "sanity": 1, "shard": "0/1"}
    asked["wrong"] = 1
    few = partial(maps.faithfulness.correction, fractions=(0.0, 0.1, 0.5))  # each is an image
    monkeypatch.setattr(maps.faithfulness, "correction", few)
    times = []
    for _ in range(2):
        maps.measure(tmp_path, "prefix", 61, 1, methods=["attention", "oracle"], **asked)
        (path,) = tmp_path.iterdir()
        times.append(path.stat().st_mtime_ns)
    torch.set_num_threads(kept)
    assert times[0] == times[1] and first == "diffusion_cam"
    answer = json.loads(path.read_text())["answers"][0]
    assert list(answer["scores"]) == [first, "attention", "oracle"]
    scene, adapter = make_scene(HELD_OUT, 61), load("mini")
    forward = DenoisingForward(adapter)
    forward.generate(adapter.prepare([[scene.image]], ["describe the image ."]))
    named = maps.some_of(maps.described(scene, forward), 1, 61)
    assert [n.target.text for n in named] == [w["text"] for w in answer["words"]]
    shown = explain_generation(forward, [n.target for n in named])
    pixels = forward.request.layout.grids[0].to_pixels(shown.maps[0])
    found = localization(pixels, torch.stack([n.mask for n in named])).f3
    assert answer["scores"][first]["affinity"]["f3"] == pytest.approx(found.tolist())
    assert {"last block", "all weights", "other answer"} < set(answer["scores"][first]["bare"])
    (wrong,) = json.loads(path.read_text())["corrected"]
    assert set(wrong["scores"]) == {first, "attention"}
    for own in wrong["scores"][first].values():
        (area,), (within,) = own["amcr"], own["csr"]
        assert 0 < area <= 1 and within == (area <= 0.1)
    tables = pytest.importorskip("maps_tables")
    tables.table(tmp_path, "prefix", 61, 1, False)
    lines = capsys.readouterr().out.splitlines()
    mine = [line.split(" | ") for line in lines if line.startswith(f"| {first} |")]
    assert len(mine) == sum(line.startswith("### ") for line in lines) >= 4
    assert mine[0][5] == "–"  # the default minus itself
    tables.table(tmp_path, "prefix", 61, 1, True)
    assert "`attention` · " in capsys.readouterr().out


def test_every_method_has_its_row(monkeypatch):
    """But the paper's preset, whose bare map is the base preset's, and methods of too many passes,
    which go by their names; quick and long are all others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    maps = pytest.importorskip("maps")
    names = maps.rows_of(None)
    assert (
        set(method_names()) - {"diffusion_cam_paper", "eagle", "igos_pp"}
        < set(names)
        == set(maps.rows_of(["quick", "long"]))
    )
    assert not {n for n in maps.rows_of(["quick"]) if maps.is_long(n)}
    assert maps.rows_of(["eagle", "igos_pp"]) == ["diffusion_cam", "eagle", "igos_pp"]
    with pytest.raises(Exception, match="expected quick, long"):
        maps.rows_of(["grad"])


@pytest.mark.parametrize("cache", ["prefix", "none"])
def test_what_costs_are_compared_with_finds_the_same(monkeypatch, cache):
    """Grad-CAM by hand is Captum's, and the floor goes through what the library goes through."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cost = pytest.importorskip("cost")
    forward, words = cost.bound("mini", cache, 4)
    target = words[3].positions[0], words[3].token_ids[0]
    captums = LayerGradCam(forward, forward.tap).attribute(
        forward.request.pixels,
        target,
        additional_forward_args=forward.arguments(target),
        relu_attributions=True,
    )
    torch.testing.assert_close(cost.grad_cam(forward, target)[None], captums.detach())


def test_the_table_of_costs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cost = pytest.importorskip("cost")
    forward = tiny.bound("prefix")
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    found = cost.configuration(forward, words[:2], [1, 2], 1)
    assert found["answer"] == 2 and found["steps"]["count"] == forward.trajectory.steps
    assert all(ms > 0 for works in found["words"].values() for ms in works.values())
    stage = {"1 thread, alone": 1.0, "1 thread, beside a busy process": 2.0, cost.LOOP: 0.5}
    report = {"machine": "M", "commit": "C", "counts": [1, 2], "repeats": 1}
    made = cost.markdown({**report, "configurations": [found], "refinements": {"affinity": stage}})
    assert "| affinity | 1.0 | 2.0 | 32× |" in made
    rows = [line for line in made.splitlines() if line.startswith(f"| {cost.DEFAULT} |")]
    ratios = [found["words"][n][cost.DEFAULT] / found["words"][n][cost.FLOOR] for n in "12"]
    assert rows == [f"| {cost.DEFAULT} | {ratios[0]:.2f} / {ratios[1]:.2f} |"]


def test_the_gallery_has_every_method_or_says_why_not(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gallery, pictures = pytest.importorskip("gallery"), pytest.importorskip("pictures")
    monkeypatch.setattr(gallery, "importable", lambda _: False)
    kept, left = gallery.shown()
    packaged = [name for name in method_names() if name.startswith("pgc_")]
    assert {*(one.name for one in kept), *packaged, "eagle", "igos_pp"} == {*method_names()}
    assert len(kept) + len(left) == len(method_names())
    docs = BENCHMARKS.parent / "docs"
    drawn = {f"gallery-{number}.webp": gallery.LIMIT for number in range(2000, 2006)}
    drawn |= {name: pictures.LIMITS[Path(name).suffix] for name in (*pictures.SHOTS, "answer.gif")}
    page = "".join((docs / f"{n}.md").read_text() for n in ("GALLERY", "EXPLORER", "index"))
    for name, limit in drawn.items():
        assert f"(images/{name})" in page and (docs / "images" / name).stat().st_size <= limit
    two = [one for one in kept if one.name in ("diffusion_cam", "feature_surgery")]
    found = gallery.compared(2000, two, tmp_path)
    sheet = gallery.sheet(found, 2000)
    assert sheet.size == (gallery.WIDE, 260 + gallery.SIDE + gallery.TEXT + gallery.MARGIN)
    again = gallery.sheet(gallery.compared(2000, [], tmp_path), 2000)  # read, not computed
    assert again.tobytes() == sheet.tobytes()
