"""The documents without Sphinx: links, anchors, examples, commands, the API's names, error texts.

``python3 start.py docs`` builds the site and makes an error of every warning.
"""

import importlib.util
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from typer.main import get_command

import captum_dcam
from captum_dcam import DenoisingForward
from captum_dcam.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "made" not in p.parts)]
)
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def named(pages):
    return {
        "argnames": "page",
        "argvalues": pages,
        "ids": [str(p.relative_to(ROOT)) for p in pages],
    }


def site():
    """The module docs/pages.py."""
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- links -----------------------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's heads, as GitHub and MyST make them."""
    found = re.findall(r"^#{1,6} (.+)$", FENCED.sub("", text), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", head.lower()) for head in found)
    return {word.replace(" ", "-") for word in words}


def test_links_lead_to_files_and_heads_that_are_there():
    broken = []
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", FENCED.sub("", text)):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() and "made" not in target.parts:
                broken.append(f"{page.name}: {link}")
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                broken.append(f"{page.name}: {link}")
    assert not broken, "\n".join(broken)


def test_every_page_is_on_the_site_and_in_the_list():
    trees = re.findall(r"```{toctree}\n(.*?)```", TEXTS[ROOT / "docs/index.md"], re.DOTALL)
    entries = {line for tree in trees for line in tree.split("\n") if line and line[0] != ":"}
    own = {
        p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in PAGES if "docs" in p.parts
    }
    entries = {e for e in entries if not e.startswith("made/")}
    shown = {page for page in own for entry in entries if fnmatch(page, entry)}
    assert own - {"README", "index"} == shown
    assert not [entry for entry in entries if "*" not in entry and entry not in own]
    listed = TEXTS[ROOT / "docs/README.md"]
    top = [name for name in own - {"README", "index"} if "/" not in name]
    assert not [name for name in top if f"({name}.md)" not in listed]


# -- examples --------------------------------------------------------------------------------------

#: pages whose Python other tests run, or that define a model of their own
ELSEWHERE = ("families", "ADAPTERS.md", "FIRST_HOUR.md", "CONTRIBUTING.md")
#: what stands in for what a reader has: a photograph, a checkpoint
SMALLER = (
    ('captum_dcam.load("mini")', "adapter"),
    ("nt_samples=2", "nt_samples=1"),
    ("nt_samples_batch_size=2", "nt_samples_batch_size=1"),
)
WITH_PYTHON = [p for p in PAGES if "```python" in TEXTS[p] and not set(ELSEWHERE) & {*p.parts}]


@pytest.fixture(scope="module")
def adapter():
    return captum_dcam.load("mini")


@pytest.mark.usefixtures("weights_read_once")
@pytest.mark.parametrize(**named(WITH_PYTHON))
def test_python_of_a_page_runs(page, adapter, tmp_path, monkeypatch):
    """All blocks of a page one after the other, with short answers."""
    generate, found = DenoisingForward.generate, captum_dcam.data.scenes.make_scene(7, 0)

    def short(self, request, **settings):
        return generate(self, request, **{"gen_length": 4, **settings})

    monkeypatch.setattr(DenoisingForward, "generate", short)
    monkeypatch.chdir(tmp_path)
    found.image.save("photo.jpg")
    given = {"adapter": adapter, "model": adapter.model, "processor": adapter.processor}
    scope = {"image": found.image, "captum_dcam": captum_dcam, "__name__": "page", **given}
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))
    before = {r: set(r) for r in site_registries()}
    try:
        for code in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL):
            for old, new in SMALLER:
                code = code.replace(old, new)
            exec(compile(code, str(page), "exec"), scope)  # what is run is our own page
    finally:
        for registry, names in before.items():
            for name in set(registry) - names:
                registry.remove(name)


def site_registries():
    from captum_dcam.data import DATASETS
    from captum_dcam.evaluation import METRICS
    from captum_dcam.methods import METHODS
    from captum_dcam.refine.base import REFINEMENTS

    return METHODS, REFINEMENTS, METRICS, DATASETS


def commands(text):
    """The lines of shell that call the program."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["captum-dcam"]:
                    yield words[1:]
                elif words[:3] == ["python3", "start.py", "explain"]:
                    yield words[2:]


def test_commands_of_the_pages_have_options_that_there_are():
    program, count = get_command(app), 0
    for page, text in TEXTS.items():
        for name, *options in commands(text):
            command = program.commands[name]
            try:
                command.make_context(name, options)
            except Exception as error:
                raise AssertionError(f"{page.name}: captum-dcam {name} {options}") from error
            count += 1
    assert count > 20


# -- what is written from the code -----------------------------------------------------------------


def test_every_public_name_has_a_place_in_the_api():
    made = site()
    described = {
        module
        for room in made.ROOMS
        for module in re.findall(r"automodule:: (\S+)", made.api_page(room))
    }
    names = made.public_names()
    assert described == set(made.modules()) and len(names) > 400
    assert {name.rpartition(".")[0] for name in names} <= described
    offered = {getattr(captum_dcam, name) for name in captum_dcam.__all__}
    assert {f"{one.__module__}.{one.__qualname__}" for one in offered} <= names


def test_the_page_of_commands_has_every_option():
    text = site().command_line()
    for name, command in get_command(app).commands.items():
        assert f"## captum-dcam {name}" in text
        for flag in (flag for one in command.params for flag in one.opts if flag[0] == "-"):
            assert flag in text, f"{name} {flag}"
    assert "{" not in text  # every list of names is filled in


def test_error_texts_of_the_troubleshooting_are_those_of_the_code():
    text = TEXTS[ROOT / "docs/TROUBLESHOOTING.md"]
    quoted = set(re.findall(r"^### `(.+)`$", text, re.MULTILINE)) - {"CUDA out of memory"}
    folders = (ROOT / "captum_dcam", ROOT / "adapters")
    sources = [p.read_text(encoding="utf-8") for f in folders for p in f.rglob("*.py")]
    whole = re.sub(r'"\s*\n\s*f?r?"', "", "\n".join(sources))
    assert len(quoted) > 15 and not [one for one in quoted if one not in whole]
