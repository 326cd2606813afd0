"""Preset files: wherever a name is accepted, all or nothing, damage teaches."""

import json

import pytest
import tiny
import torch
from calibration.made_maps import FITTED, SHORT

from captum_dcam import explain
from captum_dcam.attribution import DiffusionCAM
from captum_dcam.errors import PresetError, UnknownNameError
from captum_dcam.explaining import explain_generation
from captum_dcam.presets import PRESETS, preset, read_preset_file, write_preset
from captum_dcam.refine import Compose


def test_a_file_is_a_preset_wherever_a_name_is(file, adapter):
    read = preset(str(file))
    assert read.refinements() == Compose(FITTED) and preset(file).source == read.source
    own = PRESETS["default"]
    assert (read.score, read.product, read.center) == (own.score, own.product, own.center)
    assert read_preset_file(file)["fitted"] == {"seed": 3, "images": [1, "b"]}
    found = [
        explain(adapter, tiny.picture(), tiny.PROMPT, preset=name, refinements=given, **SHORT)
        for name, given in ((str(file), None), (file, None), ("default", list(FITTED)))
    ]
    for one in found[:2]:
        assert torch.equal(one.maps[0], found[2].maps[0])
        assert one.settings["preset"] == str(file)
        assert one.settings["refinements"] == found[2].settings["refinements"]
    forward = tiny.bound("prefix")
    target, pixels = tiny.pair(forward, 1), forward.request.pixels
    ours = DiffusionCAM(forward, preset=str(file)).attribute(pixels, target)
    same = DiffusionCAM(forward).attribute(pixels, target, refinements=list(FITTED))
    assert torch.equal(ours, same)


def test_a_file_names_the_block_that_explain_taps(file, adapter):
    assert preset(str(file)).layer is None
    assert adapter.recommended_block != 0 and adapter.deepest_block > 1
    write_preset(file, "default", preset("default"), FITTED, {}, 0)
    chosen = preset(str(file))
    assert chosen.layer == 0

    def tapped(**given):
        found = explain(adapter, tiny.picture(), tiny.PROMPT, **given, **SHORT)
        return found.settings["layer"]

    assert tapped(preset=str(file)) == 0 and tapped(preset=str(file), layer=1) == 1
    assert tapped(refinements=[]) == adapter.recommended_block
    forward = tiny.bound("prefix")
    found = explain_generation(forward, preset=chosen)
    assert found.settings["layer"] == forward.layer != 0, "a forward keeps its own"


def test_the_same_content_gives_the_same_bytes_and_replaces_presets_alone(file):
    before = file.read_bytes()
    write_preset(file, "default", preset("default"), FITTED, {"seed": 3, "images": [1, "b"]})
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["mine.json"]
    other = file.with_name("other.json")
    other.write_text('{"a": 1}')
    with pytest.raises(PresetError, match=r"other\.json exists and is no preset file"):
        write_preset(other, "default", preset("default"), FITTED, {})
    assert other.read_text() == '{"a": 1}'
    with pytest.raises(PresetError, match=r"ends in \.json"):
        write_preset(file.with_suffix(""), "default", preset("default"), FITTED, {})
    with pytest.raises(PresetError, match="is a folder"):
        folder = file.with_name("folder.json")
        folder.mkdir()
        write_preset(folder, "default", preset("default"), FITTED, {})


def test_a_file_of_other_bytes_is_kept(tmp_path):
    other = tmp_path / "image.json"
    other.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(PresetError, match="exists and is no preset file"):
        write_preset(other, "default", preset("default"), FITTED, {})
    assert other.read_bytes() == b"\x89PNG\xff\xfe"


def test_a_failed_write_leaves_the_earlier_file(file, monkeypatch):
    from captum_dcam import files as lines

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(lines, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        write_preset(file, "paper", preset("paper"), FITTED, {})
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["mine.json"]


def damaged(file, change):
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="other"), "is no preset file"),
        (lambda r: r.update(version=5), "format version 5, this package reads up to 4: update"),
        (lambda r: r.pop("product"), "it has no product; make it again with captum-dcam calibrate"),
        (lambda r: r.update(score="final"), 'damaged or edited. .* take out its line "digest"'),
        (lambda r: (r.pop("digest"), r.update(score="last")), "score is 'last': expected one of"),
        (
            lambda r: (r.pop("digest"), r["refinements"][2].update(high_sdt=1)),
            "refinements: .*'dacg' has no setting 'high_sdt'",
        ),
        (lambda r: (r.pop("digest"), r["refinements"][3].update(gamma=2)), "`gamma` is 2"),
        (lambda r: (r.pop("digest"), r.update(refinements=[{}])), "has no name"),
        (lambda r: (r.pop("digest"), r.update(refinements=None)), "refinements is None"),
        (lambda r: (r.pop("digest"), r.update(layer="2")), "layer is 2: expected a block's number"),
        (lambda r: (r.pop("digest"), r.update(layer=None)), "layer is None"),
        (lambda r: (r.pop("digest"), r.update(layer=2, version=1)), "has .*layer, which no preset"),
    ],
)
def test_damage_teaches(file, change, message):
    damaged(file, change)
    with pytest.raises(PresetError, match=message):
        preset(str(file))


def test_more_damage(file, tmp_path):
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(PresetError, match=r"is damaged or not JSON: .*make it again"):
        preset(str(file))
    with pytest.raises(FileNotFoundError, match=r"captum-dcam calibrate -o .*none\.json writes"):
        preset(str(tmp_path / "none.json"))
    with pytest.raises(UnknownNameError, match=r"did you mean 'paper'.*ends in \.json"):
        preset("papper")


def test_an_edited_file_without_its_digest_is_read(file):
    damaged(file, lambda r: (r.pop("digest"), r["refinements"][3].update(gamma=0.75)))
    assert preset(str(file)).refinements().stages[3].gamma == 0.75
