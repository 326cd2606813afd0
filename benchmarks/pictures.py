r"""The documents' pictures of the explorer: ``python benchmarks/pictures.py`` (needs Chromium).

Writes ``answer.gif``, every step of the embedded model's answer to a held-out scene, and what a
browser shows of pages about it: the :data:`SHOTS`. The maps of docs/GALLERY.md are made by
``gallery.py`` beside this file.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from captum_dcam import Explanation, compare, explain, load
from captum_dcam.data.scenes import HELD_OUT, make_scene, scene_mask
from captum_dcam.evaluation import Plan, evaluate
from captum_dcam.evaluation.browse import store_page
from captum_dcam.model.adapter import Adapter
from captum_dcam.refine import Affinity
from captum_dcam.results.summary import scene_masks
from captum_dcam.viewer.explorer import explorer_page

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "describe the image ."
#: largest files, in bytes
LIMITS = {".webp": 200_000, ".gif": 1_000_000}


@dataclass(frozen=True)
class Shot:
    """What is looked at: a page, the window, what follows the address, and what is done there."""

    page: str
    width: int
    height: int
    hash: str = ""
    dark: bool = False
    script: str = ""


#: the circle and what is around it, as a drag of the mouse would choose it
REGION = "set({region: {image: 0, x0: 0.12, x1: 0.44, y0: 0.42, y1: 0.72}})"
SHOTS = {
    "explorer.webp": Shot("explanation", 1100, 1180, "#word=3&step=5"),
    "explorer-dark.webp": Shot("explanation", 500, 1150, "#word=2&step=3", dark=True),
    "explorer-region.webp": Shot("explanation", 1100, 860, "#word=3&step=15", script=REGION),
    "explorer-methods.webp": Shot("comparison", 1100, 1000, "#word=1"),
    "explorer-index.webp": Shot("store", 1100, 900, "#case=1"),
}


def shot(browser: str, page: str, file: Path, how: Shot) -> None:
    """What a browser shows of a page."""
    if how.script:
        ready = f"document.body.dataset.ready ? {how.script} : setTimeout(act, 20)"
        page += f"<script>(function act() {{ {ready} }})()</script>"
    with tempfile.TemporaryDirectory() as folder:
        raw, place = Path(folder) / "raw.png", Path(folder) / "page.html"
        place.write_text(page, encoding="utf-8")
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={how.width},{how.height}", f"--user-data-dir={folder}/profile"),
            *("--virtual-time-budget=8000", f"--screenshot={raw}"),
            *(["--blink-settings=preferredColorScheme=0"] if how.dark else []),
        ]
        address = place.as_uri() + how.hash
        subprocess.run([browser, *options, address], check=True, capture_output=True)
        Image.open(raw).convert("RGB").save(file, quality=86, method=6)


def explained(adapter: Adapter, scene: int, length: int) -> Explanation:
    """A held-out scene with all that an explanation can have."""
    drawn = make_scene(HELD_OUT, scene)
    found = explain(adapter, drawn.image, PROMPT, every_step=True, trust=True, gen_length=length)
    return replace(found, masks=scene_masks(found, drawn))


def pages(adapter: Adapter, found: Explanation, scene: int, length: int) -> dict[str, str]:
    """Every page that is looked at."""
    drawn, texts = make_scene(HELD_OUT, scene), found.token_texts
    compared = compare(
        adapter,
        drawn.image,
        PROMPT,
        "nouns",
        refinements=[Affinity()],
        masks=lambda target: scene_mask(drawn, texts, target),
        gen_length=length,
    )
    plan = Plan(
        ("diffusion_cam", "diffusion_cam_base", "attention", "oracle"),
        dataset={"name": "scenes"},
        start=scene,
        limit=12,
    )
    with tempfile.TemporaryDirectory() as folder:
        evaluate(plan, Path(folder) / "results", adapter=adapter)
        store = store_page(Path(folder) / "results")
    return {
        "explanation": explorer_page(found),
        "comparison": explorer_page(compared),
        "store": store,
    }


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = IMAGES,
    scene: Annotated[int, typer.Option(help="Which held-out scene.")] = 12,
    gen_length: Annotated[int, typer.Option(help="Length of the answer.")] = 16,
) -> None:
    """Make the pictures, and refuse those that are too large."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser here: install one of {', '.join(BROWSERS)}")
    output.mkdir(parents=True, exist_ok=True)
    adapter = load("mini")
    found = explained(adapter, scene, gen_length)
    files = [found.animate(output / "answer.gif")]
    made = pages(adapter, found, scene, gen_length)
    for name, how in SHOTS.items():
        shot(browser, made[how.page], output / name, how)
        files.append(output / name)
    for file in files:
        size = file.stat().st_size
        print(f"{file.name:22} {size / 1000:7.0f} kB")
        if size > LIMITS[file.suffix]:
            raise SystemExit(f"{file} is larger than {LIMITS[file.suffix] / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
