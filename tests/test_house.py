"""The layout: which room may import from which, and how much lies in the hall."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: rooms on one floor; each imports from its own floor's same room and from the floors before
FLOORS = (
    ("errors", "checks", "packages", "registry", "files", "shown"),
    ("model", "refine"),
    ("maps", "metrics", "data", "presets"),
    ("methods", "mini"),
    ("adapters",),
    ("faithfulness", "results"),
    ("comparing", "viewer", "truth"),
    ("explaining", "attribution", "evaluation"),
    ("calibration", "testing"),
    ("doctor",),
    ("cli",),
)
#: within one floor: who may import whom
NEIGHBOURS = {
    *(
        ("registry", "checks"),
        ("checks", "errors"),
        ("registry", "errors"),
        ("packages", "errors"),
        ("files", "errors"),
        ("presets", "maps"),
        ("presets", "metrics"),
    ),
}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Dotted name → file of every module of the package, as it is installed."""
    found = {}
    for folder, package in (
        (ROOT / "captum_dcam", "captum_dcam"),
        (ROOT / "adapters", "captum_dcam.adapters"),
    ):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "captum_dcam" and "adapters" in path.relative_to(folder).parts:
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            found[name] = path
    return found


SOURCES = sources()


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for the package itself and for others' modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "captum_dcam" and len(parts) > 1 else None


@functools.cache
def imports(text: str, module: str) -> frozenset[str]:
    """Our modules that a source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join((*above, base)).rstrip(".")
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & SOURCES.keys()
            if names - SOURCES.keys():
                found.add(base)
    return frozenset(name for name in found if name.split(".")[0] == "captum_dcam")


def faults(module: str, text: str) -> list[str]:
    """Imports of a module that go up, or across."""
    own = room_of(module)
    if own is None or own.startswith("__"):
        return []
    out = []
    for name in sorted(imports(text, module)):
        other = room_of(name)
        if other is None or other == own:
            continue
        if FLOOR[other] > FLOOR[own] or (
            FLOOR[other] == FLOOR[own] and (own, other) not in NEIGHBOURS
        ):
            out.append(f"{module} imports {name}: {own} may not know {other}")
    return out


def test_imports_go_down():
    found = [fault for name, path in SOURCES.items() for fault in faults(name, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, text",
    [
        ("captum_dcam.methods.tam", "from captum_dcam.viewer import overlay"),
        ("captum_dcam.methods.tam", "def f():\n    import captum_dcam.viewer.overlay"),
        ("captum_dcam.methods.tam", "from captum_dcam import viewer"),
        ("captum_dcam.methods.tam", "from ..viewer import overlay"),
        ("captum_dcam.model.hub", "import captum_dcam.adapters"),
        ("captum_dcam.results.explanation", "from captum_dcam.viewer import overlay"),
    ],
)
def test_an_import_that_goes_up_is_found(module, text):
    assert faults(module, text)


def test_every_room_has_a_floor_and_the_hall_is_not_full():
    rooms = {room_of(name) for name in SOURCES} - {None, "__main__"}
    assert rooms == FLOOR.keys()
    assert len(list((ROOT / "captum_dcam").glob("*.py"))) <= 14


def test_no_import_circle():
    # the package itself names its public parts, and imports them when they are asked for
    inside = SOURCES.keys() - {"captum_dcam"}
    edges = {n: (imports(SOURCES[n].read_text(), n) & inside) - {n} for n in sorted(inside)}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_a_family_imports_no_other_family():
    found = []
    for module, path in SOURCES.items():
        parts = module.split(".")
        if parts[:2] != ["captum_dcam", "adapters"] or len(parts) < 3:
            continue
        allowed = {parts[2], "common"} if parts[2] != "common" else {"common"}
        for name in imports(path.read_text(), module):
            other = name.split(".")
            if (
                other[:2] == ["captum_dcam", "adapters"]
                and len(other) > 2
                and other[2] not in allowed
            ):
                found.append(f"{module} imports {name}")
    assert not found, "\n".join(found)


FAMILY_FILES = {"__init__", "adapter", "facts"}
#: the embedded model's are in captum_dcam/mini
UPSTREAM_FILES = {"decoding", "loading"}
MORE_FILES = {"packing", "compat"}
#: files of other names, each with its reason in CONTRIBUTING
OWN_FILES = {
    "autoregressive": {"gemma", "internvl", "internvl_chat", "llava", "llava_onevision", "qwen"}
}


def test_every_family_has_the_same_files():
    for folder in sorted(p for p in (ROOT / "adapters").iterdir() if (p / "__init__.py").is_file()):
        if folder.name == "common":
            continue
        names = {p.stem for p in folder.glob("*.py")}
        wanted = FAMILY_FILES | (
            UPSTREAM_FILES if folder.name not in ("mini", "mini_ar") else set()
        )
        text = (folder / "adapter.py").read_text()
        if "block import" in text:
            wanted -= {"decoding"}  # the base has it
        if "import remote\n" in text:
            wanted -= {"loading"}  # nothing in it is the family's own
        assert names >= wanted, folder.name
        assert names <= wanted | UPSTREAM_FILES | MORE_FILES | OWN_FILES.get(folder.name, set()), (
            folder.name
        )


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    return {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def registries(tree: ast.Module) -> list[str]:
    """Empty dictionaries with text as keys that a module begins with, for decorators to fill."""
    return [
        ast.unparse(node.target)
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.annotation).startswith("dict[str")
        and node.value is not None
        and ast.unparse(node.value) in ("{}", "dict()")
    ]


def test_one_registry_class(trees):
    found = [f"{name}.{one}" for name, tree in trees.items() for one in registries(tree)]
    assert not found, "use captum_dcam.registry.Registry: " + ", ".join(found)


def refuses_negative_maps(function: ast.AST) -> bool:
    """Whether a function raises for maps that are negative or not finite."""
    raised = (n for n in ast.walk(function) if isinstance(n, ast.Raise) and n.exc is not None)
    texts = [ast.unparse(n.exc).lower() for n in raised if n.exc is not None]
    return any("map" in t and ("negative" in t or "infinite" in t) for t in texts)


#: tells which settings of DiffusionCAM made the map negative, which the checker cannot know
OWN_WORDS = {"captum_dcam.attribution"}


def test_one_checker_of_maps(trees):
    found = [
        f"{name}.{node.name}"
        for name, tree in trees.items()
        if name not in OWN_WORDS
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and refuses_negative_maps(node)
    ]
    assert found == ["captum_dcam.refine.checks._check_values"]


#: the writer, and what writes to /proc alone
WRITERS = {"captum_dcam.files", "captum_dcam.methods.meter"}
CALLS = {
    *("write_text", "write_bytes", "rename", "mkdtemp", "mkstemp", "NamedTemporaryFile"),
    *("TemporaryDirectory", "save_file", "ftruncate", "truncate"),
}


def writes(tree: ast.Module) -> list[str]:
    """Calls of a module that write a file, or give one another name."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        given = [*node.args, *(k.value for k in node.keywords)]
        modes = {a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        opened = last == "open" and any(re.fullmatch(r"[rbt]*[wax+][bt+]*", m) for m in modes)
        attribute = isinstance(node.func, ast.Attribute)
        if opened or (attribute and last in CALLS) or name in ("os.replace", "os.write", "os.open"):
            found.append(f"{name}, line {node.lineno}")
    return found


def test_one_writer_of_files(trees):
    found = [
        f"{name}: {call}"
        for name, tree in trees.items()
        if name not in WRITERS
        for call in writes(tree)
    ]
    assert not found, "use captum_dcam.files: " + "; ".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "path.write_text('a')",
        "open(path, 'w')",
        "path.open(mode='ab')",
        "os.replace(a, b)",
        "source.rename(target)",
        "tempfile.mkdtemp()",
    ],
)
def test_a_second_writer_is_found(text):
    assert writes(ast.parse(text))


@pytest.mark.parametrize("text", ["write_text(path, 'a')", "open(path)", "path.open('rb')"])
def test_what_reads_is_no_writer(text):
    assert not writes(ast.parse(text))


def test_a_second_registry_and_a_second_checker_are_found():
    assert registries(ast.parse("THINGS: dict[str, type] = {}")) == ["THINGS"]
    assert not registries(ast.parse("THINGS: dict[str, type] = {'a': int}"))
    text = "def f(maps):\n    if maps.min() < 0:\n        raise ValueError(f'{maps} is negative')"
    assert refuses_negative_maps(ast.parse(text))
