r"""``captum-dcam evaluate``: options to plans, plans to stores, and how every part stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from captum_dcam.cli.options import (
    DECODE,
    HOW,
    NAMES,
    RUN,
    WHAT,
    Data,
    command,
    flag,
    option,
    output_option,
    refine_option,
    score_option,
)
from captum_dcam.cli.parsing import load_model, parse_methods, setting_pairs
from captum_dcam.cli.printing import (
    others_on_stderr,
    output_console,
    print_facts,
    print_json,
    show,
    table_of,
)
from captum_dcam.errors import InputError

if TYPE_CHECKING:
    import torch

    from captum_dcam.evaluation import Plan, Summary, Variant
    from captum_dcam.evaluation.suites import Part
    from captum_dcam.model.adapter import Adapter


@dataclass(frozen=True)
class Options(Data):
    """The options of ``captum-dcam evaluate``.

    Fields that :class:`captum_dcam.evaluation.Plan` and ``Variant`` have as well go there by name.
    """

    suite: Annotated[
        list[str] | None,
        option(
            WHAT,
            "Everything that a group of tables needs, each part in a folder of its own; "
            "repeatable: {suites}.",
            "--suite",
            "-s",
            metavar="NAME",
            names="suites",
        ),
        NAMES["suites"],
    ] = None
    plan: Annotated[
        Path | None, option(WHAT, "A plan as JSON; a store's plan.json will do: the same again.")
    ] = None
    methods: Annotated[
        list[str] | None,
        option(
            WHAT,
            "Methods as in compare, and 'oracle', 'random', 'center_blob'.",
            "--methods",
            "-M",
            metavar="NAMES",
            names="variants",
        ),
    ] = None
    metrics: Annotated[
        list[str] | None,
        option(
            WHAT,
            "A metric, with settings after a colon, such as pointing:tolerance=5; repeatable: "
            "{metrics}.",
            "--metrics",
            metavar="NAME",
            names="metrics",
            default="localization",
        ),
    ] = None
    words: Annotated[
        list[str] | None,
        option(
            WHAT,
            "Kinds of words: object (named by a mask), modifier, noun, function, other.",
            "--words",
            "-w",
            metavar="KINDS",
            names="kinds",
            default="object, noun, function",
        ),
    ] = None
    answer: Annotated[
        str | None,
        option(
            WHAT,
            "A caption to force instead: its number, or its wording ('verbose').",
            default="generated",
        ),
    ] = None
    score: Annotated[str | None, score_option("commit"), NAMES["scores"]] = None
    refine: Annotated[list[str] | None, refine_option("none")] = None
    passes: Annotated[
        int | None,
        option(
            HOW,
            "Forward passes an image after which a method stops.",
            "--budget-passes",
            default="none",
            min=1,
        ),
    ] = None
    seed: Annotated[int, option(DECODE, "Of everything that is drawn.")] = 0
    device: Annotated[
        str | None,
        option(RUN, "'cpu', 'cuda', 'cuda:1', 'mps'.", default="the process's GPU, or cpu"),
    ] = None
    shard: Annotated[
        str | None,
        option(
            RUN,
            "Every N-th image from the I-th. The last shard to end merges them; accelerate launch "
            "and torchrun number their processes by themselves.",
            metavar="I/N",
            default="the launcher's, or all",
        ),
    ] = None
    errors: Annotated[
        str,
        option(
            RUN,
            "'raise', or 'skip': an image that fails is stored with the reason.",
            names="errors",
        ),
    ] = "raise"
    retry: Annotated[bool, option(RUN, "Measure failed images again.", "--retry")] = False
    output: Annotated[
        Path, output_option("Folder of the results; a run that was stopped goes on there.")
    ] = Path("results")
    list_: Annotated[
        bool, option(None, "List suites, data sets and metrics, and stop.", "--list")
    ] = False


@command
def evaluate(options: Options) -> None:
    """Measure methods over a data set; stopped or killed, the same command goes on.

    Examples: captum-dcam evaluate --suite papers --data count=560 --start 60 -o results;
    captum-dcam evaluate -M diffusion_cam,tam,oracle -d coco --root coco --data split=val2014
    -p "Describe this image in one sentence." --errors skip -o results
    """
    if options.list_:
        _show_choices(options.json)
        return
    with others_on_stderr():
        done = run(options, _say_part)
    if options.json:
        print_json([document(one) for one in done], default=str)
    else:
        print_summaries(done)


@dataclass(frozen=True)
class Evaluated:
    r"""What was measured.

    Args:
        name (str): of the part; empty for a single plan.
        plan (Plan): what was measured.
        summary (Summary): how this process's shard stands.
    """

    name: str
    plan: Plan
    summary: Summary


def run(options: Options, say: Callable[[str], None]) -> list[Evaluated]:
    """Measure; everything that can be checked is checked before any work.

    ``say`` is told the name of every part before it is measured. A stop by signal ends after the
    image at hand; what comes after it is left for the next run.
    """
    from captum_dcam.evaluation import (
        Live,
        Store,
        evaluate,
        launched_shard,
        parse_shard,
        stop_on_signals,
    )
    from captum_dcam.model.hub import check_device

    shard = launched_shard() if options.shard is None else parse_shard(options.shard)
    device = None if options.device is None else check_device(options.device)
    adapters = Loaded(options, device)
    parts = parts_of(options, adapters)
    for part in parts:  # a folder of other settings is refused before the first part runs
        Store.check(_folder(options, part), part.plan.record(), shard[1])
    out = []
    with stop_on_signals() as stop:
        for part in parts:
            if part.name:
                say(part.name)
            label = part.name or "evaluate"
            label += "" if shard[1] == 1 else f" {shard[0]}/{shard[1]}"
            summary = evaluate(
                part.plan,
                _folder(options, part),
                root=options.root,
                shard=shard,
                on_error="skip" if part.skips else options.errors,
                retry=options.retry,
                progress=Live(label, position=shard[0]),
                stop=stop,
                adapter=adapters.of(part.plan.cache),
            )
            out.append(Evaluated(part.name, part.plan, summary))
            if stop():
                break
    return out


def _folder(options: Options, part: Part) -> Path:
    return options.output / part.name if part.name else options.output


class Loaded:
    """The model, loaded when it is first needed; with each further cache from the same place."""

    def __init__(self, options: Options, device: torch.device | None) -> None:
        self._model, self._dtype, self._device = options.model, options.dtype, device
        self._settings = setting_pairs("--load", options.load)
        self._known: dict[str | None, Adapter] = {}

    def follow(self, plan: Plan) -> None:
        """Load what a plan from a file names, in place of what the options do."""
        self._model, self._dtype = plan.model, plan.dtype
        self._settings = {**plan.load, **self._settings}

    def of(self, cache: str | None) -> Adapter:
        """The adapter with a cache; None: the family's own."""
        if cache not in self._known:
            same = next((a for a in self._known.values() if a.cache == cache), None)
            self._known[cache] = self._load(cache) if same is None else same
        return self._known[cache]

    def _load(self, cache: str | None) -> Adapter:
        from captum_dcam.evaluation.launch import launched_device

        where = launched_device() if self._device is None else self._device
        return load_model(self._model, self._settings, cache=cache, device=where, dtype=self._dtype)


# -- options to plans ------------------------------------------------------------------------------


def parts_of(options: Options, adapters: Loaded) -> list[Part]:
    """The parts of the suites that are asked for, a plan from a file, or one from options."""
    from captum_dcam.evaluation.suites import Part, Setting, suite

    given = [name for name in ("suite", "plan", "methods") if getattr(options, name)]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none of them"
        raise InputError(f"give one of --suite, --plan and --methods; {found} is given")
    if options.plan is not None:
        plan = _plan_of_file(options.plan)
        adapters.follow(plan)
        return [Part("", plan)]
    if options.methods:
        return [Part("", _plan_of_options(options))]
    own = ("metrics", "layer", "score", "refine", "answer", "words", "passes")
    fixed = [flag(options, name) for name in own if getattr(options, name) is not None]
    if fixed:
        brings = ", ".join(name.removeprefix("--") for name in fixed)
        raise InputError(f"a suite brings its own {brings}: leave out {fixed[0]}")
    adapter = adapters.of(options.cache)
    setting = Setting(**options.shared(Setting, adapter=adapter, **_parsed(options)))
    parts = {part.name: part for name in options.suite or () for part in suite(name, setting)}
    return list(parts.values())


def _parsed(options: Options) -> dict[str, Any]:
    """What the command line writes as text, and a plan as records."""
    load = setting_pairs("--load", options.load)
    return {
        "dataset": {"name": options.dataset, **setting_pairs("--data", options.data)},
        "generation": setting_pairs("--generation", options.generation),
        # what decides numbers: not where the model lies, nor what it may run
        "load": {k: v for k, v in load.items() if k not in ("device_map", "trust_remote_code")},
    }


def _plan_of_file(file: Path) -> Plan:
    from captum_dcam.evaluation import Plan
    from captum_dcam.files import reading

    try:
        with reading(file):
            record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # or no text in UTF-8
        raise InputError(f"{file} is not JSON: {error}") from error
    if isinstance(record, dict):  # the header of a store holds its plan, which is the same again
        record = record.get("plan", record)
    if not isinstance(record, dict):
        raise InputError(f"{file} holds a {type(record).__name__}: expected a plan, {{…}}")
    return Plan.from_record(record)


def _plan_of_options(options: Options) -> Plan:
    from captum_dcam.evaluation import Plan

    answer: Any = options.answer or "generated"
    if answer != "generated":
        answer = {"name": "caption", "wording": int(answer) if answer.isdigit() else answer}
    given = {**_parsed(options), "answer": answer, "variants": tuple(variants_of(options))}
    if options.metrics:
        given["metrics"] = tuple(map(_metric, options.metrics))
    if options.words:
        given["words"] = tuple(",".join(options.words).split(","))
    arguments = options.shared(Plan, **given)
    return Plan(**{k: v for k, v in arguments.items() if v is not None})  # None: the plan's own


def variants_of(options: Options) -> Iterator[Variant]:
    """Floors and methods that ``--methods`` names, with the block, state and refinements."""
    from captum_dcam.evaluation import FLOORS, Variant
    from captum_dcam.evaluation.plan import as_variant
    from captum_dcam.refine import refinement

    stages = tuple(refinement(name).describe() for name in options.refine or ())
    names = ",".join(options.methods or ()).split(",")
    yield from (Variant(name) for name in FLOORS if name in names)
    others = [name for name in names if name not in FLOORS]
    own = options.shared(Variant, score=options.score or "commit", refinements=stages)
    for method in parse_methods(others) if others else ():
        yield replace(as_variant(method), **own)


def _metric(text: str) -> dict[str, Any]:
    """``name``, or ``name:setting=value,setting=value`` with values as JSON writes them."""
    name, _, settings = text.partition(":")
    return {"name": name, **setting_pairs("--metrics", settings.split(",") if settings else [])}


# -- what is printed -------------------------------------------------------------------------------


def _say_part(name: str) -> None:
    """Before a part's bar, on stderr."""
    typer.echo(f"{name} …", err=True)


def print_summaries(done: Sequence[Evaluated]) -> None:
    """A line a part, problems of the data, and what to do next."""
    from captum_dcam.evaluation.tables import table

    console = output_console(120)
    heads = ("Part", "Shard", "Images", "Now", "Failed", "Left", "Folder")
    drawn = table_of(*heads, right=heads[1:6])
    for one in done:
        s = one.summary
        cells = [one.name or "–", f"{s.shard[0]}/{s.shard[1]}", s.total, s.measured, s.failed]
        style = "yellow" if s.left else ""
        drawn.add_row(*map(str, cells), Text(str(s.left), style=style), str(s.folder))
    console.print(drawn)
    for one in done:
        for problem in one.summary.problems[:10]:
            console.print(Text(f"left out: {problem}", style="yellow"))
        if len(one.summary.problems) > 10:
            console.print(Text(f"and {len(one.summary.problems) - 10} more", style="yellow"))
    if any(one.summary.left for one in done):
        console.print(Text("Stopped early: the same command goes on.", style="yellow"))
    elif any(one.summary.merged is None for one in done):
        console.print("Other shards are not complete yet; the last one merges.", style="dim")
    else:
        suites = any(one.name for one in done)
        folder = done[0].summary.folder.parent if suites else done[0].summary.folder
        print_facts(console, {"Results": str(folder)})
        if not suites:
            show(table("summary", folder))
        else:
            console.print(f"captum-dcam table all --results {folder}", style="dim")


def document(one: Evaluated) -> dict[str, Any]:
    """A part as plain data."""
    return {"part": one.name, **asdict(one.summary), "plan": one.plan.record()}


def _show_choices(as_json: bool) -> None:
    """What ``--list`` shows: suites, data sets, metrics, floors."""
    from captum_dcam.evaluation import FLOORS

    kinds = {"suites": "suites", "data sets": "datasets", "metrics": "metrics"}
    found = {kind: sorted(NAMES[names].all()) for kind, names in kinds.items()}
    found["floors"] = sorted(FLOORS)
    if as_json:
        print_json(found)
        return
    console = output_console(120)
    for kind, names in found.items():
        console.print(Text.assemble((f"{kind:10}", "bold"), ", ".join(names)))
