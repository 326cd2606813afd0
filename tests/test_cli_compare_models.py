"""captum-dcam compare-models: what it prints and writes, and how it fails."""

import json

import pytest
from typer.testing import CliRunner

from captum_dcam.cli.app import app
from captum_dcam.cli.compare_models import document
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


def test_both_packaged_models_by_default(tmp_path):
    folder = tmp_path / "models"
    done = call("-M", "diffusion_cam_base", "-w", "circle", "-o", folder)
    assert done.exit_code == 0, done.output
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
