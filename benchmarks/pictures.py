r"""The documents' pictures of the explorer: ``python benchmarks/pictures.py`` (needs Chromium).

Writes ``docs/images/explorer.png``, ``explorer-dark.png`` (a phone) and ``answer.gif``: the
embedded model's answer to a held-out scene, every step of it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from captum_dcam import explain, load
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.results.summary import scene_masks

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: largest files, in bytes
LIMITS = {".png": 700_000, ".gif": 1_000_000}
#: picture → (width, height, what follows the page's address, dark)
SHOTS = {
    "explorer.png": (1100, 1140, "#word=3&step=5", False),
    "explorer-dark.png": (500, 1150, "#word=2&step=3", True),
}


def shot(browser: str, page: Path, file: Path, size: tuple[int, int], dark: bool) -> None:
    """What a browser shows of a page."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={width},{height}", f"--user-data-dir={folder}/profile"),
            *("--virtual-time-budget=8000", f"--screenshot={raw}"),
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        ]
        address = page.as_uri() + SHOTS[file.name][2]
        subprocess.run([browser, *options, address], check=True, capture_output=True)
        picture = Image.open(raw).convert("RGB")
    picture.save(file, optimize=True)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = IMAGES,
    scene: Annotated[int, typer.Option(help="Which held-out scene.")] = 12,
    gen_length: Annotated[int, typer.Option(help="Length of the answer.")] = 16,
) -> None:
    """Make the pictures, and refuse those that are too large."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser here: install one of {', '.join(BROWSERS)}")
    drawn = make_scene(HELD_OUT, scene)
    prompt = "describe the image ."
    found = explain(
        load("mini"), drawn.image, prompt, every_step=True, trust=True, gen_length=gen_length
    )
    found = replace(found, masks=scene_masks(found, drawn))
    output.mkdir(parents=True, exist_ok=True)
    files = [found.animate(output / "answer.gif")]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(found.to_html(Path(folder) / "page.html"))
        for name, (width, height, _, dark) in SHOTS.items():
            shot(browser, page, output / name, (width, height), dark)
            files.append(output / name)
    for file in files:
        size = file.stat().st_size
        print(f"{file.name:20} {size / 1000:7.0f} kB")
        if size > LIMITS[file.suffix]:
            raise SystemExit(f"{file} is larger than {LIMITS[file.suffix] / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
