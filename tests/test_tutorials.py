"""Every tutorial is stored with what it shows, and running it changes timings only: two of them run
here, and all with ``python3 start.py notebooks --check``."""

import base64
import io
import re
from importlib.metadata import version

import pytest
from PIL import Image

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
notebooks = pytest.importorskip("benchmarks.notebooks")

PATHS = {path.stem: path for path in sorted(notebooks.TUTORIALS.glob("*.ipynb"))}
#: quick ones, which between them have prints, errors, tables, displays and animations
RUN = ("01-first-explanation", "06-fill-in-and-change-words")


def test_there_are_tutorials():
    assert set(RUN) < set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_it_is_stored_with_what_it_shows(name):
    assert notebooks.faults(PATHS[name]) == []


@pytest.mark.parametrize("name", PATHS)
def test_its_links_lead_to_files(name):
    cells = nbformat.read(PATHS[name], as_version=4).cells
    texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", texts)
    assert [link for link in links if not (PATHS[name].parent / link).is_file()] == []


@pytest.fixture(scope="module")
def client():
    with notebooks.kernel() as one:
        yield one


def pinned():
    """Whether what draws and computes has the versions that tutorials are stored with."""
    lines = (notebooks.TUTORIALS.parent / "constraints.txt").read_text().splitlines()
    wanted = dict(line.partition(";")[0].strip().split("==") for line in lines if "==" in line)
    names = ("torch", "captum", "transformers", "numpy", "matplotlib", "pillow")
    return all(version(name).partition("+")[0] == wanted[name] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_running_it_changes_timings_only(name, client):
    stored = nbformat.read(PATHS[name], as_version=4)
    new = notebooks.executed(PATHS[name], client)
    assert notebooks.changes(stored, new) == [] or not pinned()


# -- the checks themselves -------------------------------------------------------------------------


def png(color=0, size=(8, 8), **how):
    file = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(file, "png", **how)
    return base64.b64encode(file.getvalue()).decode()


def display(**data):
    data = {kind.replace("_", "/"): value for kind, value in data.items()}
    return nbformat.v4.new_output("display_data", {"text/plain": "x", **data})


def printed(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def notebook(*outputs):
    cell = nbformat.v4.new_code_cell("1 + 1", outputs=list(outputs))
    return nbformat.v4.new_notebook(cells=[cell])


FAULTS = {
    "nothing": ([display(image_png=png())], ""),
    "no picture": ([printed("x")], "it has no picture"),
    "failed": ([display(image_png=png()), nbformat.v4.new_output("error", ename="E")], "failed: E"),
    "a bar": ([display(image_png=png()), printed("50%|###  |", "stderr")], "stderr: '50%"),
    "a folder": ([display(image_png=png()), printed("in /home/me/x.py:3")], "folder: /home/me/x"),
    "a folder there": ([display(image_png=png(), text_html="<a href='C:\\me'>")], "folder: C:"),
    "large": ([display(image_png=png(), text_html="x" * 1_000_000)], "bytes, more than 1,000,000"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_must_not_be_stored(case, tmp_path):
    outputs, found = FAULTS[case]
    made = notebook(*outputs)
    made.metadata[notebooks.RAN] = notebooks.code_hash(made)
    nbformat.write(made, tmp_path / "made.ipynb")
    faults = notebooks.faults(tmp_path / "made.ipynb")
    assert len(faults) == bool(found) and found in "".join(faults)


def test_changed_code_is_seen(tmp_path):
    made = notebooks.cleaned(notebook(display(image_png=png())))
    made.cells[0].source += " "
    nbformat.write(made, tmp_path / "made.ipynb")
    assert notebooks.faults(tmp_path / "made.ipynb") == ["its code has changed since it was run"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (printed("a 1.25 s, 12 words"), printed("a  0.3 s, 12 words"), True),
        (printed("{'seconds': 1.5e-3}"), printed("{'seconds': 2.25}"), True),
        (printed("F3 0.501"), printed("F3 0.502"), True),
        (printed("F3 0.501"), printed("F3 0.503"), False),
        (printed("12 words"), printed("13 words"), False),
        (printed("a moon"), printed("a heart"), False),
        (display(image_png=png(10)), display(image_png=png(12)), True),
        (display(image_png=png(10)), display(image_png=png(250)), False),
        (display(image_png=png()), display(image_png=png(size=(8, 9))), False),
        (display(image_png=png()), display(text_html="x"), False),
    ],
)
def test_what_is_alike(one, other, same):
    assert notebooks.alike([one], [other]) is same
    assert not notebooks.alike([one], [one, other])


def test_outputs_that_are_alike_stay_as_they_were(tmp_path):
    new = notebook(display(text_plain="<A at 0x1>", image_png=png()))
    nbformat.write(notebooks.cleaned(new), tmp_path / "made.ipynb")
    stored = nbformat.read(tmp_path / "made.ipynb", as_version=4)
    assert notebooks.changes(stored, new) == []
    stored, new = notebook(printed("1.25 s")), notebook(printed("0.5 s"))
    assert notebooks.changes(stored, new) == [] and new.cells[0].outputs[0].text == "1.25 s"
    new = notebook(printed("1.25 s, and more"))
    assert len(notebooks.changes(stored, new)) == 1 and "more" in new.cells[0].outputs[0].text


def test_one_view_of_a_display_is_kept():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=[500, 700])
    gif = base64.b64encode(file.getvalue()).decode()
    made = notebook(
        printed("a"),
        printed("b"),
        display(text_plain="<Image at 0x7f00>", image_png=png(), text_html="<iframe>"),
        display(image_gif=gif),
    )
    made.cells[0].metadata = {"execution": {"iopub.execute_input": "2026"}}
    text, picture, film = notebooks.cleaned(made).cells[0].outputs
    assert text.text == "ab" and not made.cells[0].metadata
    assert set(picture.data) == {"text/plain", "image/png"}
    assert picture.data["text/plain"] == "<Image>"
    moving = notebooks.opened(film.data["image/png"])
    assert moving.format == "PNG" and moving.n_frames == 2
