"""Saved things that are damaged, edited, of another version or not what they should hold: one
exception type for each kind, all of them a SavedError; the file is named, and stays."""

import json
import shutil

import pytest
import tiny
import torch
from bad_input.program import lying
from evaluation import made
from safetensors.torch import load_file, save_file

import captum_dcam
from captum_dcam import Comparison, Explanation
from captum_dcam.errors import (
    ExplanationError,
    OccupiedError,
    PresetError,
    SavedError,
    StoreError,
)
from captum_dcam.evaluation import Store, evaluate
from captum_dcam.evaluation.frame import Frame
from captum_dcam.files import UNSEALED, VERSION, canonical, digest, sealed
from captum_dcam.presets import PRESETS, preset, write_preset
from captum_dcam.results.manifests import check_listed, write_listed
from captum_dcam.viewer import write_folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """One of each, by the tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    adapter, image = tiny.adapter("prefix"), tiny.picture()
    found = captum_dcam.explain(adapter, image, tiny.PROMPT, [0, 3], gen_length=6)
    found.save(folder / "explanation")
    methods = ["diffusion_cam_base", "attention"]
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[10:30, 10:30] = True
    own = {"masks": [mask, None], "gen_length": 6}
    captum_dcam.compare(adapter, image, tiny.PROMPT, [0, 3], methods, **own).save(
        folder / "comparison"
    )
    chosen = PRESETS["default"]
    write_preset(
        folder / "preset.json", "default", chosen, chosen.refinements().stages, {"seed": 0}
    )
    evaluate(made.plan(), folder / "store", adapter=adapter, data=made.Pictures(3))
    write_listed(folder / "tables", {"a.md": "a", "a.csv": "b"}, "tables")
    return folder


#: kind → its folder or file, its manifest, its tensors, its error, and what reads it
KINDS = {
    "explanation": ("manifest.json", "tensors.safetensors", ExplanationError, Explanation.load),
    "comparison": ("comparison.json", "maps.safetensors", ExplanationError, Comparison.load),
    "store": ("plan.json", None, StoreError, Frame),
    "preset.json": ("", None, PresetError, lambda path: preset(str(path))),
}


@pytest.fixture
def copied(origin, tmp_path):
    def copy(kind):
        place = tmp_path / kind
        (shutil.copytree if (origin / kind).is_dir() else shutil.copy)(origin / kind, place)
        return place

    return copy


def refused(kind, place, *says):
    """Reading is refused by the kind's error, which says this; nothing changes."""
    error, read = KINDS[kind][2:]
    before = lying(place.parent)
    with pytest.raises(SavedError) as caught:
        read(place)
    assert type(caught.value) is error
    for text in (place.name, *says):
        assert text in str(caught.value), str(caught.value)
    assert lying(place.parent) == before


def manifest(kind, place):
    return place / KINDS[kind][0] if KINDS[kind][0] else place


def edit(kind, place, change, seal=False):
    """Change a manifest; with ``seal`` its digest fits again, as if this library had written it."""
    path = manifest(kind, place)
    record = json.loads(path.read_text(encoding="utf-8"))
    record = change(record) or record
    if seal and kind == "preset.json":
        rest = {k: v for k, v in record.items() if k != "digest"}
        record = rest | {"digest": digest(canonical(rest, ascii_only=True))}
    elif seal and record.get("version") in range(UNSEALED + 1, VERSION + 1):
        record = sealed({k: v for k, v in record.items() if k != "digest"})
    path.write_text(json.dumps(record), encoding="utf-8")


# -- every kind ------------------------------------------------------------------------------------

TEXTS = {
    "empty": (b"", "not JSON"),
    "bytes": (bytes(range(256)), "not JSON"),
    "a list": (b"[]", "holds a list"),
    "a number": (b"3", "holds a int"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a long number": (b'{"version": ' + b"9" * 5000 + b"}", "not JSON"),
    "foreign": (b'{"format": "other"}', "is no"),
    "nothing": (b"{}", "is no"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TEXTS)
def test_manifests_that_are_none(copied, kind, case):
    place = copied(kind)
    content, says = TEXTS[case]
    manifest(kind, place).write_bytes(content)
    refused(kind, place, says if says != "is no" else "", manifest(kind, place).name)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_that_are_cut(copied, kind):
    place = copied(kind)
    path = manifest(kind, place)
    path.write_bytes(path.read_bytes()[:-5])
    refused(kind, place, "not JSON")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", (0, -1, 99, True, "1", 2.0, None, [2]))
def test_other_versions(copied, kind, version):
    place = copied(kind)
    edit(kind, place, lambda r: r.update(version=version))
    refused(kind, place, "format version", "update captum-dcam" if version == 99 else "expected")


EDITS = {
    "explanation": lambda r: r.update(answer="a dog"),
    "comparison": lambda r: r["methods"][0].update(label="Mine"),
    "store": lambda r: r["plan"].update(seed=3),
    "preset.json": lambda r: r["refinements"][1].update(k_base=5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_edits_by_hand(copied, kind):
    place = copied(kind)
    edit(kind, place, EDITS[kind])
    refused(kind, place, "is not what was written")


@pytest.mark.parametrize("kind", ("explanation", "comparison", "store"))
def test_a_digest_is_not_taken_away(copied, kind):
    place = copied(kind)
    edit(kind, place, lambda r: (EDITS[kind](r), r.pop("digest")) and None)
    refused(kind, place, "is not what was written")
    edit(kind, place, lambda r: r.update(version=1, digest="0" * 64))
    refused(kind, place, "is not what was written")


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_come_twice(copied, kind):
    place = copied(kind)
    path = manifest(kind, place)
    path.write_text(path.read_text().replace("{", '{"version": 2, ', 1))
    refused(kind, place, "'version' comes twice")


# -- explanations and comparisons: what they must hold ---------------------------------------------

FILES = {
    "none": {},
    "a list": [],
    "no hash": {"tensors.safetensors": None},
    "elsewhere": {"../explanation/tensors.safetensors": "0"},
    "a text": "tensors.safetensors",
}


@pytest.mark.parametrize("kind", ("explanation", "comparison"))
@pytest.mark.parametrize("version", (1, 2, 3, 4))
@pytest.mark.parametrize("case", FILES)
def test_files_of_a_manifest(copied, kind, version, case):
    place = copied(kind)
    edit(
        kind,
        place,
        lambda r: (r.pop("digest"), r.update(files=FILES[case], version=version)) and None,
        True,
    )
    refused(kind, place, "'files' is", "make the")


@pytest.mark.parametrize("kind", ("explanation", "comparison"))
@pytest.mark.parametrize("version", (1, 2, 3, 4))
def test_a_manifest_that_names_no_tensors_or_no_image(copied, kind, version):
    for name in (KINDS[kind][1], "image-0.png"):
        place = copied(kind)
        own = {"version": version}
        edit(
            kind,
            place,
            lambda r, n=name, o=own: (r["files"].pop(n), r.pop("digest"), r.update(o)) and None,
            True,
        )
        with pytest.raises(ExplanationError):
            KINDS[kind][3](place)
        shutil.rmtree(place)


def word(**change):
    return lambda r: r["targets" if "targets" in r else "words"][0].update(change)


BOTH = {
    "prompt": (lambda r: r.update(prompt=3), "prompt is 3: expected a text"),
    "answer": (lambda r: r.update(answer=None), "answer is None: expected a text"),
    "settings": (lambda r: r.update(settings=[]), "settings is []: expected a record"),
    "versions": (lambda r: r.update(versions={"torch": 2}), "version of torch is 2"),
    "no prompt": (lambda r: r.pop("prompt") and None, "KeyError('prompt')"),
    "prefix": (lambda r: r.update(prefix_length=-1), "at least 0"),
    "prefix of truth": (lambda r: r.update(prefix_length=True), "prefix_length is True"),
    "no grids": (lambda r: r.update(grids=[]), "grids"),
    "another grid": (lambda r: r.update(grids=r["grids"] * 2), "without 'grid.1.positions'"),
    "a grid of text": (lambda r: r.update(grids=["x"]), "a list of dict"),
    "image size": (lambda r: r["grids"][0].update(image_size=[60]), "image_size"),
    "another size": (lambda r: r["grids"][0].update(image_size=[61, 80]), "[61, 80] px"),
    "an image of none": (lambda r: r["grids"][0].update(image=1), "of image 1"),
    "positions": (word(positions="0"), "expected a list"),
    "no positions": (word(positions=[], token_ids=[]), "positions within"),
    "positions below 0": (word(positions=[-1]), "positions within"),
    "positions of truth": (word(positions=[True]), "a list of int"),
    "token ids": (word(token_ids=[1, 2]), "expected 1 of them"),
    "text": (word(text=None), "target 0 is None"),
}
EXPLANATION = {
    "pieces": (lambda r: r.update(pieces=r["pieces"][:-1]), "expected int64 of shape (1, 5)"),
    "pieces of numbers": (lambda r: r.update(pieces=[1] * 6), "a list of str"),
    "positions beyond": (word(positions=[6]), "its 6 tokens"),
    "a target more": (lambda r: r["targets"].append(r["targets"][0]), "tensor 'maps.0'"),
    "regime": (lambda r: r["trajectory"].update(regime="odd"), "unknown regime 'odd'"),
    "states": (lambda r: r["trajectory"].update(states=2), "without 'state.1'"),
    "no states": (lambda r: r["trajectory"].update(states=0), "at least 1"),
    "lengths": (lambda r: r["trajectory"].update(lengths=[1]), "lengths"),
    "image end": (lambda r: r["trajectory"].update(image_end="9"), "image_end"),
    "calibration": (lambda r: r["trust"].update(calibrated=1), "true or false"),
    "warning": (lambda r: r["trust"].update(warning=None), "warning of the trust is None"),
    "no candidates": (lambda r: r["trust"].update(candidates=[]), "expected 2 of them"),
    "a candidate": (lambda r: r["trust"]["candidates"][0][0].append([1, "x"]), "candidate is [1"),
    "no trust": (lambda r: r.pop("trust") and None, "KeyError('trust')"),
}
COMPARISON = {
    "status": (lambda r: r["methods"][0].update(status="well"), "one of done, partial, failed"),
    "complete": (lambda r: r["methods"][0].update(complete=[True]), "expected 2 of them"),
    "a method less": (lambda r: r["methods"].pop() and None, "scored"),
    "cost": (lambda r: r["methods"][0]["cost"].update(forwards="many"), "forwards of method 0"),
    "cost more": (lambda r: r["methods"][0]["cost"].update(euros=1), "euros"),
    "steps": (lambda r: r["words"][0].update(commit_steps=[]), "one per token"),
    "tokens": (lambda r: r["tokens"].update(pieces=[]), "of shape (0)"),
    "images": (lambda r: r.update(images=2), "names no image-1.png"),
    "masked": (lambda r: r.update(masked=1), "true or false"),
}
SCHEMA = [(kind, case) for kind in ("explanation", "comparison") for case in BOTH]
SCHEMA += [("explanation", c) for c in EXPLANATION] + [("comparison", c) for c in COMPARISON]


@pytest.mark.parametrize("kind, case", SCHEMA)
def test_what_manifests_must_hold(copied, kind, case):
    change, says = {**BOTH, **(EXPLANATION if kind == "explanation" else COMPARISON)}[case]
    place = copied(kind)
    edit(kind, place, change, seal=True)
    with pytest.raises(ExplanationError) as caught:
        KINDS[kind][3](place)
    assert says in str(caught.value) and "make" in str(caught.value), str(caught.value)


def hashed(kind, place, change):
    """Change the tensors; the manifest has their new hash."""
    path = place / KINDS[kind][1]
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    edit(kind, place, lambda r: r["files"].update({path.name: digest(path.read_bytes())}), True)


TENSORS = {
    "explanation": {
        "maps of another rank": lambda t: t.update({"maps.0": t["maps.0"][0]}),
        "maps of another shape": lambda t: t.update({"maps.0": t["maps.0"][:, :-1]}),
        "a map less": lambda t: t.update({"maps.0": t["maps.0"][:1]}),
        "whole maps": lambda t: t.update({"maps.0": t["maps.0"].long()}),
        "peaks": lambda t: t.update({"peaks.0": t["peaks.0"][None]}),
        "no peaks": lambda t: t.pop("peaks.0") is None,
        "tokens": lambda t: t.update(tokens=t["tokens"][0]),
        "tokens of floats": lambda t: t.update(tokens=t["tokens"].float()),
        "steps beyond": lambda t: t.update(commit_step=t["commit_step"] + 99),
        "confidence": lambda t: t.update(confidence=t["confidence"][:, :2]),
        "a state": lambda t: t.update({"state.0": t["state.0"][:, :, :2]}),
        "edges": lambda t: t.update({"grid.0.x_edges": t["grid.0.x_edges"][:, :1]}),
        "positions": lambda t: t.update({"grid.0.positions": t["grid.0.positions"][0]}),
        "a grid of nobody": lambda t: t.update({"grid.1.positions": torch.zeros(1, 1).long()}),
    },
    "comparison": {
        "maps of another rank": lambda t: t.update({"row.0.maps.0": t["row.0.maps.0"][0]}),
        "raw maps": lambda t: t.update({"row.1.raw.0": t["row.1.raw.0"][:, :2]}),
        "no maps": lambda t: t.pop("row.1.maps.0") is None,
        "a mask of floats": lambda t: t.update({"mask.0": t["mask.0"].float()}),
        "text": lambda t: t.update({"row.1.text": torch.zeros(3, 1)}),
        "scores": lambda t: t.update({"row.0.scores.0": torch.zeros(3)}),
        "token ids": lambda t: t.update({"tokens.ids": t["tokens.ids"][:1]}),
    },
}


@pytest.mark.parametrize("kind, case", [(k, c) for k, cases in TENSORS.items() for c in cases])
def test_what_tensors_must_be(copied, kind, case):
    place = copied(kind)
    hashed(kind, place, TENSORS[kind][case])
    with pytest.raises(ExplanationError, match="make it again"):
        KINDS[kind][3](place)


@pytest.mark.parametrize("kind", ("explanation", "comparison"))
def test_images_that_are_none(copied, kind):
    place = copied(kind)
    image = place / "image-0.png"
    image.write_bytes(b"no image")
    edit(kind, place, lambda r: r["files"].update({image.name: digest(b"no image")}), seal=True)
    refused(kind, place, "is damaged")


# -- stores ----------------------------------------------------------------------------------------

HEADERS = {
    "no plan": lambda r: r.pop("plan") and None,
    "a plan of text": lambda r: r.update(plan="x"),
    "no facts": lambda r: r.update(facts=None),
    "no images": lambda r: r.update(images=[]),
    "no count": lambda r: r["images"].pop("count") and None,
    "a count of 0": lambda r: r["images"].update(count=0),
    "a count of text": lambda r: r["images"].update(count="3"),
    "a start below 0": lambda r: r["images"].update(start=-1),
    "no shards": lambda r: r.update(shards=0),
    "shards of truth": lambda r: r.update(shards=True),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(copied, case):
    place = copied("store")
    edit("store", place, HEADERS[case], seal=True)
    refused("store", place, "plan.json is damaged: expected plan")


LINES = {
    "a digit": lambda text: text.replace(b"0.", b"1.", 1),
    "a digit of the last line": lambda text: text[::-1].replace(b".0", b".1", 1)[::-1],
    "the checksum": lambda text: text.replace(b'"sum":"', b'"sum":"0', 1),
    "no checksum": lambda text: text[: text.rindex(b',"sum"')] + b"}\n",
    "the last newline": lambda text: text[:-1] + b" ",
    "a newline within": lambda text: text.replace(b",", b"\n", 1),
    "another encoding": lambda text: text.replace(b"a", b"\xff", 1),
    "a line twice": lambda text: text + text[text[:-1].rindex(b"\n") + 1 :],
    "not JSON": lambda text: b"x" + text,
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("name", ("results-00000-of-00001.jsonl", "costs.jsonl"))
def test_lines(copied, case, name):
    place = copied("store")
    path = place / name
    path.write_bytes(LINES[case](path.read_bytes()))
    refused("store", place, name)


def test_lines_of_before_that_are_no_results(copied):
    """A store without checksums whose line lacks what every result has."""
    place = copied("store")
    edit("store", place, lambda r: (r.pop("digest"), r.update(version=1)) and None)
    for path in place.glob("*.jsonl"):
        path.unlink()
    store = Store.read(place)
    for record in (
        {"words": 3, "variants": {}},
        {"words": []},
        {"words": [{"kind": "verb"}], "variants": {}},
        {"words": [{"kind": "noun"}], "variants": {"oracle": {"scores": {}}}},
        {"words": [], "variants": {"oracle": {"status": "done", "scores": {"f3": [1.0]}}}},
        {"words": [], "variants": []},
    ):
        path = store.path("results", 0)
        path.write_bytes(store.written({"index": 0, "id": 0, **record}))
        refused("store", place, "the image with index 0 is damaged", "remove its line")


# -- presets ---------------------------------------------------------------------------------------

FIELDS = {
    "score": ("last", -1, None, []),
    "product": ("poled", True, {}),
    "center": (1, 0, "no", None, 1.0),
    "base": (3, None, []),
    "refinements": (None, 3, "cba", {}, [3], ["cba"], [{}], [{"name": 3}], [{"name": "blur"}]),
    "fitted": (None, [], "x"),
    "foo": (1,),
}


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in FIELDS.items() for v in vs], ids=str)
@pytest.mark.parametrize("sealed_", (True, False))
def test_fields_of_presets(copied, field, value, sealed_):
    place = copied("preset.json")
    change = lambda r: (r.update({field: value}), sealed_ or r.pop("digest")) and None  # noqa: E731
    edit("preset.json", place, change, seal=sealed_)
    refused("preset.json", place, "refinements" if field == "refinements" else field)


def test_a_preset_without_a_digest_is_marked(copied):
    place = copied("preset.json")
    edit("preset.json", place, lambda r: r.pop("digest") and None)
    assert preset(str(place)).source.endswith("without checksum")
    with pytest.raises(PresetError, match="was changed since it was written, and is yours"):
        write_preset(place, "default", PRESETS["default"], (), {})


# -- what is replaced ------------------------------------------------------------------------------


def test_tables_replace_tables_alone(tmp_path):
    write_listed(tmp_path, {"a.md": "1", "a.csv": "2"}, "tables")
    (tmp_path / "notes.md").write_text("mine")
    write_listed(tmp_path, {"a.md": "3", "b.md": "4"}, "tables")
    assert (tmp_path / "a.md").read_text() == "3" and (tmp_path / "notes.md").read_text() == "mine"
    assert check_listed(tmp_path, "tables").keys() == {"a.md", "a.csv", "b.md"}
    (tmp_path / "b.md").write_text("4, edited")
    for name in ("notes.md", "b.md"):
        before = lying(tmp_path)
        with pytest.raises(
            OccupiedError, match=rf"{name} is none of the earlier tables, or was changed"
        ):
            write_listed(tmp_path, {"a.md": "5", name: "5"}, "tables")
        assert lying(tmp_path) == before
    (tmp_path / "tables.json").write_text("{}")
    with pytest.raises(OccupiedError, match=r"tables\.json .*choose another folder"):
        write_listed(tmp_path, {"a.md": "5"}, "tables")


def test_a_second_output_leaves_the_users_files(origin, tmp_path):
    found = Explanation.load(origin / "explanation")
    out = write_folder(found, tmp_path / "out")
    write_folder(found, out)
    for note in (out / "explanation" / "notes.txt", out / "notes.txt", out / "word-09-mine.png"):
        note.write_text("mine")
        before = lying(tmp_path)
        with pytest.raises(OccupiedError, match=note.name):
            write_folder(found, out)
        assert lying(tmp_path) == before
        note.unlink()
    (out / "sheet.png").write_bytes(b"edited")
    with pytest.raises(OccupiedError, match=r"sheet\.png was changed since it was written"):
        write_folder(found, out)
