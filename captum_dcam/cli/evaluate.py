r"""What ``captum-dcam evaluate`` does, without its printing: options to plans, plans to stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from captum_dcam.cli.explain import check_name
from captum_dcam.cli.parsing import DTYPES, load_model, parse_methods, setting_pairs
from captum_dcam.data import DATASETS
from captum_dcam.errors import EvaluationError, InputError, UsageError
from captum_dcam.evaluation import (
    Live,
    Plan,
    Store,
    Summary,
    Variant,
    evaluate,
    launched_shard,
    parse_shard,
    stop_on_signals,
)
from captum_dcam.evaluation.launch import launched_device
from captum_dcam.evaluation.plan import FLOORS, as_variant
from captum_dcam.evaluation.suites import SUITES, Part, Setting, suite
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.hub import check_device
from captum_dcam.model.trajectory import SCORES
from captum_dcam.refine import Refinement, refinement


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of ``captum-dcam evaluate``, as its help describes them."""

    suite: list[str] | None
    plan: Path | None
    methods: list[str] | None
    metrics: list[str] | None
    dataset: str
    root: Path | None
    data: list[str] | None
    model: str
    load: list[str] | None
    regime: str | None
    layer: int | None
    score: str | None
    refine: list[str] | None
    prompt: str | None
    answer: str | None
    kinds: list[str] | None
    start: int
    limit: int | None
    passes: int | None
    generation: list[str] | None
    seed: int
    threads: int
    shard: str | None
    errors: str
    retry: bool
    device: str | None
    dtype: str
    output: Path
    json: bool


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


def run(options: EvaluateOptions, say: Callable[[str], None]) -> list[Evaluated]:
    """Measure; everything that can be checked is checked before any work.

    ``say`` is told the name of every part before it is measured. A stop by signal ends after the
    image at hand; what comes after it is left for the next run.
    """
    shard = launched_shard() if options.shard is None else parse_shard(options.shard)
    check_name("dtype", options.dtype, DTYPES)
    check_name("data set", options.dataset, DATASETS)
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
            try:
                out.append(_measured(part, options, shard, adapters, stop))
            except EvaluationError as error:
                raise UsageError(str(error)) from error
            if stop():
                break
    return out


def _measured(
    part: Part,
    options: EvaluateOptions,
    shard: tuple[int, int],
    adapters: Loaded,
    stop: Callable[[], bool],
) -> Evaluated:
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
        adapter=adapters.of(part.plan.regime),
    )
    return Evaluated(part.name, part.plan, summary)


def _folder(options: EvaluateOptions, part: Part) -> Path:
    return options.output / part.name if part.name else options.output


class Loaded:
    """The model, loaded when it is first needed; each further regime from the same place."""

    def __init__(self, options: EvaluateOptions, device: torch.device | None) -> None:
        self._model, self._dtype, self._device = options.model, options.dtype, device
        self._settings = setting_pairs("--load", options.load)
        self._known: dict[str | None, Adapter] = {}

    def follow(self, plan: Plan) -> None:
        """Load what a plan from a file names, in place of what the options do."""
        self._model, self._dtype = plan.model, plan.dtype
        self._settings = {**plan.load, **self._settings}

    def of(self, regime: str | None) -> Adapter:
        """The adapter of a regime; None: the family's own."""
        if regime not in self._known:
            same = next((a for a in self._known.values() if a.regime == regime), None)
            self._known[regime] = self._load(regime) if same is None else same
        return self._known[regime]

    def _load(self, regime: str | None) -> Adapter:
        where = launched_device() if self._device is None else self._device
        return load_model(
            self._model, self._settings, regime=regime, device=where, dtype=self._dtype
        )


# -- options to plans ------------------------------------------------------------------------------


def parts_of(options: EvaluateOptions, adapters: Loaded) -> list[Part]:
    """The parts of the suites that are asked for, a plan from a file, or one from options."""
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
    own = ("metrics", "layer", "score", "refine", "answer", "kinds", "passes")
    fixed = [name for name in own if getattr(options, name) is not None]
    if fixed:
        raise InputError(f"a suite brings its own {', '.join(fixed)}: leave out --{fixed[0]}")
    for name in options.suite or ():
        check_name("suite", name, SUITES)
    setting = Setting(
        adapters.of(options.regime),
        options.model,
        _dataset(options),
        start=options.start,
        limit=options.limit,
        regime=options.regime,
        dtype=options.dtype,
        prompt=options.prompt,
        seed=options.seed,
        generation=setting_pairs("--generation", options.generation),
        load=_load_record(options),
        threads=options.threads,
    )
    parts = {part.name: part for name in options.suite or () for part in suite(name, setting)}
    return list(parts.values())


def _load_record(options: EvaluateOptions) -> dict[str, Any]:
    """What of ``--load`` decides numbers: not where the model lies, nor what it may run."""
    pairs = setting_pairs("--load", options.load)
    return {k: v for k, v in pairs.items() if k not in ("device_map", "trust_remote_code")}


def _plan_of_file(file: Path) -> Plan:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} holds a {type(record).__name__}: expected a plan, {{…}}")
    # the header of a store holds its plan: "the same again" needs no copying out
    return Plan.from_record(record["plan"] if "plan" in record else record)


def _plan_of_options(options: EvaluateOptions) -> Plan:
    check_name("score", options.score, SCORES)
    answer: Any = options.answer or "generated"
    if answer != "generated":
        answer = {"name": "caption", "wording": int(answer) if answer.isdigit() else answer}
    changes: dict[str, Any] = {}
    if options.metrics:
        changes["metrics"] = tuple(_metric(text) for text in options.metrics)
    if options.kinds:
        changes["words"] = tuple(",".join(options.kinds).split(","))
    return Plan(
        tuple(variants_of(options)),
        dataset=_dataset(options),
        model=options.model,
        regime=options.regime,
        dtype=options.dtype,
        prompt=options.prompt,
        answer=answer,
        seed=options.seed,
        start=options.start,
        limit=options.limit,
        generation=setting_pairs("--generation", options.generation),
        load=_load_record(options),
        threads=options.threads,
        **changes,
    )


def variants_of(options: EvaluateOptions) -> Iterator[Variant]:
    """Floors and methods that ``--methods`` names, with the block, state and refinements."""
    stages: list[Refinement] = [refinement(name) for name in options.refine or ()]
    names = ",".join(options.methods or ()).split(",")
    yield from (Variant(name) for name in FLOORS if name in names)
    others = [name for name in names if name not in FLOORS]
    for method in parse_methods(others) if others else ():
        yield replace(
            as_variant(method),
            layer=options.layer,
            score=options.score or "commit",
            refinements=tuple(stage.describe() for stage in stages),
            passes=options.passes,
        )


def _metric(text: str) -> dict[str, Any]:
    """``name``, or ``name:setting=value,setting=value`` with values as JSON writes them."""
    name, _, settings = text.partition(":")
    return {"name": name, **setting_pairs("--metrics", settings.split(",") if settings else [])}


def _dataset(options: EvaluateOptions) -> dict[str, Any]:
    return {"name": options.dataset, **setting_pairs("--data", options.data)}


def list_choices() -> dict[str, list[str]]:
    """What ``--list`` shows: suites with their parts' tables, data sets, metrics, floors."""
    from captum_dcam.data import dataset_names
    from captum_dcam.evaluation.measure import METRICS

    return {
        "suites": sorted(SUITES),
        "data sets": list(dataset_names()),
        "metrics": sorted(METRICS),
        "floors": sorted(FLOORS),
    }
