"""The documents without Sphinx: links, anchors, examples, commands, the API's names, error texts.

``python3 start.py docs`` builds the site and makes an error of every warning.
"""

import importlib.util
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import browser
import pytest
from typer.main import get_command
from typer.testing import CliRunner

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
    """The words of every command: lines of shell, and code within a sentence."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for one in blocks for line in one.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:captum-dcam|python3?|make) [^`\n]+)`", FENCED.sub("", text))
    for name, value in re.findall(r"^(\w)=(\S+)", "\n".join(lines), re.MULTILINE):
        lines = [line.replace(f"${name} ", f"{value} ") for line in lines]
    for line in [*lines, *inline]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            yield from [words] if words else []


def called():
    """(page, arguments) of every call of the program."""
    for page, text in TEXTS.items():
        for words in commands(text):
            if words[0] == "captum-dcam" and words[1][0] != "-":
                yield page, words[1:]
            elif words[:3] == ["python3", "start.py", "explain"]:
                yield page, words[2:]


def test_commands_of_the_pages_have_options_that_there_are():
    program, count = get_command(app), 0
    for page, (name, *options) in called():
        command = program.commands[name]
        try:
            command.make_context(name, options)
        except Exception as error:
            raise AssertionError(f"{page.name}: captum-dcam {name} {options}") from error
        count += 1
    assert count > 60


#: what looks things up, and computes nothing
LOOKED_UP = ("models", "--list", "--list-methods", "--help")


@pytest.mark.parametrize(
    "arguments",
    sorted({tuple(a) for _, a in called() if {*a} & {*LOOKED_UP} and a[-1] != "NAME"}),
    ids=" ".join,
)
def test_commands_that_look_up_run(arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and len(done.output.splitlines()) > 3, done.output


def test_other_commands_of_the_pages_are_there():
    """Scripts with their options, checks by their names, targets of make."""
    start = (ROOT / "start.py").read_text(encoding="utf-8")
    known = re.search(r"^COMMANDS = \[(.*)\]$", start, re.MULTILINE)[1]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    count = 0
    for page, text in TEXTS.items():
        for words in commands(text):
            call = f"{page.name}: {' '.join(words)}"
            if words[0] == "make":
                assert f"\n{words[1]}:" in targets, call
            elif words[0] in ("python", "python3") and words[1] != "-m":
                script = (ROOT / words[1]).read_text(encoding="utf-8")
                assert words[1] != "start.py" or f'"{words[2]}"' in known, call
                if words[1] == "benchmarks/maps.py":  # its tables are a file of their own
                    script += (ROOT / "benchmarks/maps_tables.py").read_text(encoding="utf-8")
                if words[1] == "start.py":  # what it does not know goes on
                    script += (ROOT / "benchmarks/matrix.py").read_text(encoding="utf-8")
                    script += (ROOT / "benchmarks/referees.py").read_text(encoding="utf-8")
                for flag in (w for w in words[2:] if w[:2] == "--" and words[2] != "explain"):
                    name = flag[2:].replace("-", "_")
                    assert re.search(rf"\b{name}: |\"{flag}\"", script), f"{call}: no {flag}"
                count += 1
            elif words[0] in ("python", "python3"):
                assert importlib.util.find_spec(words[2]) is not None, call
    assert count > 30


@pytest.fixture
def sortable(tmp_path):
    """A page with a table and the site's script, in a browser."""
    rows = (("b", "9.5 [9, 10]", "1×"), ("a", "–", "0.66×"), ("c", "84.8 [83, 85]", "12×"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    script = (ROOT / "docs/_static/sort.js").read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(
        f"<body><script>{script}; onload = () => (document.body.dataset.ready = 'yes')</script>"
        "<article><table><thead><tr><th>method<th>F3<th>time</tr></thead>"
        f"<tbody>{body}</tbody></table></article>"
    )
    with browser.browser() as one:
        one.page(page)
        yield one
        assert one.faults() == []


def test_tables_of_the_site_sort_by_a_click(sortable):
    def order():
        return sortable.js("[...document.querySelectorAll('td:first-child')].map(e => e.innerText)")

    assert order() == ["b", "a", "c"]
    for column, up, down in ((0, "abc", "cba"), (1, "bca", "cba"), (2, "abc", "cba")):
        sortable.click("th", number=column)
        assert order() == list(up)
        sortable.click("th", number=column)
        assert order() == list(down)
    sortable.js("document.querySelectorAll('th')[0].focus()")
    sortable.key("Enter")
    assert order() == ["a", "b", "c"]
    heads = "[...document.querySelectorAll('th')].map(e => e.ariaSort)"
    assert sortable.js(heads) == ["ascending", "none", "none"]


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
