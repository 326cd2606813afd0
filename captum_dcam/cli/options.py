r"""A command's options, declared once: a dataclass whose fields carry typer's declarations.

>>> @dataclass(frozen=True)
... class Options(Base):
...     times: Annotated[int, option(OUT, "How often.", "--times", "-n")] = 1
>>> @command
... def greet(options: Options) -> None:
...     "What the help says of the command."
...     print("hello " * options.times)
>>> COMMANDS["greet"](times=2, debug=False)
hello hello
>>> COMMANDS.remove("greet")

A file of this folder that enters a command in this way is all that the command needs. The names
that an option takes are in :data:`NAMES`. The files of commands import nothing heavy at their top,
so that ``--help`` and ``--version`` are quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import update_wrapper
from glob import iglob
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from captum_dcam.errors import UnknownNameError, near
from captum_dcam.registry import Registry

#: groups of options in the help, in their order
WHAT, HOW, RUN = "What to explain", "How to explain", "Running"
DECODE, OUT = "Generation", "Output"
PANELS = (None, WHAT, HOW, RUN, DECODE, OUT)
DEBUG = "CAPTUM_DCAM_DEBUG"

#: the commands by name; each takes its options as arguments by name, and no others
COMMANDS: Registry[Callable[..., None]] = Registry("command")


# -- names that options take -----------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    r"""Names that an option takes.

    Args:
        kind (str): what one of them is, for errors: ``"score"``.
        home (str): where they are kept, ``"module:attribute"``: a registry, or a function that
            lists them; imported when the names are asked for, so that the list is never outdated.
        closed (tuple of str): the names, where no others can be added: shown without importing
            ``home``; a test compares both.
        more (tuple of str): words that stand for several names or for none. Default: nothing
    """

    kind: str
    home: str
    closed: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def kept(self) -> Any:
        """What ``home`` has now: the registry, or a tuple."""
        found = resolve_name(self.home)
        return found() if callable(found) else found

    def all(self) -> tuple[str, ...]:
        """Every name, and what stands for several."""
        return (*(self.closed or self.kept()), *self.more)

    def complete(self, incomplete: str) -> list[str]:
        """The names that begin with a text, for a shell's completion."""
        return [name for name in self.all() if name.startswith(incomplete)]

    def check(self, value: Any) -> None:
        r"""Refuse a name, or one of several, that is not known; None is left to the library.

        Raises:
            UnknownNameError: with near names.
        """
        for name in [value] if isinstance(value, str) else value or ():
            if name not in self.all():
                raise UnknownNameError(f"unknown {self.kind} {name!r}{near(name, self.all())}")


class Files(Names):
    """Names, or the path of a file or folder."""

    def complete(self, incomplete: str) -> list[str]:
        """The names and paths that begin with a text."""
        paths = sorted(iglob(f"{incomplete}*")) if incomplete else []
        return super().complete(incomplete) + paths


class Settled(Names):
    """Names with settings, several with commas: ``tam:eci=false,filter=5,attention``."""

    def complete(self, incomplete: str) -> list[str]:
        """The list so far with every name or setting that may stand at its end."""
        before, comma, last = incomplete.rpartition(",")
        name, colon, begun = last.partition(":")
        if colon:
            start, known = f"{before}{comma}{name}:", []
        else:
            start, begun, known = f"{before}{comma}", last, list(self.all())
            name = before.rpartition(":")[0].rpartition(",")[2]  # whose settings came last
        registry = self.kept()
        if name in registry:
            known += [f"{setting}=" for setting in registry.settings(name)]
        return [start + one for one in known if one.startswith(begun)]


#: what evaluate takes beside methods; a test compares them with the evaluation's own
FLOORS = ("oracle", "random", "center_blob")

NAMES = {
    "datasets": Names("data set", "captum_dcam.data:dataset_names"),
    "dtypes": Names(
        "dtype", "captum_dcam.evaluation.plan:DTYPES", ("float32", "bfloat16", "float16")
    ),
    "errors": Names("policy", "captum_dcam.evaluation.harness:POLICIES", ("raise", "skip")),
    "kinds": Names("kind of word", "captum_dcam.evaluation:KINDS"),
    "methods": Settled("method", "captum_dcam.methods:METHODS", more=("quick", "all")),
    "metrics": Settled("metric", "captum_dcam.evaluation:METRICS"),
    "models": Files("model", "captum_dcam.cli.models:sources"),
    "presets": Files("preset", "captum_dcam.presets:PRESETS"),
    "products": Names(
        "product", "captum_dcam.maps:PRODUCTS", ("pooled", "positionwise", "plus_plus")
    ),
    "refinements": Names("refinement", "captum_dcam.refine:registered_refinements", more=("none",)),
    "caches": Names("cache", "captum_dcam.model.trajectory:CACHES", ("prefix", "none")),
    "scales": Names("scale", "captum_dcam.viewer.panel:SCALES", ("map", "row")),
    "scores": Names("score", "captum_dcam.model.trajectory:SCORES", ("commit", "final", "teacher")),
    "sorts": Names("order", "captum_dcam.cli.compare:SORTS", ("f3", "seconds", "name")),
    "suites": Names("suite", "captum_dcam.evaluation.suites:SUITES"),
    "tables": Names("table", "captum_dcam.evaluation.tables:TABLES", more=("all",)),
    "variants": Settled("method", "captum_dcam.methods:METHODS", more=(*FLOORS, "quick", "all")),
    "words": Names("words", "captum_dcam.cli.calibrate:WORDS", ("nouns", "all")),
}


def option(
    panel: str | None,
    text: str,
    *flags: str,
    names: str | None = None,
    default: str | bool = True,
    **more: Any,
) -> Any:
    r"""typer's declaration of an option.

    Args:
        panel (str or None): its group in the help.
        text (str): the help; ``{scores}`` becomes the names of that entry of :data:`NAMES`.
        *flags (str): ``"--output", "-o"``. Default: the field's name
        names (str, optional): key of :data:`NAMES`: what a shell completes. Default: nothing
        default (str, optional): shown for the default. Default: its value
        **more: of :func:`typer.Option`.
    """
    if names is not None:
        more["autocompletion"] = NAMES[names].complete
    return typer.Option(*flags, rich_help_panel=panel, help=text, show_default=default, **more)


def pairs(panel: str, text: str) -> Any:
    """An option that takes ``NAME=VALUE``, repeatable."""
    return option(panel, f"{text}; repeatable.", metavar="NAME=VALUE")


def words_option(default: str) -> Any:
    text = "'all', 'nouns', or a word or phrase of the answer ('red circle'); repeatable."
    return option(WHAT, text, "--words", "-w", metavar="WORDS", default=default)


def score_option(default: str) -> Any:
    return option(HOW, "State whose logits are read: {scores}.", names="scores", default=default)


def refine_option(default: str) -> Any:
    text = "Refinement of the maps, in order; repeatable: {refinements}."
    return option(HOW, text, metavar="NAME", names="refinements", default=default)


def preset_option(text: str) -> Any:
    return option(HOW, f"{text}: {{presets}}, or a file.", names="presets")


def output_option(text: str) -> Any:
    return option(OUT, text, "--output", "-o")


# -- options of several commands -------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """Options whose closed names are checked when they are made.

    A field that carries an entry of :data:`NAMES` beside typer's declaration takes no other name.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for mark in getattr(hint, "__metadata__", ()):
                if isinstance(mark, Names):
                    mark.check(getattr(self, name))

    def shared(self, call: Callable[..., Any], **own: Any) -> dict[str, Any]:
        """Arguments for a function or class: the fields that it takes by name, and ``own``."""
        taken = inspect.signature(call).parameters
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken} | own


@dataclass(frozen=True)
class Model(Base):
    """The model of every command that runs one."""

    model: Annotated[
        str,
        option(
            HOW,
            "A family or a checkpoint ({models}), a folder, or another name on the hub.",
            "--model",
            "-m",
            names="models",
        ),
    ] = "mini"
    load: Annotated[
        list[str] | None,
        pairs(
            HOW,
            "A setting of loading, such as trust_remote_code=true, device_map=auto, revision=main, "
            "family=lavida, or one of the family's own",
        ),
    ] = None
    cache: Annotated[
        str | None,
        option(
            HOW,
            "'prefix' (image and prompt computed once) or 'none' (at every step).",
            names="caches",
            default="the family's",
        ),
    ] = None
    layer: Annotated[
        int | None,
        option(
            HOW, "Block to read, from 0; a negative one counts from the end.", default="recommended"
        ),
    ] = None
    generation: Annotated[
        list[str] | None, pairs(DECODE, "A decoding setting of the family, such as steps=32")
    ] = None
    seed: Annotated[int, option(DECODE, "Of sampling.")] = 0
    dtype: Annotated[str, option(DECODE, "{dtypes}.", names="dtypes"), NAMES["dtypes"]] = "float32"
    json: Annotated[bool, option(OUT, "Print one JSON document on stdout.", "--json")] = False


DEVICE = option(DECODE, "'cpu', 'cuda', 'cuda:1', 'mps'.")


@dataclass(frozen=True)
class Answer(Model):
    """One image and the answer that is explained."""

    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            show_default=False,
            help="An image file. Without one, a held-out scene of the embedded data is drawn, and "
            "the maps are scored against its masks.",
        ),
    ] = None
    prompt: Annotated[str, option(WHAT, "The question.", "--prompt", "-p")] = "describe the image ."
    words: Annotated[list[str] | None, words_option("all")] = None
    scene: Annotated[
        int | None,
        option(WHAT, "Which held-out scene to draw when no IMAGE is given.", default="12", min=0),
    ] = None
    internal_batch_size: Annotated[
        int | None,
        option(
            HOW,
            "Number of words per backward pass: fewer need less memory.",
            default="16, or 4 without a cache",
            min=1,
        ),
    ] = None
    score: Annotated[str | None, score_option("the preset's"), NAMES["scores"]] = None
    refine: Annotated[list[str] | None, refine_option("the preset's")] = None
    gen_length: Annotated[int | None, option(DECODE, "Answer length.", default="the family's")] = (
        None
    )
    steps: Annotated[int | None, option(DECODE, "Denoising steps.", default="the family's")] = None
    block_length: Annotated[
        int | None, option(DECODE, "Tokens per semi-autoregressive block.", default="the family's")
    ] = None
    temperature: Annotated[
        float | None, option(DECODE, "Of sampling.", default="greedy", min=0)
    ] = None
    device: Annotated[str, DEVICE] = "cpu"


@dataclass(frozen=True)
class Data(Model):
    """Images of a data set."""

    dataset: Annotated[
        str,
        option(WHAT, "A data set: {datasets}.", "--dataset", "-d", names="datasets"),
        NAMES["datasets"],
    ] = "scenes"
    root: Annotated[Path | None, option(WHAT, "Folder with the data set's files.")] = None
    data: Annotated[
        list[str] | None,
        pairs(WHAT, "A setting of the data set, such as split=val2014 or missing=skip"),
    ] = None
    start: Annotated[int, option(WHAT, "First image, in the data's order.", min=0)] = 0
    limit: Annotated[int | None, option(WHAT, "Number of images.", default="all", min=1)] = None
    prompt: Annotated[
        str | None, option(WHAT, "The question.", "--prompt", "-p", default="the data's")
    ] = None
    threads: Annotated[int, option(RUN, "Of torch on the CPU; 0: as it is.", min=0)] = 1


def flag(options: Base, name: str) -> str:
    """How the command line calls a field: ``--budget-passes`` for ``passes``."""
    hint = get_type_hints(type(options), include_extras=True)[name]
    (mark,) = (m for m in hint.__metadata__ if not isinstance(m, Names))
    # typer keeps the first flag of an Annotated declaration as its default
    return str(mark.default if isinstance(mark.default, str) else f"--{name.replace('_', '-')}")


# -- a command from its options --------------------------------------------------------------------


@dataclass
class Shown:
    """How the errors of this run are shown."""

    debug: bool = False

    @classmethod
    def of(cls, context: typer.Context) -> Shown:
        """Of the whole program, whichever command is at work."""
        root = context.find_root()
        if not isinstance(root.obj, cls):
            root.obj = cls()
        return root.obj


def _debug(context: typer.Context, value: bool) -> None:
    Shown.of(context).debug |= value


def debug_option(**more: Any) -> Any:
    """``--debug``, which the program and each of its commands take."""
    text = "Show errors with their whole traceback."
    return typer.Option("--debug", help=text, callback=_debug, is_eager=True, **more)


def command(function: Callable[[Any], None]) -> Callable[[Any], None]:
    r"""Decorator: enter a command whose one argument, ``options``, is a dataclass of its options.

    The help shows the options by their groups; in each, the command's own come first.
    """
    options = get_type_hints(function)["options"]

    def call(debug: bool, **values: Any) -> None:
        function(options(**values))

    update_wrapper(call, function)
    hints = get_type_hints(options, include_extras=True)
    shared = {f.name for base in options.__bases__ if is_dataclass(base) for f in fields(base)}

    def place(field: Field[Any]) -> tuple[int, bool]:
        marks = hints[field.name].__metadata__
        panel = max(PANELS.index(getattr(m, "rich_help_panel", None)) for m in marks)
        return panel, field.name in shared

    taken = [(f.name, f.default, hints[f.name]) for f in sorted(fields(options), key=place)]
    taken.append(("debug", False, Annotated[bool, debug_option()]))
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
            )
            for name, default, hint in taken
        ]
    )
    COMMANDS.register(function.__name__)(call)
    return function


class Command(TyperCommand):
    """A command whose help lists names; they are looked up when it is shown, not before."""

    def format_help(self, *arguments: Any) -> None:
        for one in self.params:
            if text := getattr(one, "help", None):
                one.help = text.format_map(_Listed())  # type: ignore[attr-defined]
        super().format_help(*arguments)


class _Listed(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ", ".join(NAMES[key].all())
