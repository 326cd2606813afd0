"""``captum-dcam explain`` and ``compare`` on a checkpoint's folder, in this process."""

import json

import tiny
from typer.testing import CliRunner

from captum_dcam.cli.app import app

METHODS = "diffusion_cam,diffusion_cam_paper,layer_grad_cam,tam,logit_lens,attention,cp_lrp"


def call(*arguments):
    run = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


def explained_and_compared(folder, out, prompt, *options, size=(200, 150)):
    """Both commands, every word of the answer; returns what explain printed."""
    out.mkdir(exist_ok=True)
    tiny.picture(0, size).save(out / "picture.png")
    shared = [out / "picture.png", "-p", prompt, "--model", folder, *options, "--words", "all"]
    document = call("explain", *shared, "--json", "-o", out / "explained")
    files = [f for word in document["words"] for f in word["files"]]
    assert files and all((out / "explained" / f).is_file() for f in files)
    rows = call("compare", *shared, "--json", "-o", out / "compared", "-M", METHODS)["methods"]
    assert {r["status"] for r in rows} == {"done"}, [(r["name"], r.get("note")) for r in rows]
    assert len(rows) == len(METHODS.split(","))
    return document
