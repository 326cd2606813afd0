"""captum-dcam compare-models: what it prints and writes, and how it fails."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from captum_dcam.cli.app import app
from captum_dcam.cli.compare_models import document
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.reveals import Reveals
from captum_dcam.results.model_comparison import ModelComparison
from captum_dcam.viewer.python_code import python_code

pytestmark = pytest.mark.usefixtures("weights_read_once")
FILES = {
    "index.html",
    "panel.png",
    "comparison.json",
    "comparison.csv",
    "maps.safetensors",
    "image-0.png",
}


def call(*arguments: object):
    made = ["compare-models", "--gen-length", "4", *map(str, arguments)]
    return CliRunner().invoke(app, made, catch_exceptions=False)


@pytest.fixture
def wrote(monkeypatch):
    """The families whose model wrote an answer, one after the other."""
    families, generate = [], DenoisingForward.generate

    def noted(forward, *args, **kwargs):
        families.append(forward.adapter.family)
        return generate(forward, *args, **kwargs)

    monkeypatch.setattr(DenoisingForward, "generate", noted)
    return families


def test_both_packaged_models_by_default(tmp_path, wrote):
    folder = tmp_path / "models"
    done = call("-M", "diffusion_cam_base", "-w", "circle", "-o", folder)
    assert done.exit_code == 0, done.output
    assert wrote == ["mini", "mini_ar"]  # the first one's answer and its order are of one writing
    assert {p.name for p in folder.iterdir()} == FILES
    assert f"{folder}/index.html" in done.output.replace("\n", "")
    found = ModelComparison.load(folder)
    code = python_code(found.comparison)
    assert (
        "'mini_ar': captum_dcam.load('mini_ar'" in code and "methods=['diffusion_cam_base']" in code
    )
    compile(code, "code", "exec")
    assert found.models == ("mini", "mini_ar")
    (one,) = found.agreement
    assert f"{one.rank:+.2f}" in done.output and "a pink circle ," in done.output
    # the held-out scene has masks, and both rows are scored against them
    assert all(row.scores[0] is not None for row in found.comparison.rows)
    content = json.loads(json.dumps(document((found, folder, "here")), allow_nan=False))
    assert content["agreement"] == found.records() and content["picture"] == "here"
    assert [o["model"] for o in content["orders"]] == ["mini", "mini_ar"]


def test_an_answer_that_was_written_elsewhere_is_read_once(tmp_path, wrote, monkeypatch):
    ids = tiny.tokenizer()("a pink circle", add_special_tokens=False).input_ids
    Reveals(ids, range(len(ids))).save(tmp_path / "told.json")
    read, load = [], Reveals.load
    monkeypatch.setattr(Reveals, "load", lambda path: read.append(path) or load(path))
    told = ("--reveals", str(tmp_path / "told.json"), "-w", "circle", "-o", str(tmp_path / "out"))
    done = CliRunner().invoke(app, ["compare-models", *told, "-M", "logit_lens"])
    assert done.exit_code == 0, done.output
    assert read == [tmp_path / "told.json"] and wrote == ["mini", "mini_ar"]
    found = ModelComparison.load(tmp_path / "out")
    assert found.comparison.answer == "a pink circle"
    assert found.orders[0].answer != "a pink circle"  # what the model writes by itself


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--with", "no_such"), "no_such"),
        (("--answer", "a zebra ."), "cannot spell the answer 'a zebra .'"),
        (("--score", "2"), "no denoising steps"),
        (("-M", "tamm"), "tam"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(arguments, text, tmp_path):
    done = CliRunner().invoke(app, ["compare-models", "-o", str(tmp_path / "x"), *arguments])
    assert done.exit_code == 2 and text in " ".join(done.output.split())
    assert not (tmp_path / "x").exists()
