r"""``captum-dcam evaluate``: options to plans, plans to stores, and how every part stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from captum_dcam.cli import printing
from captum_dcam.cli.options import (
    DECODE,
    HOW,
    NAMES,
    RUN,
    WHAT,
    Data,
    backward_option,
    command,
    flag,
    option,
    output_option,
    refine_option,
    score_option,
)
from captum_dcam.cli.parsing import chosen_score, load_model, parse_methods, setting_pairs
from captum_dcam.errors import InputError

if TYPE_CHECKING:
    import torch

    from captum_dcam.evaluation import Plan, Summary, Variant
    from captum_dcam.evaluation.suites import Part
    from captum_dcam.model.adapter import Adapter


class Options(Data):
    """The options of ``captum-dcam evaluate``.

    Fields that :class:`captum_dcam.evaluation.Plan` and ``Variant`` have as well go there by name.
    """

    suite: list[str] | None = option(
        None,
        WHAT,
        "All that a group of tables needs, each part in a folder of its own; repeatable: {suites}.",
        "--suite",
        "-s",
        metavar="NAME",
        names="suites",
        strict=True,
    )
    plan: Path | None = option(
        None, WHAT, "A plan as JSON, such as plan.json of a store: the same again."
    )
    methods: list[str] | None = option(
        None,
        WHAT,
        "Methods as in compare, and 'oracle', 'random', 'center_blob'.",
        "--methods",
        "-M",
        metavar="NAMES",
        names="variants",
    )
    metrics: list[str] | None = option(
        None,
        WHAT,
        "A metric, with settings after a colon, such as pointing:tolerance=5; repeatable: "
        "{metrics}.",
        metavar="NAME",
        names="metrics",
        shown="localization",
    )
    words: list[str] | None = option(
        None,
        WHAT,
        "Kinds of words: object (named by a mask), modifier, noun, function, other.",
        "--words",
        "-w",
        metavar="KINDS",
        names="kinds",
        shown="object, noun, function",
    )
    answer: str | None = option(
        None,
        WHAT,
        "A caption to force instead: its number, or its wording ('verbose').",
        shown="generated",
    )
    score: str | None = score_option("commit")
    backward: str | None = backward_option("exact")
    refine: list[str] | None = refine_option("none")
    passes: int | None = option(
        None,
        HOW,
        "Number of forward passes per image after which a method stops.",
        "--budget-passes",
        shown="none",
        min=1,
    )
    seed: int = option(0, DECODE, "Of everything that is drawn.")
    device: str | None = option(
        None, RUN, "'cpu', 'cuda', 'cuda:1', 'mps'.", shown="the process's GPU, or cpu"
    )
    shard: str | None = option(
        None,
        RUN,
        "Every N-th image from the I-th. The last shard to end merges them. accelerate launch "
        "and torchrun number their processes themselves.",
        metavar="I/N",
        shown="the launcher's, or all",
    )
    errors: str = option(
        "raise",
        RUN,
        "'raise', or 'skip': an image that fails is stored with the reason.",
        names="errors",
    )
    retry: bool = option(False, RUN, "Measure failed images again.", "--retry")
    output: Path = output_option(
        "results", "Folder of the results; a run that was stopped goes on there."
    )
    list_: bool = option(False, None, "List suites, data sets and metrics, and stop.", "--list")


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
    done = printing.run_and_print(options, run, document, print_summaries, default=str)
    if done.signal is not None:
        raise typer.Exit(128 + done.signal)  # as a shell says of a program that a signal ended


@dataclass(frozen=True)
class Evaluated:
    r"""What a run came to.

    Args:
        parts (tuple): every part that was begun, with how this process's shard of it stands.
        signal (int or None): the signal that ended it with images left; None: nothing is left.
    """

    parts: tuple[tuple[Part, Summary], ...]
    signal: int | None


def run(options: Options) -> Evaluated:
    """Measure; everything that can be checked is checked before any work.

    The name of a part is printed on stderr before it is measured. A stop by signal ends after the
    image at hand; what comes after it is left for the next run.
    """
    from captum_dcam.evaluation import (
        Live,
        Silent,
        Store,
        evaluate,
        launched_shard,
        parse_shard,
        stop_on_signals,
    )
    from captum_dcam.model.hub import check_device

    shard = launched_shard() if options.shard is None else parse_shard(options.shard)
    adapters = Loaded(options, None if options.device is None else check_device(options.device))
    parts = [(part, options.output / part.name) for part in parts_of(options, adapters)]
    for part, folder in parts:  # a folder of other settings is refused before the first part runs
        Store.check(folder, part.plan.record(), shard[1])
    done = []
    with stop_on_signals() as stop:
        for part, folder in parts:
            if part.name and not options.quiet:
                printing.say_on_stderr(f"{part.name} …")
            label = part.name or "evaluate"
            label += "" if shard[1] == 1 else f" {shard[0]}/{shard[1]}"
            summary = evaluate(
                part.plan,
                folder,
                root=options.root,
                shard=shard,
                on_error="skip" if part.skips else options.errors,
                retry=options.retry,
                progress=Silent() if options.quiet else Live(label, position=shard[0]),
                stop=stop,
                adapter=adapters.of(part.plan.cache),
            )
            done.append((part, summary))
            if stop():
                break
    left = len(done) < len(parts) or any(summary.left for _, summary in done)
    return Evaluated(tuple(done), stop.signal if left else None)


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
        from captum_dcam.evaluation.launch import launched_device

        found = (a for known, a in self._known.items() if cache in (known, a.cache))
        adapter = next(found, None)
        if adapter is None:
            device = launched_device() if self._device is None else self._device
            adapter = self._known[cache] = load_model(
                self._model, self._settings, cache=cache, device=device, dtype=self._dtype
            )
        return adapter


# -- options to plans ------------------------------------------------------------------------------


def parts_of(options: Options, adapters: Loaded) -> list[Part]:
    """The parts of the suites that are asked for, the plan of a file, or that of the options."""
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
    own = ("metrics", "layer", "score", "backward", "refine", "answer", "words", "passes")
    if fixed := [flag(options, name) for name in own if getattr(options, name) is not None]:
        brings = ", ".join(name.removeprefix("--") for name in fixed)
        raise InputError(f"a suite brings its own {brings}: leave out {fixed[0]}")
    own_settings = {"adapter": adapters.of(options.cache), **_parsed(options)}
    setting = Setting(**options.shared(Setting, **own_settings))
    parts = {part.name: part for name in options.suite or () for part in suite(name, setting)}
    return list(parts.values())


def _parsed(options: Options) -> dict[str, Any]:
    """What is text on the command line, and a record in a plan."""
    load = setting_pairs("--load", options.load)
    return {
        "dataset": {"name": options.dataset, **setting_pairs("--data", options.data)},
        "generation": setting_pairs("--generation", options.generation),
        # what changes numbers: neither the devices nor the leave to run a checkpoint's code
        "load": {k: v for k, v in load.items() if k not in ("device_map", "trust_remote_code")},
    }


def _plan_of_file(file: Path) -> Plan:
    from captum_dcam.evaluation import Plan
    from captum_dcam.files import read_json

    record = read_json(file, InputError, "give a plan, {…}, or plan.json of a store")
    if "plan" in record:  # the header of a store holds its plan, which is the same again
        record = record["plan"]
        if not isinstance(record, dict):
            raise InputError(f"{file}: its plan is {str(record)[:80]!r}: expected a record, {{…}}")
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
    state, backward = chosen_score(options.score or "commit"), options.backward or "exact"
    own = options.shared(Variant, score=state, backward=backward, refinements=stages)
    for method in parse_methods(others) if others else ():
        yield replace(as_variant(method), **own)


def _metric(text: str) -> dict[str, Any]:
    """``name``, or ``name:setting=value,setting=value`` with values as JSON writes them."""
    name, _, settings = text.partition(":")
    return {"name": name, **setting_pairs("--metrics", settings.split(",") if settings else [])}


# -- what is printed -------------------------------------------------------------------------------


def print_summaries(found: Evaluated) -> None:
    """Print one line per part, problems of the data, and what to do next."""
    from captum_dcam.evaluation.tables import table

    done = found.parts
    console = printing.output_console(120)
    heads = ("Part", "Shard", "Images", "Now", "Failed", "Left", "Folder")
    drawn = printing.table_of(*heads, right=heads[1:6])
    for part, s in done:
        cells = [part.name or "–", f"{s.shard[0]}/{s.shard[1]}", s.total, s.measured, s.failed]
        style = "yellow" if s.left else ""
        drawn.add_row(*map(str, cells), Text(str(s.left), style=style), str(s.folder))
    console.print(drawn)
    for _, s in done:
        lines = [f"left out: {problem}" for problem in s.problems[:10]]
        lines += [f"and {len(s.problems) - 10} more"] if len(s.problems) > 10 else []
        for line in lines:
            console.print(Text(line, style="yellow"))
    if found.signal is not None or any(s.left for _, s in done):
        console.print(Text("Stopped early: the same command goes on.", style="yellow"))
    elif any(s.merged is None for _, s in done):
        console.print("Other shards are not complete yet; the last one merges.", style="dim")
    else:
        part, s = done[0]
        folder = s.folder.parent if part.name else s.folder
        printing.print_facts(console, {"Results": str(folder)})
        if part.name:
            console.print(f"captum-dcam table all --results {folder}", style="dim")
        else:
            printing.show(table("summary", folder))


def document(done: Evaluated) -> list[dict[str, Any]]:
    """The parts as plain data."""
    return [{"part": part.name, **asdict(s), "plan": part.plan.record()} for part, s in done.parts]


def _show_choices(as_json: bool) -> None:
    """What ``--list`` shows: suites, data sets, metrics, floors."""
    from captum_dcam.evaluation import FLOORS

    kinds = {"suites": "suites", "data sets": "datasets", "metrics": "metrics"}
    found = {kind: sorted(NAMES[names].all()) for kind, names in kinds.items()}
    found["floors"] = sorted(FLOORS)
    if as_json:
        printing.print_json(found)
        return
    console = printing.output_console(120)
    for kind, names in found.items():
        console.print(Text.assemble((f"{kind:10}", "bold"), ", ".join(names)))
