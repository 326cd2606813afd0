"""Options are declared once: what typer, the help, a shell's completion and plans make of them."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from captum_dcam.cli import app as program
from captum_dcam.cli import (
    calibrate,
    compare,
    compare_models,
    doctor,
    evaluate,
    explain,
    models,
    options,
    table,
    view,
)
from captum_dcam.cli.options import COMMANDS, NAMES, OUT, Base, Command, command, flag, option
from captum_dcam.errors import SettingError, UnknownNameError

CLASSES = {m.__name__.rpartition(".")[2]: m.Options for m in (
    explain, compare, compare_models, view, models, doctor, evaluate, table, calibrate,
)}  # fmt: skip


def test_a_command_needs_no_word_elsewhere():
    class Options(Base):
        order: str = option("name", OUT, "One of {sorts}.", "--order", names="sorts", strict=True)
        deep: bool = option(False, None, "Further down.")

    seen = []

    def made(options):
        """Made by this test."""
        seen.append(options)

    made.__annotations__ = {"options": Options}
    command(made)
    try:
        app = typer.Typer()
        app.command(cls=Command)(COMMANDS["made"])
        assert CliRunner().invoke(app, ["--order", "f3", "--deep"]).exit_code == 0
        assert seen == [Options("f3", True)]
        shown = CliRunner().invoke(app, ["--help"]).stdout
        assert "f3, seconds, name" in shown and "Made by this test" in shown
        found = CliRunner().invoke(app, ["--order", "f4"])
        assert isinstance(found.exception, UnknownNameError)
    finally:
        COMMANDS.remove("made")


def test_a_field_that_is_no_option_is_refused():
    class Plain(Base):
        times: int = 1

    def plain(options):
        """Made by this test."""

    plain.__annotations__ = {"options": Plain}
    with pytest.raises(SettingError, match=r"Plain\.times is no option: declare it with option"):
        command(plain)
    assert "plain" not in COMMANDS


@pytest.mark.parametrize("name", CLASSES)
def test_typer_has_what_the_dataclass_says(name):
    shown = get_command(program.app).commands[name.replace("_", "-")]
    found = {p.name: p.default for p in shown.params}
    assert found.pop("debug") is False
    assert found == {f.name: f.default for f in fields(CLASSES[name])}
    assert set(COMMANDS) == set(CLASSES)


def test_flags_are_those_that_are_typed():
    chosen = evaluate.Options()
    assert flag(chosen, "passes") == "--budget-passes" and flag(chosen, "layer") == "--layer"
    params = get_command(program.app).commands["evaluate"].params
    for one in params:
        if one.name not in ("debug", "help"):
            assert flag(chosen, one.name) in one.opts


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if NAMES[n].closed])
def test_closed_names_are_those_that_the_library_has(name):
    assert set(NAMES[name].closed) == set(NAMES[name].kept())


def test_floors_are_those_that_an_evaluation_has():
    from captum_dcam.evaluation import FLOORS

    assert options.FLOORS == tuple(FLOORS)


@pytest.mark.parametrize(
    "name, one", [("methods", "tam"), ("metrics", "pointing"), ("tables", "comparison"),
                  ("suites", "papers"), ("refinements", "sicd"), ("presets", "paper"),
                  ("models", "GSAI-ML/LLaDA-V"), ("datasets", "coco"), ("kinds", "noun")],
)  # fmt: skip
def test_open_names_come_from_where_they_are_kept(name, one):
    assert one in NAMES[name].all() and not NAMES[name].closed
    assert one in NAMES[name].complete(one[:2])


def test_every_use_of_names_is_known():
    for kind in CLASSES.values():
        for one in fields(kind):
            text = one.metadata["typer"].help
            assert text.format_map({n: "" for n in NAMES}) is not None


@pytest.mark.parametrize(
    "begun, expected",
    [
        ("ta", {"tam", "tam_over"}),
        ("oracle,tam_", {"oracle,tam_over"}),
        ("tam:fi", {"tam:filter="}),
        ("tam:filter=5,ec", {"tam:filter=5,eci="}),
        ("nothing:", set()),
    ],
)
def test_methods_complete_with_settings_and_commas(begun, expected):
    assert set(NAMES["methods"].complete(begun)) == expected


def test_a_metric_completes_without_the_case():
    found = NAMES["metrics"].complete("pointing:")
    assert "pointing:tolerance=" in found and "pointing:case=" not in found


def test_paths_complete_beside_names(tmp_path):
    (tmp_path / "mine.json").write_text("")
    assert NAMES["presets"].complete(f"{tmp_path}/m") == [str(tmp_path / "mine.json")]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("explain --refine ga", "gaussian"),
        ("explain --dtype bf", "bfloat16"),
        ("compare --sort s", "seconds"),
        ("table compar", "comparison"),
        ("evaluate --suite pa", "papers"),
        ("calibrate --words no", "nouns"),
    ],
)
def test_a_shell_completes(words, expected):
    words = f"captum-dcam {words}"
    asked = {
        "_CAPTUM_DCAM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    found = CliRunner().invoke(program.app, [], env=asked, prog_name="captum-dcam")
    assert expected in found.stdout.split()


# -- what follows from the declaration -------------------------------------------------------------


def test_a_plan_has_every_option_of_its_name():
    from captum_dcam.evaluation import Plan
    from captum_dcam.evaluation.suites import Setting

    given = {"model": "x", "cache": "none", "dtype": "bfloat16", "prompt": "what ?", "seed": 5,
             "start": 3, "limit": 7, "threads": 2}  # fmt: skip
    chosen = evaluate.Options(
        methods=["tam"], data=["count=9"], load=["revision=main", "device_map=auto"],
        generation=["steps=4"], words=["object,noun"], answer="verbose", layer=2, passes=6,
        score="final", refine=["akd"], metrics=["pointing:tolerance=5"], **given,
    )  # fmt: skip
    plan = evaluate._plan_of_options(chosen)
    assert {name: getattr(plan, name) for name in given} == given
    assert plan.dataset == {"name": "scenes", "count": 9} and plan.load == {"revision": "main"}
    assert plan.generation == {"steps": 4} and plan.words == ("object", "noun")
    assert plan.answer["wording"] == "verbose" and plan.metrics[0]["tolerance"] == 5
    (variant,) = plan.variants
    assert (variant.layer, variant.passes, variant.score) == (2, 6, "final")
    assert [r["name"] for r in variant.refinements] == ["akd"]
    (other,) = evaluate.variants_of(evaluate.Options(methods=["diffusion_cam:score=2"], score="0"))
    assert (other.score, other.settings["score"]) == (0, 2)
    own = {"adapter": None, **evaluate._parsed(chosen)}
    assert chosen.shared(Setting, **own).keys() == inspect.signature(Setting).parameters.keys()
    assert evaluate._plan_of_options(evaluate.Options(methods=["tam"])) == Plan(("tam",))


def test_a_suite_names_the_options_that_it_brings_itself():
    from captum_dcam.errors import InputError

    chosen = evaluate.Options(suite=["papers"], words=["noun"], passes=3)
    with pytest.raises(InputError, match="its own words, budget-passes: leave out --words"):
        evaluate.parts_of(chosen, evaluate.Loaded(chosen, None))


def test_help_of_the_whole_program_imports_little():
    code = """import sys
from captum_dcam.cli.app import app
app(["--help"], standalone_mode=False)
heavy = ("torch", "transformers", "captum", "matplotlib", "nltk", "sklearn", "numpy")
print([n for n in heavy if n in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "calibrate" in done.stdout
