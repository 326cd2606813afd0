"""The command line: what it prints and writes, and how it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from viewer.made import picture

from captum_dcam import Explanation, __version__
from captum_dcam.cli.app import app
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.errors import PictureError
from captum_dcam.model.images import as_image
from captum_dcam.refine import registered_refinements

pytestmark = pytest.mark.usefixtures("weights_read_once")
SHORT = ["--gen-length", "4"]


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def scene_run(tmp_path_factory):
    """One run on a held-out scene, as JSON: its folder and its document."""
    folder = tmp_path_factory.mktemp("cli") / "out"
    options = ["explain", "--scene", 1, "--json", "-o", folder, *SHORT]
    run = call(*options)
    assert run.exit_code == 0, run.output
    return folder, json.loads(run.stdout)


def test_json_describes_what_was_written(scene_run):
    folder, document = scene_run
    files = [name for word in document["words"] for name in word["files"]]
    assert {p.name for p in folder.iterdir()} == {*files, "index.html", "sheet.png", "explanation"}
    assert document["output"] == str(folder)
    assert document["calls"] == 5 and document["feasible_calls"] == 1  # prefix cache, 4 steps
    loaded = Explanation.load(folder / "explanation")
    assert loaded.answer == document["answer"]
    assert [w["word"] for w in document["words"]] == list(loaded.words)
    for n, word in enumerate(document["words"]):
        assert word["number"] == n + 1 and f"word-{n + 1:02d}-" in word["files"][0]
        assert tuple(word["steps"]) == tuple(sorted(set(loaded.commit_steps()[n])))
        assert set(word["sign_check"]) == {"highlighted", "random"}
        assert word["scores"]["words"] == word["word"] and not word["scores"]["doubted"]
        assert word["scores"]["erased"] == word["sign_check"]["highlighted"]
    assert document["calibrator"]["fitted"] and "mini" in document["calibrator"]["source"]
    assert any(word["scores"]["grounded"] is not None for word in document["words"])


def test_the_scene_is_the_held_out_one_and_is_scored(scene_run):
    folder, document = scene_run
    scene = make_scene(HELD_OUT, 1)
    image = Image.open(folder / "explanation" / "image-0.png")
    assert np.array_equal(np.asarray(image), scene.pixels)
    scored = [w for w in document["words"] if w["localization"]]
    assert scored, "the answer names no object of the scene"
    for word in scored:
        assert set(word["localization"]) == {"obj_iou", "contrast", "concentration", "f3"}


def test_a_file_is_explained_for_people(tmp_path):
    file, out = tmp_path / "p.png", tmp_path / "out"
    Image.fromarray(make_scene(HELD_OUT, 1).pixels).save(file)
    options = [
        "--gen-length",
        4,
        "--refine",
        "none",
        "--cache",
        "none",
        "--layer",
        1,
        "--no-center",
    ]
    run = call("explain", file, "-o", out, *options)
    assert run.exit_code == 0, run.output
    for text in ("describe the image .", "Word", "Localises", "Is it so?", "sheet.png", str(file)):
        assert text in run.stdout
    assert "F3" not in run.stdout  # no masks are known
    settings = Explanation.load(out / "explanation").settings
    assert settings["layer"] == 1 and settings["center"] is False
    assert settings["refinements"]["stages"] == []


def test_words_and_presets_and_refinements(scene_run, tmp_path):
    words = [w["word"] for w in scene_run[1]["words"]][:2]
    options = ["--preset", "paper", "--refine", "gaussian", "--refine", "min_max", *SHORT]
    asked = [x for word in words for x in ("--words", word)]
    run = call("explain", "--scene", 1, *asked, *options, "-o", tmp_path / "out", "--json")
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert {w["word"] for w in document["words"]} == set(words)
    assert document["settings"]["score"] == "final"
    stages = document["settings"]["refinements"]["stages"]
    assert [stage["name"] for stage in stages] == ["gaussian", "min_max"]


def test_the_score_may_be_a_step(tmp_path):
    run = call("explain", "--scene", 1, "--score", "3", *SHORT, "-o", tmp_path / "out", "--json")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["settings"]["score"] == 3
    far = call("explain", "--scene", 1, "--score", 99, *SHORT, "-o", tmp_path / "far")
    assert far.exit_code == 2 and "score is 99: this generation has" in far.stderr
    assert not (tmp_path / "far").exists()


def test_a_foil_is_for_all_words_or_by_word(tmp_path):
    asked = ["explain", "--scene", 1, "-w", "nouns", *SHORT, "--json"]
    plain = json.loads(call(*asked, "-o", tmp_path / "plain").stdout)
    word = plain["words"][0]["word"]
    other = next(shape for shape in ("star", "heart") if shape != word)
    for given, foil in ((other, other), (f"{word}={other}", {word: other})):
        run = call(*asked, "--foil", given, "-o", tmp_path / "out")
        assert run.exit_code == 0, run.output
        assert json.loads(run.stdout)["settings"]["foil"] == foil
        (target, *_) = Explanation.load(tmp_path / "out" / "explanation").targets
        assert target.text == word and len(target.foil_ids) == 1
    alone = [
        call(*asked, "--foil", "star", "--foil", "ring=heart", "-o", tmp_path / "no"),
        call(*asked, "--foil", "ring=heart", "--foil", "ring=star", "-o", tmp_path / "no"),
    ]
    for run in alone:
        assert run.exit_code == 2 and "expected one text alone, or WORD=TEXT once" in run.stderr
    assert not (tmp_path / "no").exists()


def test_an_answer_may_be_given(tmp_path):
    asked = ["explain", "--scene", 1, "--answer", "a red circle", "-w", "circle"]
    run = call(*asked, "--json", "-o", tmp_path / "out")
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["answer"] == "a red circle" and document["forced"]
    shown = call(*asked, "-o", tmp_path / "out")
    assert "Given answer" in shown.stdout
    refused = {
        "--steps 4": "steps beside an answer",
        "--score 0": "score is 0: the answer is given",
    }
    for given, message in refused.items():
        no = call(*asked, *given.split(), "-o", tmp_path / "no")
        assert no.exit_code == 2 and message in no.stderr
    assert not (tmp_path / "no").exists()


def test_holes_of_an_answer_are_filled(tmp_path):
    asked = ["explain", "--scene", 1, "--steps", 4, "--answer"]
    run = call(*asked, "a [MASK] circle .", "--json", "-o", tmp_path / "out")
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["given"] == "a [MASK] circle ." and not document["forced"]
    (word,) = document["words"]
    assert word["positions"] == [1] and {g["word"] for g in word["given"]} == {"a", "circle", "."}
    refused = {"a [mask] circle": "expected [MASK]", "a <mask> [MASK]": "its mask token"}
    for answer, message in refused.items():
        no = call(*asked, answer, "-o", tmp_path / "no")
        assert no.exit_code == 2 and message in " ".join(no.stderr.split())
    assert not (tmp_path / "no").exists()


def test_every_step_is_kept_where_it_is_asked_for(tmp_path):
    asked = ["explain", "--scene", 1, *SHORT, "--every-step", "--json"]
    run = call(*asked, "-w", "nouns", "-o", tmp_path / "out")
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    kept = Explanation.load(tmp_path / "out" / "explanation").steps
    told = torch.tensor([word["every_step"] for word in document["words"]]).T
    assert torch.equal(told, kept.probabilities) and len(told) == document["steps"]
    no = call(*asked[:3], "--every-step", "--answer", "a red circle", "-o", tmp_path / "no")
    assert no.exit_code == 2 and "leave out every_step" in no.stderr
    assert not (tmp_path / "no").exists()


def test_sampling_depends_on_the_seed_alone(tmp_path):
    options = ["--temperature", 2, "--seed", 3, "--gen-length", 4]
    options += ["--steps", 2, "--block-length", 2]
    documents = [
        json.loads(call("explain", *options, "--json", "-o", tmp_path / str(i)).stdout)
        for i in range(2)
    ]
    assert documents[0]["answer"] == documents[1]["answer"]
    assert documents[0]["steps"] == 2


BAD = {
    "missing file": (["nowhere.png"], "nowhere.png: no such file"),
    "image and scene": (["p.png", "--scene", 2], "--scene"),
    "preset": (["--preset", "papre"], "did you mean 'paper'"),
    "score": (["--score", "last"], "unknown score 'last'"),
    "product": (["--product", "mean"], "unknown product"),
    "refinement": (["--refine", "gausian"], "did you mean 'gaussian'"),
    "none and more": (["--refine", "none", "--refine", "cba"], "none stands alone"),
    "nouns and more": (["--words", "nouns", "--words", "red"], "nouns stands alone"),
    "device": (["--device", "abacus"], "unknown device 'abacus'"),
    "dtype": (["--dtype", "int8"], "unknown dtype 'int8'"),
    "model": (["--model", "minni"], "did you mean 'mini'"),
    "cache": (["--cache", "half"], "cache is 'half'"),
    "layer": (["--layer", 99], "layer 99"),
    "blocks": (["--gen-length", 8, "--block-length", 3], "not a multiple of block_length 3"),
    "load": (["--load", "revision"], "--load 'revision': expected name=value"),
    "load option": (["--load", "dtype=int8"], "--load dtype=int8: give it as --dtype"),
    "load setting": (["--load", "colour=red"], "--load colour: "),
    "generation": (["--generation", "steps"], "expected name=value"),
    "generation twice": (["--steps", 4, "--generation", "steps=4"], "--steps is given too"),
    "word": (["--words", "zebra", *SHORT], "'zebra' is not in the answer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture((20, 20)).save("p.png")
    options, message = BAD[case]
    run = call("explain", *options, "--json")
    assert run.exit_code == 2 and message in run.stderr
    assert run.stdout == "" and run.stderr.strip().count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"], "something was left behind"


def test_a_missing_package_is_said_in_one_line(tmp_path, monkeypatch):
    def missing(*_args: object, **_options: object) -> None:
        raise ImportError("LaViDa's own code is needed: git clone it")

    monkeypatch.setattr("captum_dcam.model.hub.load", missing)
    run = call("explain", "-o", tmp_path / "out")
    assert run.exit_code == 2 and run.stderr.strip() == (
        "Error: LaViDa's own code is needed: git clone it"
    )


def test_what_a_models_code_prints_stays_off_stdout(tmp_path, monkeypatch):
    from captum_dcam.model import hub as model_options

    real = model_options.load

    def talkative(*args, **options):
        print("Loading vision tower")
        return real(*args, **options)

    monkeypatch.setattr(model_options, "load", talkative)
    run = call("explain", "--gen-length", 2, "-o", tmp_path / "out", "--json")
    assert json.loads(run.stdout)["answer"] and "Loading vision tower" in run.stderr


def test_settings_of_loading_and_decoding_reach_the_family(tmp_path, monkeypatch):
    from captum_dcam.model import hub as model_options

    asked = {}
    real = model_options.load

    def loaded(source, **options):
        asked.update(options)
        return real(source, cache=options["cache"])

    monkeypatch.setattr(model_options, "load", loaded)
    load = ["--load", "revision=main", "--load", "device_map=auto", "--load", "family=mini"]
    decode = ["--gen-length", 2, "--generation", "remasking=random"]
    run = call("explain", *load, *decode, "-o", tmp_path / "o")
    assert run.exit_code == 0, run.stderr
    assert asked.pop("cache") is None  # and no type: the family's own
    assert asked == {"revision": "main", "device_map": "auto", "family": "mini"}


def test_python_and_the_command_line_load_alike(tmp_path, monkeypatch):
    from captum_dcam.model import hub

    asked = []
    real = hub.load

    def loaded(source, **options):
        asked.append(options)
        return real(source, **options)

    monkeypatch.setattr(hub, "load", loaded)
    few = ("explain", "--gen-length", 2, "-w", "all")
    for more in ((), ("--dtype", "bfloat16", "--device", "cpu")):
        assert call(*few, *more, "-o", tmp_path / str(len(more))).exit_code == 0
    cpu = torch.device("cpu")
    assert asked == [
        {"device": cpu, "cache": None},
        {"device": cpu, "cache": None, "dtype": torch.bfloat16},
    ]
    assert hub.load("mini").dtype == real("mini", **asked[0]).dtype == torch.float32


def test_output_that_is_not_ours_is_refused_before_any_work(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    run = call("explain", "-o", tmp_path, "--model", "never looked at")
    assert run.exit_code == 2 and "thesis.tex" in run.stderr


def test_unwritable_output_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("captum_dcam.files.os.access", lambda *_: False)
    run = call("explain", "-o", tmp_path / "new" / "out", "--model", "never looked at")
    assert run.exit_code == 2 and f"{tmp_path} is not writable" in run.stderr
    assert not list(tmp_path.iterdir())


def test_unexpected_errors_are_not_hidden(monkeypatch, tmp_path):
    def broken(*_args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("captum_dcam.cli.explain.run", broken)
    run = CliRunner().invoke(app, ["explain", "-o", str(tmp_path / "out")])
    assert run.exit_code == 1 and isinstance(run.exception, RuntimeError)


def test_models(tmp_path):
    (mini,) = [m for m in json.loads(call("models", "--json").stdout) if m["family"] == "mini"]
    assert mini["caches"] == ["prefix", "none"] and mini["class"].endswith("MiniAdapter")
    assert mini["recommended_block"] <= mini["deepest_usable_block"] < mini["blocks"]
    run = call("models")
    assert run.exit_code == 0 and "mini" in run.stdout and "Note:" not in run.stdout
    one = call("models", "mini")
    assert "MiniAdapter" in one.stdout and "Note: trained on" in one.stdout
    assert "lavida" not in one.stdout
    wrong = call("models", "lavid")
    assert wrong.exit_code == 2 and "did you mean 'lavida'" in " ".join(wrong.stderr.split())


def test_version_and_help():
    assert call("--version").stdout.strip() == f"captum-dcam {__version__}"
    shown = CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "200"}).stdout
    for name in ("--no-trust", "--block-length", *registered_refinements()):
        assert name in shown


def test_module_runs_and_the_command_line_itself_imports_little():
    done = subprocess.run(
        [sys.executable, "-m", "captum_dcam", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("captum-dcam ")
    heavy = ("torch", "transformers", "captum", "matplotlib", "nltk", "sklearn")
    code = f"import sys, captum_dcam.cli.app; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- picture files -------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture((30, 10)).save(tmp_path / "p.jpg", exif=exif)
    assert as_image(tmp_path / "p.jpg").size == (10, 30)


def test_transparent_pixels_are_white_and_wide_greys_scaled(tmp_path):
    Image.new("RGBA", (3, 3), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert as_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    wide = torch.arange(9).view(3, 3).numpy().astype(np.uint16) * 4000
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert as_image(tmp_path / "wide.png").getpixel((2, 2)) == (125, 125, 125)  # 65535 is white


def test_broken_files_are_named(tmp_path, monkeypatch):
    whole = tmp_path / "whole.png"
    picture((200, 200)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(PictureError, match=r"cut\.png is damaged or truncated"):
        as_image(cut)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(PictureError, match=r"text\.png is not an image"):
        as_image(text)
    with pytest.raises(PictureError, match="is a folder"):
        as_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match="too large"):
        as_image(whole)
