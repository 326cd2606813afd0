"""Explanations: saved and loaded to the bit, all or nothing, and damage is named."""

import json
import os

import pytest
import tiny
import torch
from PIL import Image

import captum_dcam
from captum_dcam.errors import ExplanationError, TargetError
from captum_dcam.results.explanation import Explanation, region


@pytest.fixture
def explanation(cache):
    return captum_dcam.explain(
        tiny.adapter(cache),
        [tiny.picture(0), tiny.picture(1, (33, 50))],
        tiny.PROMPT,
        gen_length=8,
    )


def same(one, two):
    assert (one.prompt, one.answer, one.targets, one.token_texts) == (
        two.prompt,
        two.answer,
        two.targets,
        two.token_texts,
    )
    for a, b in zip(one.maps + one.peaks, two.maps + two.peaks, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for a, b in zip(one.layout.grids, two.layout.grids, strict=True):
        assert torch.equal(a.positions, b.positions) and torch.equal(a.x_edges, b.x_edges)
        assert torch.equal(a.y_edges, b.y_edges)
        assert (a.image_size, a.image) == (b.image_size, b.image)
    assert one.layout.prefix_length == two.layout.prefix_length
    s, t = one.trajectory, two.trajectory
    for name in ("tokens", "commit_step", "confidence"):
        assert torch.equal(getattr(s, name), getattr(t, name))
    for a, b in zip(s.states + s.final_state, t.states + t.final_state, strict=True):
        assert torch.equal(a, b)
    assert (s.cache, s.lengths, s.image_end, s.feasible) == (
        t.cache,
        t.lengths,
        t.image_end,
        t.feasible,
    )
    assert json.dumps([one.settings, one.versions]) == json.dumps([two.settings, two.versions])
    for a, b in zip(one.images, two.images, strict=True):
        assert a.tobytes() == b.tobytes() and a.size == b.size


def test_round_trip(explanation, tmp_path):
    folder = explanation.save(tmp_path / "deep" / "one")
    found = Explanation.load(folder)
    same(found, explanation)
    assert torch.equal(found.pixel_maps(1), explanation.pixel_maps(1))
    assert found.save(folder) == folder  # an earlier explanation is replaced
    same(Explanation.load(folder), explanation)
    assert sorted(os.listdir(folder)) == [
        "image-0.png",
        "image-1.png",
        "manifest.json",
        "tensors.safetensors",
    ]
    assert os.listdir(folder.parent) == ["one"]


def test_a_loaded_generation_can_be_bound_and_explained_again(explanation, tmp_path, cache):
    found = Explanation.load(explanation.save(tmp_path / "x"))
    adapter = tiny.adapter(cache)
    forward = captum_dcam.DenoisingForward(adapter)
    forward.bind(adapter.prepare([list(found.images)], [found.prompt]), found.trajectory)
    again = captum_dcam.explain_generation(forward)
    for a, b in zip(again.maps, explanation.maps, strict=True):
        assert tiny.relative(a, b) < 1e-4


def test_many_pictures_keep_their_order(tmp_path):
    images = [Image.new("RGB", (10 + i, 10), (20 * i, 0, 0)) for i in range(12)]
    made = captum_dcam.explain(tiny.adapter("prefix"), images, "", [0], gen_length=2)
    found = Explanation.load(made.save(tmp_path / "x"))
    assert [i.size for i in found.images] == [i.size for i in images]


@pytest.mark.parametrize("mode", ("L", "RGBA", "CMYK", "P", "1", "I", "LA", "F", "I;16"))
def test_pictures_of_every_mode_are_saved(tmp_path, mode):
    if mode == "I;16":
        image = Image.frombytes("I;16", (4, 4), bytes(range(32)))
    else:
        image = tiny.picture(0, (20, 30)).convert("L" if mode in ("F", "I") else mode).convert(mode)
    made = captum_dcam.explain(tiny.adapter("none"), image, "", [0], gen_length=2)
    found = Explanation.load(made.save(tmp_path / "x"))
    assert found.images[0].size == image.size and found.images[0].mode == "RGB"


def test_nothing_is_left_when_saving_fails_midway(explanation, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    kept = explanation.save(tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    for owner, name in ((Image.Image, "save"), (json, "dumps")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(owner, name, full)
            explanation.save(tmp_path / "new")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(owner, name, full)
            explanation.save(kept)
        assert os.listdir(tmp_path) == ["kept"]
        assert {p.name: p.read_bytes() for p in kept.iterdir()} == before


def test_a_folder_of_somebody_else_is_not_touched(explanation, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "manifest.json").write_text('{"name": "a browser extension"}')
    explanation.save(tmp_path / "notes")
    (tmp_path / "notes" / "notes.txt").write_text("what I saw")
    for name in ("mine", "file", "alien", "notes"):
        with pytest.raises(FileExistsError, match="not an earlier explanation"):
            explanation.save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "alien" / "manifest.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["alien", "file", "mine", "notes"]
    (tmp_path / "empty").mkdir()
    explanation.save(tmp_path / "empty")


def manifest_with(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "no json": lambda f: (f / "manifest.json").write_text("{"),
    "not text": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: (f / "manifest.json").write_text("[]"),
    "foreign": lambda f: (f / "manifest.json").write_text('{"format": "other"}'),
    "newer": lambda f: manifest_with(f, lambda m: m.update(version=99)),
    "no version": lambda f: manifest_with(f, lambda m: m.pop("version")),
    "no files": lambda f: manifest_with(f, lambda m: m.pop("files")),
    "no tensors named": lambda f: manifest_with(f, lambda m: m["files"].pop("tensors.safetensors")),
    "no targets": lambda f: manifest_with(f, lambda m: m.pop("targets")),
    "wrong targets": lambda f: manifest_with(f, lambda m: m.update(targets=3)),
    "wrong grids": lambda f: manifest_with(f, lambda m: m.update(grids=m["grids"] * 2)),
    "wrong cache": lambda f: manifest_with(f, lambda m: m["trajectory"].update(regime="odd")),
    "tensors gone": lambda f: (f / "tensors.safetensors").unlink(),
    "tensors cut": lambda f: (f / "tensors.safetensors").write_bytes(b"\x08\x00"),
    "picture changed": lambda f: Image.new("RGB", (2, 2)).save(f / "image-0.png"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    made = captum_dcam.explain(tiny.adapter("none"), tiny.picture(), "", [0], gen_length=2)
    folder = made.save(tmp_path / "x")
    DAMAGE[damage](folder)
    if damage == "no tensors named":
        (folder / "tensors.safetensors").write_bytes(b"garbage")
    with pytest.raises(ExplanationError, match=str(folder)):
        Explanation.load(folder)


def test_foreign_and_missing_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ExplanationError, match=r"no manifest\.json"):
            Explanation.load(folder)


def test_index_focus_and_commit_steps(explanation):
    word = explanation.words[0]
    assert explanation.index(word) == 0 and explanation.index(1) == 1
    with pytest.raises(TargetError, match="explained:"):
        explanation.index("zebra")
    with pytest.raises(TargetError, match="is not one of"):
        explanation.index(99)
    steps = explanation.trajectory.commit_step[0]
    for target, found in zip(explanation.targets, explanation.commit_steps(), strict=True):
        assert found == tuple(int(steps[p]) for p in target.positions)
    maps = explanation.maps[0]
    maps[0] = 0
    assert explanation.focus(0)["region"] == "nowhere"
    maps[0, 6, 1] = 1.0
    found = explanation.focus(0)
    assert found["peak"] == (10.0, 45.0, 20.0, 52.5)  # 80 × 60 px, eight cells a side
    assert found["center"] == pytest.approx((15 / 80, 48.75 / 60))
    assert found["region"] == "lower left" and found["area"] == 1 / 64
    maps[0] = 1.0
    assert explanation.focus(0)["area"] == 0.5 and explanation.focus(0)["region"] == "center"


@pytest.mark.parametrize(
    ("point", "name"),
    (((0, 0), "upper left"), ((1, 1), "lower right"), ((0.5, 0.5), "center"), ((0.5, 0), "upper")),
)
def test_regions(point, name):
    assert region(*point) == name


def test_its_repr_is_a_line_to_read(cache):
    """Not thousands of characters of tensors."""
    found = captum_dcam.explain(tiny.adapter(cache), tiny.picture(), tiny.PROMPT, gen_length=8)
    shown = repr(found)
    assert shown.startswith("Explanation('") and "\n" not in shown and len(shown) < 300
    assert found.words[0] in shown and "8×8" in shown and "'mini'" in shown
    other = captum_dcam.compare(
        tiny.adapter(cache), tiny.picture(), tiny.PROMPT, [0], ["attention"], gen_length=8
    )
    assert repr(other).startswith("Comparison('") and "attention" in repr(other)
