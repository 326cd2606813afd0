r"""The pictures of docs/GALLERY.md: one word of a scene by every method, bare and with affinity.

    python benchmarks/gallery.py

Scenes 2000 to 2005 of the held-out stream, on which nothing was chosen; of each answer the first
noun that names an object of the scene. Comparisons are kept in a folder, and drawn from there when
they are there already. Methods of 100 passes or more per token, and those that need
pytorch-grad-cam where it is not installed, are left out by name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import numpy as np
import typer
from PIL import Image
from scipy import ndimage
from torch import Tensor

from captum_dcam import Comparison, DenoisingForward, compare_generation, load
from captum_dcam.data.scenes import HELD_OUT, make_scene, scene_mask
from captum_dcam.methods import METHODS, Method, method, method_names
from captum_dcam.metrics import localization
from captum_dcam.model.words import answer_token_texts, resolve
from captum_dcam.packages import importable
from captum_dcam.refine import Affinity
from captum_dcam.viewer.ink import MUTED, Ink
from captum_dcam.viewer.overlay import MUTE, overlay, scaled

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PROMPT = "describe the image ."
#: methods of so many passes for one token are left out
TOO_MANY = 100
#: largest file, in bytes
LIMIT = 400_000
#: pixels: of the sheet, of a map, of the scene, around everything, below a map
WIDE, SIDE, SCENE, MARGIN, TEXT = 1200, 140, 220, 20, 38
COLUMNS = 4


def shown() -> tuple[list[Method], list[str]]:
    """The methods of the gallery, and why others are not in it."""
    packaged = importable("pytorch_grad_cam")
    kept, left = [], []
    for name in method_names():
        facts = METHODS[name].facts
        if int(facts.passes.split()[0]) >= TOO_MANY:
            left.append(f"{name}: {facts.passes} passes")
        elif "grad-cam" in facts.needs and not packaged:
            left.append(f"{name}: pytorch-grad-cam is not installed")
        else:
            kept.append(method(name, **({"refined": False} if name == "diffusion_cam" else {})))
    return kept, left


def compared(number: int, methods: list[Method], folder: Path) -> Comparison:
    """One word of a held-out scene by all methods; read where it was made before."""
    place = folder / f"scene-{number}"
    if place.is_dir():
        return Comparison.load(place)
    scene, adapter = make_scene(HELD_OUT, number), load("mini")
    forward = DenoisingForward(adapter)
    tokens = forward.generate(adapter.prepare([[scene.image]], [PROMPT])).tokens[0].tolist()
    texts = answer_token_texts(adapter, tokens)
    nouns = resolve(adapter, tokens, "nouns")
    word = next(w for w in nouns if scene_mask(scene, texts, w) is not None)
    found = compare_generation(
        forward,
        [word],
        methods,
        refinements=[Affinity()],
        masks=lambda target: scene_mask(scene, texts, target),
        progress=print,
    )
    found.save(place)
    return found


def thumbnail(image: Image.Image, mask: Tensor, pixels: Tensor | None, side: int) -> Image.Image:
    """The scene with a map and its object's outline."""
    picture = scaled(image, (side, side))
    if pixels is not None:
        values = Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.BILINEAR)
        picture = overlay(picture, np.asarray(values).clip(0), mute=MUTE)
    own = np.asarray(Image.fromarray(mask.numpy()).resize((side, side), Image.Resampling.NEAREST))
    drawn = np.array(picture)
    drawn[own ^ ndimage.binary_erosion(own)] = 255
    return Image.fromarray(drawn)


def sheet(comparison: Comparison, number: int) -> Image.Image:
    """All methods' maps of the word, bare and with affinity, under the scene itself."""
    assert comparison.masks is not None and comparison.masks[0] is not None
    mask, image, grid = comparison.masks[0], comparison.images[0], comparison.layout.grids[0]
    rows = [row for row in comparison.rows if row.status == "done"]
    lines = -(-len(rows) // COLUMNS)
    pitch = (WIDE - 2 * MARGIN) / COLUMNS
    ink, top = Ink(WIDE), MARGIN + SCENE + MARGIN
    page = ink.page(WIDE, top + lines * (SIDE + TEXT) + MARGIN)
    page.image.paste(thumbnail(image, mask, None, SCENE), (MARGIN, MARGIN))
    left = 2 * MARGIN + SCENE
    for k, (text, size, shade) in enumerate(
        (
            (f"“{comparison.words[0]}”", 24, (31, 35, 40)),
            (f"scene {number} of the held-out stream · {comparison.prompt}", 13, MUTED),
            (comparison.answer, 15, (31, 35, 40)),
            ("Each method: its map bare, then with affinity, each on its own scale.", 13, MUTED),
            ("F3 in per cent against the outlined pixels, bare → with affinity.", 13, MUTED),
        )
    ):
        page.write((left, MARGIN + 20 + 40 * k), text, size, shade, bold=k == 0)
    for n, row in enumerate(rows):
        x, y = MARGIN + round(n % COLUMNS * pitch), top + n // COLUMNS * (SIDE + TEXT)
        bare, refined = (grid.to_pixels(m[0].relu())[0] for m in (row.raw, row.maps))
        own = row.name == "diffusion_cam_paper"
        for k, pixels in enumerate((bare, refined)):
            page.image.paste(thumbnail(image, mask, pixels, SIDE), (x + k * (SIDE + 2), y))
        scores = [100 * float(localization(p, mask).f3) for p in (bare, refined)]
        told = f"F3 {scores[0]:.0f} → {scores[1]:.0f}" + (", its own refinements" if own else "")
        told = told if bool(bare.any()) else "flat: no token speaks for the word"
        room = pitch - 8
        label = page.clipped(f"{row.label} · {row.group}", 10.5, room)
        page.write((x, y + SIDE + 10), label, 10.5)
        page.write((x, y + SIDE + 25), told, 10, MUTED)
    return page.image


def main(
    start: Annotated[int, typer.Option(help="First scene of the held-out stream.")] = 2000,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 6,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = IMAGES,
    folder: Annotated[Path, typer.Option(help="Where comparisons are kept.")] = Path(
        "runs/gallery"
    ),
) -> None:
    """Compare, draw, and refuse pictures that are too large."""
    methods, left = shown()
    print("left out:", *left, sep="\n  ")
    for number in range(start, start + scenes):
        comparison = compared(number, methods, folder)
        for row in comparison.rows:
            if row.status != "done":
                print(f"scene {number}: {row.name} {row.status}: {row.note}")
        file = output / f"gallery-{number}.webp"
        sheet(comparison, number).save(file, quality=78, method=6)
        size = file.stat().st_size
        print(f"{file.name} {size / 1000:.0f} kB: {len(comparison.rows)} methods")
        if size > LIMIT:
            raise SystemExit(f"{file} is larger than {LIMIT / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
