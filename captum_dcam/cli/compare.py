r"""What ``captum-dcam compare`` does, without its printing."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from captum_dcam.cli.explain import (
    Common,
    check_name,
    check_options,
    chosen_refinements,
    chosen_words,
    picture_of,
    progress,
    source_of,
    written,
)
from captum_dcam.cli.parsing import parse_methods
from captum_dcam.comparing import compare_bound
from captum_dcam.data.scenes import scene_mask
from captum_dcam.errors import InputError
from captum_dcam.methods import METHODS, Budget, method_names
from captum_dcam.model.words import Target
from captum_dcam.results.comparison import Comparison
from captum_dcam.viewer import prepare_folder, write_comparison
from captum_dcam.viewer.panel import SCALES

#: columns that ``--sort`` knows
SORTS = ("f3", "seconds", "name")


@dataclass(frozen=True)
class CompareOptions(Common):
    """The options of ``captum-dcam compare``, as its help describes them."""

    methods: list[str] | None
    budget_passes: int | None
    budget_seconds: float | None
    scale: str
    sort: str | None


@dataclass(frozen=True)
class Compared:
    r"""What was compared and written.

    Args:
        comparison (Comparison): maps, costs and scores.
        folder (Path): where everything lies.
        source (str): the picture's path, or which scene was drawn.
        sort (str or None): the table's order; None: as asked for.
    """

    comparison: Comparison
    folder: Path
    source: str
    sort: str | None


def run(options: CompareOptions) -> Compared:
    """Compare and write; everything that can be checked is checked before any work."""
    words = chosen_words(options.words or ["nouns"])
    refinements = chosen_refinements(options.refine) or ()
    methods = parse_methods(options.methods or ["quick"])
    budget = Budget(options.budget_passes, options.budget_seconds)
    check_name("scale", options.scale, SCALES)
    check_name("order", options.sort, SORTS)
    device = check_options(options)
    folder = prepare_folder(options.output, "comparison")
    with progress() as say:
        picture, scene = picture_of(options)
        forward = written(options, picture, device, say)
        pieces = forward.adapter.pieces(forward.trajectory.tokens[0].tolist())
        count = iter(range(1, len(methods) + 1))

        def mask(target: Target) -> Any:
            return None if scene is None else scene_mask(scene, pieces, target)

        comparison = compare_bound(
            forward,
            words,
            methods,
            score=options.score or "commit",
            refinements=refinements,
            masks=None if scene is None else mask,
            budget=budget,
            seed=options.seed,
            progress=lambda name: say(f"Method {next(count)} of {len(methods)}: {name}"),
        )
        _check_some_worked(comparison)
        say("Drawing panel.png")
        write_comparison(comparison, folder, scale=options.scale)
    return Compared(comparison, folder, source_of(options, scene), options.sort)


def _check_some_worked(comparison: Comparison) -> None:
    """Nothing is written, and nothing replaced, when no method gave a map."""
    for row in comparison.rows:
        if any(row.complete) or any(bool(maps.any()) for maps in row.maps):
            return
    reasons = "; ".join(f"{row.name}: {row.note}" for row in comparison.rows)
    raise InputError(f"no method gave a map. {reasons}")


def list_methods() -> list[dict[str, Any]]:
    """One record a method, in the order of the table."""
    return [_method(name) for name in method_names()]


def _method(name: str) -> dict[str, Any]:
    cls = METHODS[name]
    facts = cls.facts
    return {
        "name": name,
        "label": facts.label,
        "group": facts.group,
        "source": facts.source,
        "passes": facts.passes,
        "needs": list(facts.needs),
        "maps": ["image", "text"] if facts.text else ["image"],
        "target_blind": facts.target_blind,
        "stochastic": facts.stochastic,
        "expensive": facts.expensive,
        "runs_on": list(facts.runs_on),
        "settings": {f.name: _default(f) for f in fields(cls)},  # type: ignore[arg-type]
    }


def _default(field: Field[Any]) -> Any:
    """A setting's default as JSON knows it."""
    value = field.default
    if value is MISSING:
        value = None if field.default_factory is MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value
