"""What the site's pages are made of beside Markdown: the program's help, the API, files elsewhere.

``write`` needs no Sphinx, so that tests can look at what it makes.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = ROOT / "docs" / "made"
#: rooms of the API's pages, in their order, with what is in them
ROOMS = {
    "captum_dcam": "What `import captum_dcam` offers, and the modules beside the rooms",
    "model": "Models, requests, layouts, trajectories, the forward",
    "methods": "Methods",
    "refine": "Refinements",
    "metrics": "Metrics on tensors",
    "faithfulness": "Metrics that run the model",
    "truth": "Whether to believe a map",
    "results": "Explanations and comparisons",
    "viewer": "Pictures",
    "data": "Data sets",
    "evaluation": "Methods over data sets",
    "calibration": "Presets for a model",
    "doctor": "The doctor",
    "testing": "The conformance suite",
    "mini": "The embedded model",
}
#: what has pages of its own: the program, and the families
ELSEWHERE = ("cli", "adapters")


#: what lies outside of docs and is on the site too → its copy
COPIED = {ROOT / "CHANGELOG.md": MADE / "changelog.md"} | {
    path: MADE / "tutorials" / path.name for path in (ROOT / "tutorials").glob("*.ipynb")
}


def stated(name: str, path: str) -> str:
    """The text of an assignment ``name = "…"`` at the start of a line of a file."""
    found = re.search(rf'^{name} = "(.+)"$', (ROOT / path).read_text(encoding="utf-8"), re.M)
    assert found is not None, f'{path} has no line {name} = "…"'
    return found[1]


def modules() -> Iterator[str]:
    """Dotted names of the package's modules but for private ones."""
    for path in sorted((ROOT / "captum_dcam").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        inner = tuple(p for p in parts if p != "__init__")
        private = any(p.startswith("_") for p in inner) or inner[1:2] in ((n,) for n in ELSEWHERE)
        if not private:
            yield ".".join(inner)


def room_of(module: str) -> str:
    """The room whose page describes a module."""
    room = (*module.split("."), "")[1]
    return room if room in ROOMS else "captum_dcam"


def public_names() -> set[str]:
    """Dotted names of all public functions and classes, where they are defined."""
    found = set()
    for module in modules():
        path = ROOT.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                found.add(f"{module}.{node.name}")
    return found


def api_page(room: str) -> str:
    """The page of a room, in MyST."""
    own = [m for m in modules() if room_of(m) == room]
    lines = [f"# {room if room == 'captum_dcam' else f'captum_dcam.{room}'}", "", f"{ROOMS[room]}."]
    for module in own:
        lines += ["", f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}"]
        lines += ["   :members:", "   :ignore-module-all:", "   :show-inheritance:", "```"]
    return "\n".join(lines) + "\n"


def api_index() -> str:
    """The list of rooms."""
    named = "\n".join(f"api/{room}" for room in ROOMS)
    return (
        "# API\n\nEvery public function and class, by the room that it lives in. What a package "
        "offers by a shorter name (`captum_dcam.explain`) is described where it is defined "
        "(`captum_dcam.explaining.explain`).\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{named}\n```\n"
    )


def command_line() -> str:
    """The options of every command, from the program itself."""
    from typer.main import get_command

    from captum_dcam.cli.app import app
    from captum_dcam.cli.options import NAMES

    class Listed(dict):
        def __missing__(self, key: str) -> str:
            names = NAMES[key].all()
            return f"one of {len(names)}" if len(names) > 20 else ", ".join(names)

    lines = ["# Command line", "", "Written by the program itself (`captum-dcam COMMAND --help`)."]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += ["", f"## captum-dcam {name}", "", *(command.help or "").splitlines()]
        panels: dict[str, list[str]] = {}
        for one in command.params:
            panel = getattr(one, "rich_help_panel", None) or "General"
            panels.setdefault(panel, []).append(_row(one, Listed()))
        for panel, rows in panels.items():
            lines += ["", f"| {panel} | | Default |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _row(one: object, listed: dict[str, str]) -> str:
    """An option as a line of a table."""
    flags = [*getattr(one, "opts", ()), *getattr(one, "secondary_opts", ())]
    argument = getattr(one, "param_type_name", "") == "argument"
    named = getattr(one, "metavar", None) or flags[0] if argument else ", ".join(flags)
    text = (getattr(one, "help", None) or "").format_map(listed)
    shown = getattr(one, "show_default", True)
    value = getattr(one, "default", None)
    default = shown if isinstance(shown, str) else "" if value in (None, False, True) else value
    cells = (f"`{named}`", text, str(default))
    return "| " + " | ".join(c.replace("|", r"\|").replace("\n", " ") for c in cells) + " |"


def moved(text: str, place: Path, to: Path, repository: str) -> str:
    """Markdown with its relative links as they are from another folder; what lies outside of docs
    is the repository's."""

    def link(found: "re.Match[str]") -> str:
        path, _, anchor = found[2].partition("#")
        target = (place / path).resolve()
        if not path or not target.exists():
            return found[0]
        target = COPIED.get(target, target)
        end = f"#{anchor}" if anchor else ""
        if (ROOT / "docs") in target.parents:
            return f"{found[1]}({_relative(target, to)}{end})"
        return f"{found[1]}({repository}/blob/main/{target.relative_to(ROOT)}{end})"

    return re.sub(r"(\])\((?!\w+:)([^)\s\"]+)\)", link, text)


def _relative(target: Path, place: Path) -> str:
    up = 0
    while place not in target.parents:
        place, up = place.parent, up + 1
    return "../" * up + target.relative_to(place).as_posix()


def write(repository: str) -> None:
    """Write every generated page into :data:`MADE`, anew."""
    folder = MADE
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "api").mkdir(parents=True)
    (folder / "tutorials").mkdir()
    for room in ROOMS:
        (folder / "api" / f"{room}.md").write_text(api_page(room), encoding="utf-8")
    (folder / "api.md").write_text(api_index(), encoding="utf-8")
    (folder / "command-line.md").write_text(command_line(), encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (folder / "changelog.md").write_text(moved(changes, ROOT, folder, repository), encoding="utf-8")
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        place = folder / "tutorials"
        text = moved(path.read_text(encoding="utf-8"), path.parent, place, repository)
        (place / path.name).write_text(text, encoding="utf-8")
