"""Comparisons: saved and loaded to the bit, strict JSON, all or nothing, damage is named."""

import csv
import json
import os
from dataclasses import replace

import awkward
import pytest
import tiny
import torch
from methods import made
from PIL import Image

from captum_dcam import files
from captum_dcam.comparing import compare_generation
from captum_dcam.errors import ExplanationError
from captum_dcam.files import without_nan
from captum_dcam.methods import Budget, method
from captum_dcam.results.comparison import METRICS, Comparison, document

FILES = ["comparison.csv", "comparison.json", "image-0.png", "maps.safetensors"]


def compared(images=1, masked=True, **settings):
    """A done, a partial and a failed row; the first word has a mask."""
    forward = tiny.bound("prefix", images=images)
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 10:30] = True
    masks = [mask, None] if masked else None
    with made.registered("made", text=True):
        return compare_generation(
            forward,
            [tiny.pair(forward, 0), tiny.pair(forward, 3)],
            ["diffusion_cam", "made", method("made", fails="no such thing")],
            masks=masks,
            budget={"made": Budget(passes=1)},
            **settings,
        )


@pytest.fixture(scope="module")
def comparison():
    return compared()


def same(one, two):
    for name in ("prompt", "answer", "targets", "commit_steps", "words"):
        assert getattr(one, name) == getattr(two, name)
    assert json.dumps([one.settings, one.versions]) == json.dumps([two.settings, two.versions])
    assert torch.equal(one.tokens.positions, two.tokens.positions)
    assert torch.equal(one.tokens.ids, two.tokens.ids)
    assert (one.tokens.token_texts, one.tokens.prompt) == (
        two.tokens.token_texts,
        two.tokens.prompt,
    )
    assert one.layout.prefix_length == two.layout.prefix_length
    assert one.layout.shapes == two.layout.shapes
    assert (one.masks is None) == (two.masks is None)
    for a, b in zip(one.masks or (), two.masks or (), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    for a, b in zip(one.rows, two.rows, strict=True):
        for name in ("name", "label", "group", "status", "note", "complete", "cost"):
            assert getattr(a, name) == getattr(b, name)
        assert json.dumps(a.settings) == json.dumps(b.settings)
        assert all(map(torch.equal, a.maps + a.raw, b.maps + b.raw))
        assert (a.text is None) == (b.text is None)
        assert (a.scores is None) == (b.scores is None)
        for x, y in zip(a.scores or (), b.scores or (), strict=True):
            assert (x is None) == (y is None)
            assert x is None or all(torch.equal(getattr(x, m), getattr(y, m)) for m in METRICS)
    assert one.records() == two.records()
    assert [i.tobytes() for i in one.images] == [i.tobytes() for i in two.images]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_round_trip(tmp_path, images, masked):
    made_ = compared(images, masked)
    assert [r.status for r in made_.rows] == ["done", "partial", "failed"]
    folder = made_.save(tmp_path / "deep" / "one")
    assert set(FILES) <= set(os.listdir(folder))
    found = Comparison.load(folder)
    same(found, made_)
    assert found.save(folder) == folder  # an earlier comparison is replaced
    same(Comparison.load(folder), made_)
    assert os.listdir(folder.parent) == ["one"]


def test_what_differs_between_words_grids_and_rows_is_kept(tmp_path):
    """Two grids of one picture, words with and without a mask, a row without text before one with
    it, a word of two tokens, and costs that are not alike."""
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 10:30] = True
    made_ = compare_generation(
        awkward.bound(),
        ["red", "stars", "hearts"],
        ["diffusion_cam_base", "attention", method("tam", filter=0)],
        masks=[None, mask, ~mask],
    )
    assert [r.text is None for r in made_.rows] == [True, False, False]
    found = Comparison.load(made_.save(tmp_path / "x"))
    same(found, made_)
    for one, two in zip(found.layout.grids, made_.layout.grids, strict=True):
        assert torch.equal(one.positions, two.positions) and one.image == two.image == 0
        assert torch.equal(one.x_edges, two.x_edges) and torch.equal(one.y_edges, two.y_edges)
    for one, two in zip(found.rows, made_.rows, strict=True):
        assert one.text is two.text or torch.equal(one.text.nan_to_num(), two.text.nan_to_num())
    assert not torch.equal(found.rows[0].maps[0], found.rows[0].raw[0])  # signed


def test_text_relevance_is_kept(comparison, tmp_path):
    text = torch.randn(2, len(comparison.tokens))
    rows = (replace(comparison.rows[0], text=text), *comparison.rows[1:])
    found = Comparison.load(replace(comparison, rows=rows).save(tmp_path / "x"))
    assert torch.equal(found.rows[0].text, text) and found.rows[1].text is None


def test_json_is_strict_and_complete(comparison, tmp_path):
    raw = (torch.full_like(comparison.rows[0].raw[0], float("nan")),)
    odd = replace(comparison, rows=(replace(comparison.rows[0], raw=raw), *comparison.rows[1:]))
    text = (odd.save(tmp_path / "x") / "comparison.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} in JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["records"][0]["peak"] is None
    assert [m["name"] for m in content["methods"]] == ["diffusion_cam", "made", "made#2"]
    assert content["methods"][2]["note"] == "ValueError: no such thing"
    assert content["methods"][0]["means"]["f3"] == pytest.approx(comparison.rows[0].mean("f3"))
    assert [w["text"] for w in content["words"]] == list(comparison.words)
    assert content["settings"]["score"] == "commit" and "torch" in content["versions"]
    assert without_nan({"a": (float("inf"), 1, "x")}) == {"a": [None, 1, "x"]}


def test_table_has_a_line_a_method_and_word(comparison, tmp_path):
    folder = comparison.save(tmp_path / "x")
    with (folder / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    expected = comparison.records()
    assert len(lines) == len(expected) == 6
    for line, record in zip(lines, expected, strict=True):
        assert line["method"] == record["method"] and line["word"] == record["word"]
        assert line["f3"] == ("" if record["f3"] is None else str(record["f3"]))


@pytest.mark.parametrize("owner", [Image.Image, json])
def test_nothing_is_left_when_saving_fails_midway(comparison, tmp_path, monkeypatch, owner):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    kept = comparison.save(tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    monkeypatch.setattr(owner, "save" if owner is Image.Image else "dumps", full)
    for folder in (tmp_path / "new", kept):
        with pytest.raises(OSError, match="No space"):
            comparison.save(folder)
    assert os.listdir(tmp_path) == ["kept"]
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before


@pytest.mark.parametrize("swaps", [True, False])
def test_the_earlier_folder_comes_back_if_it_cannot_be_replaced(
    comparison, tmp_path, monkeypatch, swaps
):
    kept = comparison.save(tmp_path / "kept")
    rename = type(kept).rename

    def refused(self, target):
        if swaps or (self.name == kept.name and self != kept):
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(type(kept), "rename", refused)
    monkeypatch.setattr(files, "exchanged", refused if swaps else lambda *_: False)
    with pytest.raises(OSError, match="busy"):
        comparison.save(kept)
    assert os.listdir(tmp_path) == ["kept"] and sorted(os.listdir(kept)) == FILES


def test_a_folder_of_somebody_else_is_not_touched(comparison, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    noted = comparison.save(tmp_path / "notes")
    (noted / "notes.txt").write_text("what I saw")
    for name, held in (("mine", "thesis"), ("file", "not an earlier"), ("notes", "comparison")):
        with pytest.raises(FileExistsError, match=held):
            comparison.save(tmp_path / name)
    assert (noted / "notes.txt").is_file() and (tmp_path / "mine" / "thesis.txt").is_file()
    (tmp_path / "empty").mkdir()
    comparison.save(tmp_path / "empty")


def test_more_pictures_belong_to_the_folder(comparison, tmp_path):
    folder = comparison.save(tmp_path / "x", {"panel.png": tiny.picture()})
    assert sorted(os.listdir(folder)) == sorted([*FILES, "panel.png"])
    comparison.save(folder)
    assert sorted(os.listdir(folder)) == FILES


def change(folder, edit):
    path = folder / "comparison.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "no json": lambda f: (f / "comparison.json").write_text("{"),
    "gone": lambda f: (f / "comparison.json").unlink(),
    "foreign": lambda f: (f / "comparison.json").write_text('{"format": "other"}'),
    "newer": lambda f: change(f, lambda c: c.update(version=99)),
    "no words": lambda f: change(f, lambda c: c.pop("words")),
    "a method less": lambda f: change(f, lambda c: c["methods"].pop()),
    "no tensors": lambda f: (f / "maps.safetensors").unlink(),
    "tensors cut": lambda f: (f / "maps.safetensors").write_bytes(b"\x08\x00"),
    "table edited": lambda f: (f / "comparison.csv").write_text("mine"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(comparison, tmp_path, damage):
    folder = comparison.save(tmp_path / "x")
    DAMAGE[damage](folder)
    with pytest.raises(ExplanationError, match=str(folder)):
        Comparison.load(folder)


def test_an_explanation_is_no_comparison(tmp_path):
    with pytest.raises(ExplanationError, match="not a saved comparison"):
        Comparison.load(tmp_path)


def test_document_names_every_word_and_method(comparison):
    found = document(comparison)
    assert len(found["records"]) == len(found["words"]) * len(found["methods"])
