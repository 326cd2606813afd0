r"""Run the tutorials and keep what they show.

``python3 start.py notebooks`` runs all of them, or those that are named (``05`` is enough), and
stores their outputs beside the code: whoever opens a file on a repository's host sees pictures.
Running again changes nothing but what has changed, timings left out. ``--check`` stores nothing and
says what would change.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image, ImageSequence

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
#: bytes of a stored notebook, at most
LARGEST = 1_000_000
#: of a notebook: a hash of the code that made its outputs
RAN = "ran"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
#: views of a display, the one that is kept first
VIEWS = ("image/png", "image/gif", "text/html", "text/markdown")
#: of a stored picture
COLORS = 256
#: of the tutorials' process: torch has one thread; a package of Captum's asks for one that draws
#: loading bars
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: a folder of a machine
ABSOLUTE = re.compile(r"(?<![\w.:/<-])(?:/[\w.~-]+){2,}|\b[A-Z]:\\\w")
#: seconds, as the library and the tutorials write them
TIME = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?(?= m?s\b)|(?<='seconds': )[\d.e-]+")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
#: mean difference of two pictures' pixels, of 255, from which they are not alike
ALIKE = 2.0


# -- running ---------------------------------------------------------------------------------------


@contextmanager
def kernel() -> Iterator[NotebookClient]:
    """One process for all tutorials, because imports take longest. No cell has a time limit: a
    slow machine is no fault (startup_timeout has no "none")."""
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=None,
        startup_timeout=86400,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # it warns that its ports are not encrypted
    )
    with client.setup_kernel(env={**os.environ, **QUIET}):
        yield client


def executed(path: Path, client: NotebookClient) -> NotebookNode:
    """A notebook as it is stored, after a run in an empty folder and without the names that another
    has left behind. A cell that fails is an error, and so is a file that is left behind."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        enter, leave = f"%reset -f\n%cd -q {folder}", f"%cd -q {Path(folder).parent}"
        around = [nbformat.v4.new_code_cell(source) for source in (enter, leave)]
        client.nb = nbformat.v4.new_notebook(cells=[around[0], *notebook.cells, around[1]])
        for number, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, number)
        left = sorted(file.name for file in Path(folder).iterdir())
    if left:
        raise RuntimeError(f"{path.name} left files behind: {', '.join(left)}")
    notebook.cells = client.nb.cells[1:-1]
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run, and with one view of every display."""
    notebook.metadata = nbformat.from_dict({**METADATA, RAN: code_hash(notebook)})
    for number, cell in enumerate(codes(notebook), 1):
        cell.metadata, cell.execution_count = NotebookNode(), number
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "data" in output:
                output.metadata, output.data = NotebookNode(), one_view(output.data)
    return notebook


def joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed in several parts in one, as it comes in any number."""
    found: list[NotebookNode] = []
    for output in outputs:
        before = found[-1] if found else NotebookNode()
        if "text" in output and output.get("name") == before.get("name"):
            before.text += output.text
        else:
            found.append(output)
    return found


def one_view(data: NotebookNode) -> NotebookNode:
    """Of a display the picture, else the first that there is of :data:`VIEWS`, and its text. The
    frame of an explorer is left out: hosts strip it, and it is as large as everything else."""
    found = NotebookNode({"text/plain": ADDRESS.sub("", data["text/plain"])})
    kind = next((kind for kind in VIEWS if kind in data), None)
    if kind == "image/gif":
        found["image/png"] = moving(data[kind])
    elif kind == "image/png":
        found[kind] = small(data[kind])
    elif kind is not None:
        found[kind] = data[kind]
    return found


def small(data: str) -> str:
    """A PNG, in base64, with few colours."""
    picture = opened(data)
    if picture.mode == "P":  # it has few already
        return data
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return packed(flat.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))


def moving(data: str) -> str:
    """A GIF as a PNG that moves too, with one palette: hosts of notebooks show no GIF."""
    every = ImageSequence.all_frames(opened(data))
    frames, pauses = [f.convert("RGB") for f in every], [f.info["duration"] for f in every]
    wide, high = frames[0].size
    strip = Image.new("RGB", (wide, high * len(frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * high))
    few = strip.quantize(COLORS, Image.Quantize.FASTOCTREE)
    first, *rest = (f.quantize(palette=few, dither=Image.Dither.NONE) for f in frames)
    return packed(first, save_all=True, append_images=rest, duration=pauses, loop=0)


def opened(data: str) -> Image.Image:
    """A picture from base64."""
    return Image.open(io.BytesIO(base64.b64decode(data)))


def packed(picture: Image.Image, **how: Any) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    picture.save(file, "png", optimize=True, **how)
    return base64.b64encode(file.getvalue()).decode()


def codes(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: NotebookNode) -> str:
    """Changes with the code."""
    text = "\0".join(cell.source for cell in codes(notebook))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- judging ---------------------------------------------------------------------------------------


def faults(path: Path) -> list[str]:
    """Why a stored notebook must not stay as it is."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in codes(notebook) for output in cell.outputs]
    texts = [text for output in outputs for text in texts_of(output)]
    found = []
    if notebook.metadata.get(RAN) != code_hash(notebook):
        found.append("its code has changed since it was run")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("it has no picture")
    if (size := path.stat().st_size) > LARGEST:
        found.append(f"it has {size:,} bytes, more than {LARGEST:,}")
    found += [f"a cell failed: {o.ename}" for o in outputs if o.output_type == "error"]
    found += [f"written to stderr: {o.text!r}" for o in outputs if o.get("name") == "stderr"]
    found += [f"a machine's folder: {hit[0]}" for t in texts if (hit := ABSOLUTE.search(t))]
    return found


def texts_of(output: NotebookNode) -> list[str]:
    """What of an output can be read."""
    own = [output.text] if "text" in output else []
    return own + [v for k, v in sorted(output.get("data", {}).items()) if k.startswith("text/")]


def pictures_of(output: NotebookNode) -> list[str]:
    """Its pictures, in base64."""
    return [v for k, v in sorted(output.get("data", {}).items()) if k.startswith("image/")]


def alike(one: Sequence[NotebookNode], other: Sequence[NotebookNode]) -> bool:
    """Whether two cells' outputs say and show the same, timings and a last digit left out."""
    for a, b in zip_longest(one, other, fillvalue=NotebookNode()):
        kinds = [(x.get("output_type"), x.get("name"), {*x.get("data", ())}) for x in (a, b)]
        if kinds[0] != kinds[1]:
            return False
        if not all(map(_same_text, texts_of(a), texts_of(b))):
            return False
        if not all(map(_same_picture, pictures_of(a), pictures_of(b))):
            return False
    return True


def _same_text(one: str, other: str) -> bool:
    """The same words, and numbers within 1.5 of the last digit: processors round differently."""
    texts = [" ".join(TIME.sub("…", text).split()) for text in (one, other)]
    numbers = [NUMBER.findall(text) for text in texts]
    same_words = NUMBER.sub("#", texts[0]) == NUMBER.sub("#", texts[1])
    return same_words and all(map(_near, *numbers))


def _near(one: str, other: str) -> bool:
    digits = min(len(n.partition(".")[2]) for n in (one, other))
    return one == other or (digits > 0 and abs(float(one) - float(other)) <= 1.5 * 10**-digits)


def _same_picture(one: str, other: str) -> bool:
    a, b = (opened(data).convert("RGB") for data in (one, other))
    if a.size != b.size:
        return False
    apart = np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32))
    return float(apart.mean()) <= ALIKE


def changes(stored: NotebookNode, new: NotebookNode) -> list[str]:
    """The cells of ``new`` that say or show something else than stored; of the others ``new`` gets
    the stored outputs."""
    found = []
    for old, cell in zip_longest(codes(stored), codes(new)):
        if old is None or cell is None or old.source != cell.source:
            return ["its code is another"]
        if alike(old.outputs, cell.outputs):
            cell.outputs = old.outputs
        else:
            found.append(f"cell [{cell.execution_count}] shows something else")
    return found


# -- the command -----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="start.py notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of their names. Default: all")
    parser.add_argument("--check", action="store_true", help="store nothing, say what would change")
    options = parser.parse_args()
    paths = [
        path
        for path in sorted(TUTORIALS.glob("*.ipynb"))
        if not options.names or path.name.startswith(tuple(options.names))
    ]
    if not paths:
        parser.error(f"no tutorial begins with {' or '.join(options.names)}")
    failed = False
    with kernel() as client:
        for path in paths:
            began, stored = time.monotonic(), nbformat.read(path, as_version=4)
            new = executed(path, client)
            changed = changes(stored, new)
            if not options.check:
                nbformat.write(new, path)
            said = [*changed, *faults(path)]
            failed |= bool(said) if options.check else bool(faults(path))
            size = path.stat().st_size / 1000
            print(f"{path.name}: {time.monotonic() - began:.0f} s, {size:.0f} kB", flush=True)
            print(*(f"  {line}" for line in said), sep="\n", end="\n" if said else "", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
