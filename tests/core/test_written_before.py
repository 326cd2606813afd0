"""What was written before the house was rebuilt is read as it was, and written again the same."""

import json
from pathlib import Path

import pytest
import torch
from calibration.made_maps import FITTED
from evaluation import made
from safetensors.torch import load_file, save_file

from captum_dcam import Comparison, Explanation
from captum_dcam.evaluation import Plan, Store, evaluate
from captum_dcam.evaluation.tables import table
from captum_dcam.files import sealed
from captum_dcam.presets import PRESETS, preset, write_preset
from captum_dcam.refine import Compose
from captum_dcam.results.manifests import hashes

BEFORE = Path(__file__).parent.parent / "fixtures"


@pytest.mark.parametrize(
    "kind, folder, manifest, tensors",
    [
        (Explanation, "explanation", "manifest.json", "tensors.safetensors"),
        (Comparison, "comparison", "comparison.json", "maps.safetensors"),
    ],
)
def test_results_are_read_and_written_again_the_same(tmp_path, kind, folder, manifest, tensors):
    found = kind.load(BEFORE / folder)
    assert found.prompt == "describe the image ." and len(found.words) == 2
    assert found.note == "without checksum"
    again = found.save(tmp_path / "again")
    assert kind.load(again).note == "without checksum"  # what it held was never checked
    old, new = (json.loads((f / manifest).read_text()) for f in (BEFORE / folder, again))
    assert (old["version"], new["version"], len(new["digest"])) == (1, 5, 64)
    own = dict.fromkeys(("files", "version", "digest", "note"), 0)
    assert {**old, **own} == {**new, **own} and old["files"].keys() == new["files"].keys()
    old, new = (load_file(f / tensors) for f in (BEFORE / folder, again))
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name].nan_to_num(), new[name].nan_to_num()), name
    if kind is Comparison:
        table_of = [(f / "comparison.csv").read_bytes() for f in (BEFORE / folder, again)]
        assert table_of[0] == table_of[1]


@pytest.mark.parametrize("kind, folder", [(Explanation, "explanation"), (Comparison, "comparison")])
def test_version_2_is_read_and_says_the_same(kind, folder):
    """The same as of before, saved again when manifests had got their digest."""
    old, new = kind.load(BEFORE / folder), kind.load(BEFORE / "version2" / folder)
    assert (old.answer, old.words, old.settings) == (new.answer, new.words, new.settings)
    assert (old.note, new.note) == ("without checksum", "")
    maps = [x.maps if kind is Explanation else x.rows[0].maps for x in (old, new)]
    assert all(map(torch.equal, *maps))


def test_before_version_3_a_record_held_the_last_step_of_each_token(tmp_path):
    """In place of the tokens that each step computes."""
    found = Explanation.load(BEFORE / "version2" / "explanation")
    t, folder = found.trajectory, tmp_path / "old"
    last = torch.arange(t.tokens.shape[1])[None] % t.steps
    found.save(folder)
    tensors = load_file(folder / "tensors.safetensors") | {"final_step": last}
    save_file(tensors, folder / "tensors.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    files = hashes(f for f in folder.iterdir() if f.name != "manifest.json")
    old = {n: v for n, v in manifest.items() if n != "digest"} | {"version": 2, "files": files}
    (folder / "manifest.json").write_text(json.dumps(sealed(old)))
    back = Explanation.load(folder).trajectory
    assert torch.equal(back.final_step, last)
    assert back.reads(0, [0], 0) and not back.reads(0, [0], 1)


def test_a_store_of_version_2_is_read():
    store, old = Store.read(BEFORE / "version2" / "store"), Store.read(BEFORE / "store")
    assert store.note == "" and store.header["plan"] == old.header["plan"]
    mine = {"plan": store.digest}
    assert [{**r, **mine} for r in old.records()] == list(store.records())
    assert [{**c, **mine} for c in old.costs()] == list(store.costs())
    assert table("summary", store.folder).rows == table("summary", old.folder).rows


def test_a_preset_is_read_and_written_again_the_same(tmp_path):
    read = preset(str(BEFORE / "preset.json"))
    assert read.refinements() == Compose(FITTED) and read.score == PRESETS["default"].score
    write_preset(
        tmp_path / "preset.json",
        "default",
        PRESETS["default"],
        FITTED,
        {"seed": 3, "images": [1, "b"]},
    )
    old, new = (json.loads((f / "preset.json").read_text()) for f in (BEFORE, tmp_path))
    own = {"version": 0, "digest": 0, "backward": PRESETS["default"].backward}
    assert {**old, **own} == {**new, **own} and (old["version"], new["version"]) == (1, 4)
    assert (read.backward, preset(str(tmp_path / "preset.json")).backward) == (
        "exact",  # files of version 1 keep their meaning
        PRESETS["default"].backward,
    )


def todays(plan):
    """The record of an old plan with the setting that presets have got since."""
    for variant in plan["variants"]:
        if variant["method"] == "diffusion_cam":
            variant["settings"]["backward"] = None
    return plan


def test_a_store_is_read_and_its_plan_is_todays(tmp_path):
    store = Store.read(BEFORE / "store")
    assert Plan.from_record(store.header["plan"]) == made.plan()
    assert todays(store.header["plan"]) == made.plan().record() and not store.missing()
    assert [r["index"] for r in store.records()] == [0, 1] and store.note == "without checksum"
    made_table = table("summary", BEFORE / "store")
    assert made_table.rows and any(
        n.endswith(" Stored without checksum.") for n in made_table.notes
    )
    done = evaluate(made.plan(), tmp_path, adapter=made.adapter(), data=made.Pictures(2))
    old, new = (json.loads((f / "plan.json").read_text()) for f in (BEFORE / "store", done.folder))
    assert todays(old["plan"]) == new["plan"] and old["images"] == new["images"]
    assert old["facts"].keys() == new["facts"].keys()
    old, new = (list(Store.read(f).records()) for f in (BEFORE / "store", done.folder))
    for one, other in zip(old, new, strict=True):
        assert one.keys() == other.keys() and one["answer"] == other["answer"]
        assert one["variants"].keys() == other["variants"].keys()
        for name, variant in one["variants"].items():
            assert variant["scores"].keys() == other["variants"][name]["scores"].keys()
