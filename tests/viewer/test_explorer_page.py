"""The explorer's document and page: complete, strict JSON, safe, small; what is written where."""

import base64
import html
import io
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from viewer import explored
from viewer.made import made

import captum_dcam
from captum_dcam import Comparison, Explanation
from captum_dcam.data.scenes import make_scene
from captum_dcam.errors import OccupiedError
from captum_dcam.evaluation.browse import store_page
from captum_dcam.model.weights import fingerprint, identity
from captum_dcam.results.comparison import METRICS
from captum_dcam.viewer.explorer import PAGE, check_page, explorer_page, write_page
from captum_dcam.viewer.explorer_document import explorer_document
from captum_dcam.viewer.packed import packed, packed_maps, packed_mask

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEMA = Path(__file__).with_name("explorer.schema.json")


def bytes_of(one):
    raw = base64.b64decode(one["data"])
    return np.frombuffer(zlib.decompress(raw) if one["deflated"] else raw, dtype=np.uint8)


def document_in(page):
    """The JSON of a page; strict: no NaN, no infinity."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)

    def never(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=never)


RESULTS = {
    "all parts": explored.stepped,
    "tiles": explored.tiled,
    "a video": explored.filmed,
    "nothing but maps": lambda: made(3, images=2),
    "no word": lambda: made(0),
    "a comparison": lambda: Comparison.load(FIXTURES / "comparison"),
    "version 1": lambda: Explanation.load(FIXTURES / "explanation"),
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_the_document_is_as_its_schema_says(make):
    jsonschema = pytest.importorskip("jsonschema")
    result = make()
    found = document_in(explorer_page(result))
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    sizes = [len(g["x"]) * len(g["y"]) for g in found["grids"]]
    for method in found["methods"]:
        for kind in ("refined", "bare"):
            own = method[kind] and [len(bytes_of(one)) for one in method[kind]]
            assert own in (None, [len(found["words"]) * n for n in sizes])
    compile(found["python"], "code", "exec")


def test_all_that_an_explanation_has_is_in_it():
    e = explored.stepped()
    found = explorer_document(e)
    steps, words = e.steps.maps[0].shape[:2]
    shown = bytes_of(found["steps"]["maps"][0]).reshape(steps, words, *e.maps[0].shape[1:])
    for n in range(words):
        own = e.steps.maps[0][:, n]
        expected = own / own.max() * 255 if own.max() > 0 else own
        assert np.abs(shown[:, n] - expected.numpy()).max() <= 0.51
    assert found["steps"]["holds"] == [call.valid for call in e.trajectory.calls[1:]]
    for n, word in enumerate(found["words"]):
        assert word["candidates"][0][0][1] == e.trust.candidates[n][0][0].probability
        assert np.nan_to_num(found["methods"][0]["text"][n]) == pytest.approx(
            e.trust.text.values[n].nan_to_num().tolist(), rel=1e-3
        )
    assert found["steps"]["probability"][0] == pytest.approx(
        e.steps.probabilities[:, 0].tolist(), rel=1e-2
    )
    assert found["words"][0]["mask"] and set(found["methods"][0]["scores"][0]) >= {"F3"}
    assert len(found["methods"][0]["scores"][0]) == len(METRICS)


def test_what_is_wrong_stands_on_top():
    e = explored.stepped()
    e.trust.parts["signs"] = torch.tensor([[-1.0, 0.5]] + [[1.0, 0.0]] * (len(e.words) - 1))
    (warned,) = [w for w in explorer_document(e)["warnings"] if "sign check" in w]
    assert f"failed for {e.words[0]}:" in warned


@given(
    st.lists(st.floats(0, 2.0**100, width=32) | st.just(float("nan")), min_size=12, max_size=12),
    st.integers(1, 200),
)
def test_maps_are_bytes_on_the_scale_of_their_word(values, repeat):
    maps = torch.tensor(values).view(2, 2, 3).repeat(1, repeat, 1)
    (one,) = packed_maps([maps])
    shown = bytes_of(one).reshape(2, -1)
    clean = maps.nan_to_num().double().flatten(1)
    top = clean.amax(1, keepdim=True)
    expected = torch.where(top > 0, clean / top.where(top > 0, torch.ones_like(top)) * 255, 0)
    assert np.abs(shown - expected.numpy()).max() <= 0.51
    assert len(base64.b64decode(one["data"])) <= shown.size  # deflated where it pays


def test_a_mask_is_bits_row_by_row():
    mask = torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    found = packed_mask(mask)
    bits = np.unpackbits(bytes_of(found))[: mask.numel()].reshape(found["size"])
    assert np.array_equal(bits.astype(bool), mask.numpy())
    assert packed(np.arange(5))["deflated"] is False


def test_a_large_page_is_small_enough_and_does_not_deflate_in_vain():
    page = explorer_page(explored.large())
    assert len(page) <= 1_500_000
    assert not document_in(page)["steps"]["maps"][0]["deflated"]


def test_no_text_leaves_its_place():
    evil = "</script><script>alert(1)</script><!--\ud83d"
    page = explorer_page(made(2, text=evil))
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert document_in(page)["words"][0]["text"] == f"{evil}0"
    page.encode()
    for file in ("http://", "https://", "src=", "@import", "url("):
        assert file not in re.sub(r"https?://www\.w3\.org/\S+", "", page).replace("url(#hatch)", "")


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    file = tmp_path / "sub" / "page.html"
    page = explorer_page(made(1))
    assert write_page(page, file) == file and file.read_text() == page
    write_page(explorer_page(made(2)), file)
    for text in (file.read_text() + " ", file.read_text().replace("word0", "word9"), "mine"):
        file.write_text(text)
        with pytest.raises(OccupiedError, match=r"page\.html is not an earlier page"):
            check_page(file)
    assert file.read_text() == "mine"


def test_results_show_themselves(tmp_path, monkeypatch):
    e = explored.stepped()
    found = e._repr_mimebundle_()
    assert found["text/plain"] == repr(e) and len(repr(e)) < 400
    assert found["text/html"].startswith('<iframe sandbox="allow-scripts"')
    inner = re.search(r'srcdoc="([^"]*)"', found["text/html"])[1]
    assert html.unescape(inner) == e.to_html()
    Image.open(io.BytesIO(base64.b64decode(found["image/png"]))).load()
    assert len(found["text/html"]) + len(found["image/png"]) < 1_000_000
    assert e.to_html(tmp_path / "a.html").read_text() == e.to_html()
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    e.show()
    (address,) = opened
    assert Path(address.removeprefix("file://")).read_text() == e.to_html()
    comparison = Comparison.load(FIXTURES / "comparison")
    assert {"text/html", "image/png"} <= comparison._repr_mimebundle_().keys()


def test_masks_are_saved_and_loaded(tmp_path):
    e = explored.stepped()
    again = Explanation.load(e.save(tmp_path / "e"))
    assert torch.equal(again.masks[0], e.masks[0]) and again.masks[1:] == e.masks[1:]
    assert again.to_html() == e.to_html()
    assert Explanation.load(made(2).save(tmp_path / "plain")).masks is None


@pytest.mark.usefixtures("weights_read_once")
def test_rows_that_share_a_label_are_told_apart_by_their_names():
    comparison = Comparison.load(FIXTURES / "comparison")
    assert len(comparison.rows) > 1 and len({row.label for row in comparison.rows}) > 1
    first, *others = comparison.rows
    twins = [replace(first, name=f"{model}: {first.name}") for model in ("one", "other")]
    found = explorer_document(replace(comparison, rows=(*twins, *others)))
    labels = [method["label"] for method in found["methods"]]
    assert labels[:2] == [twin.name for twin in twins] and len(set(labels)) == len(labels)
    assert labels[2:] == [row.label for row in others]


def test_a_page_says_which_model_and_seed_and_its_code_makes_the_result_again(
    tmp_path, monkeypatch
):
    adapter = captum_dcam.load("mini", cache="none")
    e = captum_dcam.explain(
        adapter,
        make_scene(0, 3).image,
        "describe the image .",
        "ring",
        generator=torch.Generator().manual_seed(5),
        gen_length=4,
        temperature=0.7,
        score="final",
    )
    found = explorer_document(Explanation.load(e.save(tmp_path / "e")))
    facts = {name: value for name, value in found["facts"]}
    told = {"model": "mini", "weights": fingerprint(adapter.model), "seed": "5"}
    assert told.items() <= facts.items() and "revision" not in facts
    given = []
    monkeypatch.setattr(captum_dcam, "load", lambda *a, **k: given.append((a, k)) or adapter)
    monkeypatch.setattr(Explanation, "show", lambda self: None)
    monkeypatch.chdir(tmp_path / "e")
    scope = {}
    exec(found["python"], scope)
    assert given == [(("mini",), {"cache": "none"})]
    assert scope["result"].answer == e.answer and torch.equal(scope["result"].maps[0], e.maps[0])
    assert Path("answer.gif").read_bytes()[:3] == b"GIF"


def test_a_wrapped_models_name_and_revision_are_those_of_its_configuration():
    cached = "/home/me/.cache/hub/models--GSAI-ML--LLaDA-V/snapshots/abc123/"
    for name, commit, expected in (
        ("GSAI-ML/LLaDA-V", "abc123", ("GSAI-ML/LLaDA-V", "abc123")),
        (cached, None, ("GSAI-ML/LLaDA-V", "abc123")),
        ("", None, (None, None)),
    ):
        model = torch.nn.Linear(2, 2)
        model.config = SimpleNamespace(_name_or_path=name, _commit_hash=commit)
        found = identity(SimpleNamespace(model=model, source=None))
        assert (found["model"], found["revision"]) == expected


def test_a_store_without_its_data_set_says_so():
    page = store_page(FIXTURES / "store")
    found = document_in(page)
    assert found["warnings"] and "not the one that was measured" in found["warnings"][0]
    assert found["scores"][0] == "f3" and "dacg_route" not in found["scores"]
    assert {"base", "refined", "oracle", "random", "center_blob"} == set(found["methods"])
    assert [case["name"] for case in found["cases"]] == ["image 0", "image 1"]
    assert PAGE == "index.html"
