"""captum-dcam explain and compare over several images: a folder each, one summary; together,
videos, quiet."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from captum_dcam import Comparison, Explanation, Video
from captum_dcam.cli.app import app
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.errors import InfeasibleStepError, PictureError

pytestmark = pytest.mark.usefixtures("weights_read_once")
SHORT = ["--gen-length", "4", "-w", "nouns", "--no-trust"]


def call(*arguments: object):
    run = CliRunner().invoke(app, ["explain", *map(str, arguments)], catch_exceptions=False)
    return run.exit_code, run.stdout, run.stderr


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, name in enumerate(("a b.png", "c.png")):
        make_scene(HELD_OUT, n).image.save(folder / name)
    return folder


def test_a_folder_is_explained_image_by_image(photos, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = call(photos, "-o", out, "--json", *SHORT)
    assert code == 0 and {p.name for p in out.iterdir()} == {
        "a-b", "c", "summary.json", "explanations.json", "index.html"
    }  # fmt: skip
    told = json.loads(stdout)
    stored = json.loads((out / "summary.json").read_text())
    assert stored["explanations"] == told["explanations"] and len(told["explanations"]) == 2
    alone = tmp_path / "alone"
    code, stdout, stderr = call(photos / "c.png", "-o", alone, "--quiet", *SHORT)
    assert (code, stdout, stderr) == (0, "", "")
    one, same = (Explanation.load(p / "explanation") for p in (alone, out / "c"))
    assert one.answer == same.answer and (one.maps[0] == same.maps[0]).all()
    # what is not ours is refused before any work
    code, _, stderr = call(photos, "-o", alone, *SHORT)
    assert code == 2 and "holds the explanation of one image" in stderr
    (out / "summary.json").write_text("mine")
    assert "summary.json is none of the earlier explanations" in call(photos, "-o", out, *SHORT)[2]


def test_a_folder_is_compared_image_by_image(photos, tmp_path):
    out = tmp_path / "out"
    asked = ["compare", str(photos), "-M", "logit_lens,diffusion_cam_base", "-o", str(out)]
    done = CliRunner().invoke(app, [*asked, *SHORT[:-1], "--json"], catch_exceptions=False)
    assert done.exit_code == 0 and {p.name for p in out.iterdir()} == {
        "a-b", "c", "summary.json", "comparisons.json", "index.html"
    }  # fmt: skip
    told = json.loads(done.stdout)["comparisons"]
    for one, name in zip(told, ("a-b", "c"), strict=True):
        own = Comparison.load(out / name)
        assert (own.answer, one["output"]) == (one["answer"], str(out / name))
        assert [row.name for row in own.rows] == ["logit_lens", "diffusion_cam_base"]
    assert {"a-b/index.html", "c/index.html"} <= set((out / "index.html").read_text().split('"'))
    refused = CliRunner().invoke(app, [*asked[:-1], str(out / "c"), *SHORT[:-1]])
    assert refused.exit_code == 2 and "holds the comparison of one image" in refused.stderr


def test_a_bad_image_is_refused_before_any_work(photos, tmp_path):
    (photos / "d.png").write_text("no image")
    code, _, stderr = call(photos, "-o", tmp_path / "out", "-m", "never looked at")
    assert code == 2 and "d.png is not an image" in stderr
    assert not (tmp_path / "out").exists()


def test_what_was_explained_before_an_error_stays(photos, tmp_path, monkeypatch):
    from captum_dcam.cli import parsing

    real, asked = parsing.written, []

    def written(*given):
        asked.append(given)
        if len(asked) == 2:
            raise InfeasibleStepError("no such step")
        return real(*given)

    monkeypatch.setattr(parsing, "written", written)
    code, _, stderr = call(photos, "-o", tmp_path / "out", *SHORT)
    assert code == 2 and "c.png: no such step; 1 of 2 are done, in" in " ".join(stderr.split())
    (kept,) = json.loads((tmp_path / "out" / "summary.json").read_text())["explanations"]
    assert Explanation.load(tmp_path / "out" / "a-b" / "explanation").answer == kept["answer"]


def test_images_together_are_one_question(photos, tmp_path):
    code, stdout, _ = call(photos, "--together", "-o", tmp_path / "out", "--json", *SHORT)
    assert code == 0 and len(json.loads(stdout)["picture"].split(", ")) == 2
    assert len(Explanation.load(tmp_path / "out" / "explanation").images) == 2


def test_videos(tmp_path):
    frames = [Image.new("RGB", (8, 8), (n * 40, 0, 0)) for n in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "frames").mkdir()
    for n, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{n}.png")
    for place in (tmp_path / "clip.gif", tmp_path / "frames"):
        assert [f.getpixel((0, 0))[0] for f in Video.read(place)] == [0, 40, 80, 120, 160]
        assert [f.getpixel((0, 0))[0] for f in Video.read(place, 2)] == [0, 80]
    (tmp_path / "clip.mp4").write_bytes(bytes(range(64)))
    with pytest.raises(PictureError, match=r"ffmpeg -i clip\.mp4"):
        Video.read(tmp_path / "clip.mp4")
    code, _, stderr = call("--video", tmp_path / "clip.gif", "-o", tmp_path / "out")
    assert code == 2 and "mini takes none" in stderr
    code, _, stderr = call(tmp_path / "clip.gif", "-o", tmp_path / "out")
    assert code == 2 and "--video PATH" in stderr
