r"""A command's options, declared once: a dataclass whose fields carry typer's declarations.

>>> class Options(Base):
...     times: int = option(1, OUT, "How often.", "--times", "-n")
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
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cached_property, update_wrapper
from glob import iglob
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand
from typing_extensions import dataclass_transform

from captum_dcam import checks
from captum_dcam.errors import InputError, SettingError, UnknownNameError, near
from captum_dcam.registry import Registry

if TYPE_CHECKING:
    from captum_dcam.model.answers import AnswerLike

T = TypeVar("T")

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
            if name not in self.all() and (self.closed or name not in self.kept()):
                listed = getattr(self.kept(), "listed", "")
                hint = near(name, self.all(), listed)
                raise UnknownNameError(f"unknown {self.kind} {name!r}{hint}")


class Files(Names):
    """Names, or the path of a file or folder."""

    def complete(self, incomplete: str) -> list[str]:
        """The names and paths that begin with a text."""
        paths = sorted(iglob(f"{incomplete}*")) if incomplete else []
        return super().complete(incomplete) + paths


class Numbered(Names):
    """Names, or a whole number."""

    def check(self, value: Any) -> None:
        """Refuse what is neither, as for other names."""
        if as_number(value) is None:
            super().check(value)


def as_number(text: str | None) -> int | None:
    """The whole number that a text writes; None for another text or none."""
    try:
        return int(text or "")
    except ValueError:
        return None


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
    "backwards": Names(
        "way through norms", "captum_dcam.model.norms:BACKWARDS", ("exact", "constant_norms")
    ),
    "datasets": Names("data set", "captum_dcam.data:dataset_names"),
    "dtypes": Names(
        "dtype", "captum_dcam.evaluation.plan:DTYPES", ("float32", "bfloat16", "float16")
    ),
    "errors": Names("policy", "captum_dcam.evaluation.harness:POLICIES", ("raise", "skip")),
    "families": Names("model family", "captum_dcam.cli.models:families"),
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
    "scores": Numbered(
        "score", "captum_dcam.model.trajectory:SCORES", ("commit", "final", "teacher")
    ),
    "sorts": Names("order", "captum_dcam.cli.compare:SORTS", ("f3", "seconds", "name")),
    "suites": Names("suite", "captum_dcam.evaluation.suites:SUITES"),
    "taggers": Names("tagger", "captum_dcam.model.tagging:TAGGERS", ("phrases", "nltk")),
    "tables": Names("table", "captum_dcam.evaluation.tables:TABLES", more=("all",)),
    "variants": Settled("method", "captum_dcam.methods:METHODS", more=(*FLOORS, "quick", "all")),
    "words": Names("words", "captum_dcam.calibration:WORDS", ("nouns", "all")),
}


def option(
    value: T,
    panel: str | None,
    text: str,
    *flags: str,
    names: str | None = None,
    strict: bool = False,
    shown: str | bool = True,
    **more: Any,
) -> T:
    r"""A dataclass's field that typer takes for an option.

    Args:
        value: the default.
        panel (str or None): its group in the help.
        text (str): the help; ``{scores}`` becomes the names of that entry of :data:`NAMES`.
        *flags (str): ``"--output", "-o"``. Default: the field's name
        names (str, optional): key of :data:`NAMES`: what a shell completes. Default: nothing
        strict (bool, optional): no other name is taken. Default: False
        shown (str or bool, optional): shown for the default. Default: its value
        **more: of :func:`typer.Option`.
    """
    if names is not None:
        more["autocompletion"] = NAMES[names].complete
    made = typer.Option(*flags, rich_help_panel=panel, help=text, show_default=shown, **more)
    return field(default=value, metadata={"typer": made, "names": names if strict else None})


def argument(
    metavar: str, text: str, names: str | None = None, value: Any = None, **more: Any
) -> Any:
    """The same for an argument, which is ``value`` where it is not given; ``names`` are strict."""
    if names is not None:
        more["autocompletion"] = NAMES[names].complete
    made = typer.Argument(metavar=metavar, help=text, **more)
    return field(default=value, metadata={"typer": made, "names": names})


def pairs(panel: str, text: str) -> list[str] | None:
    """An option that takes ``NAME=VALUE``, repeatable."""
    return option(None, panel, f"{text}; repeatable.", metavar="NAME=VALUE")


def words_option(shown: str) -> list[str] | None:
    text = "'all', 'nouns', or words or any part of the answer ('red circle'); repeatable."
    return option(None, WHAT, text, "--words", "-w", metavar="WORDS", shown=shown)


def score_option(shown: str) -> str | None:
    text = "State whose logits are read: {scores}, or the number of a denoising step."
    return option(None, HOW, text, names="scores", strict=True, shown=shown)


def backward_option(shown: str) -> str | None:
    text = "How gradients pass through norms: {backwards}."
    return option(None, HOW, text, names="backwards", strict=True, shown=shown)


def layer_option(shown: str) -> int | None:
    text = "Block to read, from 0; a negative one counts from the end."
    return option(None, HOW, text, shown=shown)


def tagger_option(shown: str) -> str | None:
    text = "Who tells nouns and function words: {taggers} ('nltk' needs its data)."
    return option(None, HOW, text, names="taggers", strict=True, shown=shown)


def refine_option(shown: str) -> list[str] | None:
    text = "Refinement of the maps, in order; repeatable: {refinements}."
    return option(None, HOW, text, metavar="NAME", names="refinements", shown=shown)


def preset_option(text: str) -> str:
    return option("default", HOW, f"{text}: {{presets}}, or a file.", names="presets")


def output_option(value: str, text: str) -> Path:
    return option(Path(value), OUT, text, "--output", "-o")


def open_option() -> bool:
    return option(False, OUT, "Open the page in a browser.", "--open")


def device_option() -> str | None:
    return option(
        None, DECODE, "'cpu', 'cuda', 'cuda:1', 'mps'.", shown="cuda if it is here, or cpu"
    )


# -- options of several commands -------------------------------------------------------------------


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class Base:
    """Options whose names are checked when they are made: a ``strict`` one takes no other name.

    Every class derived from it is a frozen dataclass.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not text.isascii():
                    checks.text(flag(self, one.name), text)
            if names := one.metadata.get("names"):
                NAMES[names].check(value)

    def shared(self, call: Callable[..., Any], **own: Any) -> dict[str, Any]:
        """Arguments for a function or class: the fields that it takes by name, and ``own``."""
        taken = inspect.signature(call).parameters
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in taken} | own


class Model(Base):
    """The model of every command that runs one."""

    model: str = option(
        "mini",
        HOW,
        "A family or a checkpoint ({models}), a folder, or another name on the hub.",
        "--model",
        "-m",
        names="models",
    )
    load: list[str] | None = pairs(
        HOW,
        "A setting of loading, such as trust_remote_code=true, device_map=auto, revision=main, "
        "family=lavida, verify=false (no replay is checked), or one of the family's own",
    )
    cache: str | None = option(
        None,
        HOW,
        "'prefix' (image and prompt computed once) or 'none' (at every step).",
        names="caches",
        shown="the family's",
    )
    layer: int | None = layer_option("recommended")
    generation: list[str] | None = pairs(
        DECODE, "A decoding setting of the family, such as steps=32"
    )
    seed: int = option(0, DECODE, "Of sampling.")
    dtype: str | None = option(
        None,
        DECODE,
        "Type of the weights: {dtypes}.",
        names="dtypes",
        strict=True,
        shown="the family's; mini: float32",
    )
    json: bool = option(False, OUT, "Print one JSON document on stdout.", "--json")
    quiet: bool = option(
        False, OUT, "Print nothing but errors (and the document of --json).", "--quiet", "-q"
    )


class Written(Model):
    """How an answer is written."""

    decoding: str | None = option(
        None,
        DECODE,
        "Settings by a name that the family knows: 'demo' (of its authors' demo), 'paper' (of "
        "their evaluation); single settings override them.",
        shown="the family's defaults",
    )
    gen_length: int | None = option(None, DECODE, "Answer length.", shown="the family's")
    steps: int | None = option(None, DECODE, "Denoising steps.", shown="the family's")
    block_length: int | None = option(
        None, DECODE, "Tokens per semi-autoregressive block.", shown="the family's"
    )
    temperature: float | None = option(None, DECODE, "Of sampling.", shown="greedy", min=0)
    device: str | None = device_option()


#: what happens where no image is given
DRAWN = (
    "Without one, a held-out scene of the embedded data is drawn, and the maps are scored against "
    "its masks."
)


class Answer(Written):
    """The answer that is explained."""

    prompt: str = option("describe the image .", WHAT, "The question.", "--prompt", "-p")
    words: list[str] | None = words_option("all")
    answer: str | None = option(
        None,
        WHAT,
        "Explain this text as if the model had answered it; nothing is decoded. In 'a [MASK] "
        "circle' the model fills a token, in '[MASK:3]' three; '\\[MASK]' is the text itself.",
        shown="what the model writes",
    )
    reveals: Path | None = option(
        None,
        WHAT,
        "Explain an answer that was written elsewhere: a JSON file of its token ids, the step that "
        "revealed each of them, and perhaps their log-probabilities; nothing is decoded.",
        metavar="FILE",
        shown="none",
    )
    foil: list[str] | None = option(
        None,
        WHAT,
        "Why the words and not this: a text that might stand in their place, or WORD=TEXT for one "
        "of them; repeatable.",
        metavar="TEXT",
        shown="none",
    )
    scene: int | None = option(
        None, WHAT, "Which held-out scene to draw when no IMAGE is given.", shown="12", min=0
    )
    internal_batch_size: int | None = option(
        None,
        HOW,
        "Number of words per backward pass: fewer need less memory.",
        shown="what fits, 16 at most, or 4 without a cache",
        min=1,
    )
    score: str | None = score_option("the preset's")
    backward: str | None = backward_option("the preset's")
    tagger: str | None = tagger_option("the preset's")
    refine: list[str] | None = refine_option("the preset's")

    @cached_property
    def given(self) -> AnswerLike:
        """The answer that is given, by itself or with its steps; a file is read once."""
        from captum_dcam.model.reveals import Reveals

        if self.reveals is None:
            return self.answer
        if self.answer is not None:
            raise InputError("--reveals and --answer both give the answer: leave out one of them")
        return Reveals.load(self.reveals)


class Data(Model):
    """Images of a data set."""

    dataset: str = option(
        "scenes", WHAT, "A data set: {datasets}.", "--dataset", "-d", names="datasets", strict=True
    )
    root: Path | None = option(None, WHAT, "Folder with the data set's files.")
    data: list[str] | None = pairs(
        WHAT, "A setting of the data set, such as split=val2014 or missing=skip"
    )
    start: int = option(0, WHAT, "First image, in the data's order.", min=0)
    limit: int | None = option(None, WHAT, "Number of images.", shown="all", min=1)
    prompt: str | None = option(None, WHAT, "The question.", "--prompt", "-p", shown="the data's")
    threads: int = option(1, RUN, "Of torch on the CPU; 0: as it is.", min=0)


def flag(options: Base, name: str) -> str:
    """How the command line calls a field: ``--budget-passes`` for ``passes``."""
    (made,) = (f.metadata["typer"] for f in fields(options) if f.name == name)
    # typer keeps the first flag of a declaration without a value as its default
    return str(made.default if isinstance(made.default, str) else f"--{name.replace('_', '-')}")


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
    r"""Decorator: enter a command whose one argument, ``options``, is a class derived from
    :class:`Base`.

    The help shows the options by their groups; in each, the command's own come first.

    Raises:
        SettingError: a field that is no option.
    """
    options = get_type_hints(function)["options"]
    for one in fields(options):
        if "typer" not in one.metadata:
            raise SettingError(
                f"{options.__name__}.{one.name} is no option: declare it with option(…) or "
                "argument(…)"
            )

    def call(debug: bool, **values: Any) -> None:
        function(options(**values))

    update_wrapper(call, function)
    hints = get_type_hints(options)
    shared = {f.name for base in options.__bases__ if is_dataclass(base) for f in fields(base)}

    def place(one: Field[Any]) -> tuple[int, bool]:
        return PANELS.index(one.metadata["typer"].rich_help_panel), one.name in shared

    def parameter(name: str, value: Any, hint: Any, made: Any) -> inspect.Parameter:
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=value, annotation=Annotated[hint, made])

    taken = [
        parameter(f.name, f.default, hints[f.name], f.metadata["typer"])
        for f in sorted(fields(options), key=place)
    ]
    taken.append(parameter("debug", False, bool, debug_option()))
    call.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    COMMANDS.register(function.__name__)(call)
    return function


#: wrong usage, of the click that typer uses: its own copy, or the package
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A command whose help lists names; they are looked up when it is shown, not before. Errors
    name the value that was given."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        given = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except typer.BadParameter as error:
            if (value := _value_of(given, getattr(error.param, "opts", ()))) is not None:
                error.message = f"{error.message} (given: {value!r})"
            raise

    def format_help(self, *arguments: Any) -> None:
        for one in self.params:
            if text := getattr(one, "help", None):
                one.help = text.format_map(_Listed())  # type: ignore[attr-defined]
        super().format_help(*arguments)


def _value_of(given: Sequence[str], flags: Sequence[str]) -> str | None:
    """What a command line gives an option."""
    for word, after in zip(given, (*given[1:], None), strict=True):
        flag, equals, value = word.partition("=")
        if flag in flags:
            return value if equals else after
    return None


class _Listed(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ", ".join(NAMES[key].all())
