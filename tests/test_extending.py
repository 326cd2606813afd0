"""What a user adds: a module of their own under a decorator, and no other file."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import tiny
import torch
from evaluation import made_results

import captum_dcam
from captum_dcam import adapters, compare_generation, explain_generation
from captum_dcam.data import DATASETS, dataset
from captum_dcam.data import __path__ as data_path
from captum_dcam.errors import FEW, RegistrationError, SettingError, UnknownNameError
from captum_dcam.evaluation import METRICS, Plan, evaluate
from captum_dcam.evaluation.answers import ANSWERS
from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.suites import SUITES, Part, suite
from captum_dcam.evaluation.tables import TABLES, add_tables, table
from captum_dcam.evaluation.tables import __path__ as tables_path
from captum_dcam.methods import METHODS, method, method_names
from captum_dcam.methods import __path__ as methods_path
from captum_dcam.model.adapter import ADAPTERS
from captum_dcam.model.hub import find
from captum_dcam.refine import RefineContext, refinement, registered_refinements
from captum_dcam.refine import __path__ as refine_path
from captum_dcam.refine.base import REFINEMENTS
from captum_dcam.registry import Registry, import_modules


class Addition(NamedTuple):
    """A kind of thing that users add: where it is entered, under which name, and its module."""

    registry: Registry
    name: str
    source: str


ADDITIONS = {
    "method": Addition(
        METHODS,
        "edges",
        '''
from dataclasses import dataclass
from typing import ClassVar

from captum_dcam.methods import MethodFacts, PerToken, register_method


@register_method("edges")
@dataclass(frozen=True)
class Edges(PerToken):
    """The gradient of the pixels, one number a token."""

    power: float = 1.0
    facts: ClassVar[MethodFacts] = MethodFacts(
        "Edges", "gradient", "this test", "1 + 1 back", ("gradients",)
    )

    def token(self, problem, position, token):
        pixels = problem.pixels.detach().requires_grad_()
        problem.forward(pixels, *problem.arguments(position))[0, position, token].backward()
        (h, w), = problem.shapes
        rows = pixels.grad.abs().flatten().reshape(h * w, -1).mean(1)
        return (rows.reshape(h, w) ** self.power,)
''',
    ),
    "refinement": Addition(
        REFINEMENTS,
        "power",
        '''
from dataclasses import dataclass

from captum_dcam.refine import NamedRefinement, register_refinement


@register_refinement("power")
@dataclass(frozen=True)
class Power(NamedRefinement):
    """The map to a power."""

    exponent: float = 2.0

    def __call__(self, maps, context=None):
        return maps**self.exponent
''',
    ),
    "metric": Addition(
        METRICS,
        "coverage",
        '''
from captum_dcam.evaluation import Scores, register_metric


def check(threshold):
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}: expected a share")


@register_metric("coverage", check)
def coverage(case, threshold=0.5):
    """How much of the picture lies above a share of the map's peak."""
    at = case.where("object")
    maps = case.pixels[at]
    above = maps > threshold * maps.amax((1, 2), keepdim=True)
    return Scores(case.columns(at, coverage=above.double().mean((1, 2))))
''',
    ),
    "data set": Addition(
        DATASETS,
        "shelf",
        '''
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from captum_dcam.data import BaseDataset, ObjectMask, Sample, register_dataset
from captum_dcam.data.common import Ledger


class Shelf(BaseDataset):
    """Pictures NAME.png; the left half is a NAME."""

    name = "shelf"

    def __init__(self, root, prompt):
        self.root, self.prompt = Path(root), prompt
        super().__init__(sorted(p.stem for p in self.root.glob("*.png")), Ledger("raise"), {})

    def _sample(self, image_id):
        path = self.root / f"{image_id}.png"
        with Image.open(path) as picture:
            width, height = picture.size
        mask = np.arange(width)[None].repeat(height, 0) < width // 2
        return Sample(
            image_id=image_id,
            path=path,
            height=height,
            width=width,
            captions=[f"a red {image_id} ."],
            prompt=self.prompt,
            objects=(ObjectMask(image_id, (image_id,), partial(np.copy, mask)),),
        )


@register_dataset("shelf")
def open_shelf(root, *, prompt="describe the image ."):
    return Shelf(root, prompt)
''',
    ),
}


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """All additions, entered by importing them, and taken out again."""
    folder = tmp_path_factory.mktemp("mine")
    before = {kind: one.registry.names() for kind, one in ADDITIONS.items()}
    modules: dict[str, ModuleType] = {}
    sys.path.insert(0, str(folder))
    try:
        for kind, one in ADDITIONS.items():
            name = f"my_{kind.replace(' ', '_')}"
            (folder / f"{name}.py").write_text(one.source)
            modules[kind] = importlib.import_module(name)
            assert one.name not in before[kind] and one.name in one.registry
        yield modules
    finally:
        sys.path.remove(str(folder))
        for module in modules.values():
            del sys.modules[module.__name__]
        for kind, one in ADDITIONS.items():
            if one.name in one.registry:
                one.registry.remove(one.name)
            assert one.registry.names() == before[kind]


@pytest.fixture
def shelf(tmp_path) -> Path:
    """The user's own pictures."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number, name in enumerate(("circle", "square")):
        tiny.picture(number).save(root / f"{name}.png")
    return root


def test_a_method_of_ones_own(added):
    assert "edges" in method_names()
    forward = tiny.bound("prefix")
    found = compare_generation(
        forward, [0, 3], ["edges", method("edges", power=2.0)], errors="raise"
    )
    one, two = (found.row(name).maps[0] for name in ("edges", "edges#2"))
    assert bool(one.any()) and torch.allclose(one**2, two)
    assert isinstance(method("edges"), added["method"].Edges)
    with pytest.raises(SettingError, match="method 'edges' has no setting 'pover'; it has power"):
        method("edges", pover=2.0)


def test_a_refinement_of_ones_own(added):
    assert "power" in registered_refinements()
    forward = tiny.bound("prefix")
    plain = explain_generation(forward, [0, 3], refinements=[])
    found = explain_generation(forward, [0, 3], refinements=[refinement("power", exponent=3)])
    assert torch.allclose(found.maps[0], plain.maps[0] ** 3)
    assert found.settings["refinements"]["stages"] == [{"name": "power", "exponent": 3}]
    assert refinement("power")(plain.maps[0], RefineContext()).shape == plain.maps[0].shape


def test_a_data_set_of_ones_own(added, shelf):
    data = dataset("shelf", shelf)
    assert data.ids == ("circle", "square") and data.describe()["name"] == "shelf"
    assert data.sample("circle").masks()["circle"].mean() == 0.5
    with pytest.raises(SettingError, match="data set 'shelf' needs root"):
        dataset("shelf")
    with pytest.raises(UnknownNameError, match="did you mean 'shelf'"):
        dataset("shelve", shelf)


def test_all_of_them_in_one_evaluation(added, shelf, tmp_path):
    plan = Plan(
        (
            {"name": "edges", "refinements": ["power"]},
            {"name": "flat", "method": "edges", "settings": {"power": 0.0}},
        ),
        dataset="shelf",
        metrics=("localization", {"name": "coverage", "threshold": 0.25}),
        answer="caption",
        generation={"gen_length": 4},
        limit=1,
    )
    evaluate(plan, tmp_path / "out", root=shelf, adapter=tiny.adapter("prefix"))
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert record["id"] == "circle" and [w["text"] for w in record["words"]][-1] == "circle"
    own, flat = (record["variants"][n]["scores"]["coverage"][-1] for n in ("edges", "flat"))
    assert 0 < own < 1 and flat == 1
    with pytest.raises(ValueError, match="threshold is 2: expected a share"):
        Plan(("edges",), metrics=({"name": "coverage", "threshold": 2},))


# -- a family and a command, each dropped into its folder ------------------------------------------

FAMILY = '''
from captum_dcam.adapters.mini import MiniAdapter
from captum_dcam.model.adapter import register


@register
class ToyAdapter(MiniAdapter):
    """The embedded model under another name."""

    family = "toy"

    @staticmethod
    def owns(model):
        return getattr(model, "toy", False)
'''

COMMAND = '''
import typer

from captum_dcam.cli.options import OUT, Base, command, option


class Options(Base):
    """The options of the command."""

    times: int = option(1, OUT, "How often.")


@command
def greet(options: Options) -> None:
    """Say hello."""
    typer.echo("hello " * options.times)
'''

#: a file lies in a package's folder when it is listed there
DROPPED = """
import sys
import captum_dcam.adapters, captum_dcam.cli
captum_dcam.adapters.__path__.append(sys.argv.pop(1))
captum_dcam.cli.__path__.append(sys.argv.pop(1))
"""


@pytest.fixture
def toy(tmp_path):
    """The family's file lies in the library's folder, and is taken out again."""
    (tmp_path / "toy.py").write_text(FAMILY)
    adapters.__path__.append(str(tmp_path))
    try:
        yield
    finally:
        adapters.__path__.remove(str(tmp_path))
        ADAPTERS.remove("toy")
        module = sys.modules.pop(f"{adapters.__name__}.toy")
        delattr(adapters, "toy")
        assert "toy" not in captum_dcam.families() and module.__name__ not in sys.modules


def test_a_family_of_ones_own(toy):
    model = tiny.model()
    model.toy = True
    adapter = captum_dcam.wrap(model, tiny.processor(), family="toy")
    assert {"mini", "toy"} < set(captum_dcam.families())
    assert find("toy").__name__ == "ToyAdapter"
    assert captum_dcam.load("toy").family == adapter.family == "toy"
    found = captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, [0], gen_length=4)
    assert found.settings["family"] == "toy" and bool(found.maps[0].any())


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """Runs code in a process of its own, in which both files lie in the library's folders."""
    folders = [tmp_path_factory.mktemp(name) for name in ("adapters", "cli")]
    for folder, name, source in zip(folders, ("toy", "greet"), (FAMILY, COMMAND), strict=True):
        (folder / f"{name}.py").write_text(source)

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", DROPPED + code, *map(str, folders), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_command_of_ones_own(dropped):
    code = "from captum_dcam.cli.app import main; main()"
    assert dropped(code, "greet", "--times", "2").split() == ["hello", "hello"]
    listed = dropped(code, "--help")
    assert "greet" in listed and "Say hello" in listed and "explain" in listed


# -- the registry ----------------------------------------------------------------------------------

REGISTRIES = (METHODS, REFINEMENTS, METRICS, DATASETS, SUITES, TABLES, ANSWERS, FLOORS)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_kind_says_the_same_thing_in_the_same_words(registry):
    name = registry.names()[0]
    wrong = f"{name}x".upper()
    with pytest.raises(UnknownNameError) as caught:
        registry[wrong]
    known = f"Known: {', '.join(registry.names())}"
    if len(registry) > FEW:  # the near ones are enough
        known = f"Known are {len(registry)} names, which {registry.listed}"
    expected = rf"unknown {registry.kind} '{wrong}'; did you mean '{name}'"
    assert str(caught.value).startswith(expected) and known in str(caught.value)
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, ValueError)
    with pytest.raises(SettingError, match=f"^{registry.kind} '{name}' has no setting 'zzz'; it"):
        registry.check(name, {"zzz": 1})
    with pytest.raises(RegistrationError, match=f"^{registry.kind} '{name}' belongs to .* already"):
        registry.register(name)(test_every_kind_says_the_same_thing_in_the_same_words)
    assert registry.register(name)(registry[name]) is registry[name]


def test_a_check_goes_with_its_entry():
    made: Registry = Registry("thing", given=1)

    def refuse(size):
        if size < 1:
            raise ValueError(f"size is {size}")

    def thing(case, size=1):
        return case, size

    made.register("thing", refuse)(thing)
    assert made.record("thing") == {"name": "thing", "size": 1}
    with pytest.raises(ValueError, match="size is 0"):
        made.record({"name": "thing", "size": 0})
    made.register("thing")(thing)  # the cell again, without its check
    assert made.record({"name": "thing", "size": 0})["size"] == 0
    made.remove("thing")

    @made.register("open")
    def open_thing(case, size, **more):
        return case, size, more

    assert made.record({"name": "open", "size": 2, "any": 3}) == {
        "name": "open",
        "size": 2,
        "any": 3,
    }
    with pytest.raises(SettingError, match="thing 'open' needs 'size'"):
        made.record("open")
    made.remove("open")
    assert len(made) == 0 and "thing" not in made


def test_a_file_that_is_dropped_into_a_folder_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "dropped"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("first", "second"):
        (package / f"{name}.py").write_text(f"HERE = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_modules("dropped", [str(package)])
    for name in ("first", "second"):
        assert sys.modules.pop(f"dropped.{name}").HERE == name
    del sys.modules["dropped"]


@pytest.mark.parametrize("path", [methods_path, refine_path, data_path, tables_path], ids=str)
def test_the_library_imports_every_module_of_its_own_folders(path):
    (folder,) = path
    files = [Path(file) for m in list(sys.modules.values()) if (file := getattr(m, "__file__", 0))]
    modules = {file.resolve() for file in files if file.parent.name == Path(folder).name}
    assert modules >= {p.resolve() for p in Path(folder).glob("*.py")}


# -- a table, one specification in a file ----------------------------------------------------------

SPECIFICATION = """
[tables.attention-gap]
title = "Attention and its rival"
shows = "How far attention is behind the default preset."
first = "map"
parts = ["."]
rows = [["Attention", "attention"], ["TAM", "tam"]]
columns = [
    { name = "words", count = "obj_iou" },
    { name = "Obj-IoU %", mean = "obj_iou", better = "up", factor = 100 },
    { name = "behind by", difference = "obj_iou", of = "diffusion_cam", factor = 100 },
]
notes = ["{plan[model]} on the {facts[device]}", "@failures"]
"""


@pytest.fixture
def specified(tmp_path):
    """Enters a text of specifications from a file; their names are taken out again."""
    before = set(TABLES)

    def enter(text: str, file: str = "mine.toml") -> None:
        path = tmp_path / file
        path.write_text(text, encoding="utf-8")
        add_tables(path)

    yield enter
    for name in set(TABLES) - before:
        TABLES.remove(name)


def test_a_table_of_ones_own(specified, tmp_path):
    specified(SPECIFICATION)
    plan = suite("plausibility", made_results.setting())[0].plan
    made_results.fill(tmp_path, Part(".", plan), fails=("tam",))
    found = table("attention-gap", tmp_path)
    assert [label for label, _ in found.rows] == ["Attention", "TAM"]
    frame = Frame(tmp_path)
    own, best = (frame.values(name, "obj_iou").scores for name in ("attention", "diffusion_cam"))
    assert found.cell("Attention", "words") == len(own) > 0
    assert found.cell("Attention", "Obj-IoU %").value == pytest.approx(100 * float(own.mean()))
    behind = found.cell("Attention", "behind by")
    assert behind.value == pytest.approx(100 * float((best - own).mean()))
    assert behind.low < behind.value < behind.high
    assert found.cell("TAM", "words") == 0 and found.cell("TAM", "behind by") is None
    assert found.notes == ("mini on the cpu", "TAM: 0 of 8 images (MethodError: cannot)")
    assert "Obj-IoU % ↑" in found.markdown() and "attention-gap" in TABLES.names()


def test_a_specification_says_what_is_wrong_with_it(specified):
    with pytest.raises(SettingError, match="'attention-gap': TableSpec has no 'titel'; did you m"):
        specified(SPECIFICATION.replace("title =", "titel ="))
    with pytest.raises(SettingError, match="ColumnSpec has no 'factr'; did you mean 'factor'"):
        specified(SPECIFICATION.replace("factor", "factr"))
    with pytest.raises(ValueError, match="expected one of mean, difference, count and cells"):
        specified(SPECIFICATION.replace(', count = "obj_iou"', ""))
    specified(SPECIFICATION)
    specified(SPECIFICATION)  # the same file again takes its own place
    with pytest.raises(RegistrationError, match=r"table 'attention-gap' belongs to .*mine\.toml"):
        specified(SPECIFICATION, "other.toml")
