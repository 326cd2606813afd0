r"""One image of an evaluation: an answer, its words, their maps by every variant, their scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.comparing import generator_of, run_method
from captum_dcam.errors import InputError
from captum_dcam.evaluation.answers import ANSWERS, Asked
from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.measure import Scores, VariantMaps, measure, numbers, spread
from captum_dcam.evaluation.plan import Plan, Variant
from captum_dcam.evaluation.words import Word, read_answer, read_masks
from captum_dcam.files import Record, canonical, digest
from captum_dcam.methods import AttributionTask, Budget
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.images import as_image
from captum_dcam.model.words import Target, answer_text, repeated_function_words
from captum_dcam.refine import (
    DACG,
    DACG_BRANCHES,
    RefineContext,
    Refinement,
    dacg_branch,
    needs_of,
    over_grids,
)

if TYPE_CHECKING:
    from captum_dcam.data import Sample

Say = Callable[[str], None]


def derived_seed(seed: int, *parts: Any) -> int:
    """A seed for one image and purpose: it does not depend on what else is measured."""
    return int(digest(canonical([seed, *parts]))[:14], 16)


@dataclass(frozen=True, eq=False)
class VariantResult:
    """A variant's raw maps of the words, then of the repeated words that refinements ask for.

    ``text`` is the relevance of text tokens.
    """

    raw: tuple[Tensor, ...]
    complete: tuple[bool, ...]
    status: str = "done"
    note: str = ""
    text: Tensor | None = None


@dataclass(frozen=True, eq=False)
class BoundImage:
    """What all variants of one image have in common."""

    image_id: Any
    forward: DenoisingForward
    words: tuple[Word, ...]
    repeated: tuple[Target, ...]
    masks: dict[str, Tensor]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The words, then the repeated words that are not among them."""
        return maps.with_repeated([w.target for w in self.words], self.repeated)

    def at(self, layer: int | None) -> DenoisingForward:
        """The same generation, tapped at another block."""
        adapter = self.forward.adapter
        if adapter.check_layer(layer) == self.forward.layer:
            return self.forward
        return self.forward.again(adapter.check_layer(layer))


class Trial:
    r"""Measures images one after another, and keeps nothing of them.

    Args:
        plan (Plan): what to measure.
        adapter (Adapter): the plan's model.
        on_error (str, optional): ``raise``, or ``skip``: a variant that fails says why in the
            record, and the others go on. Default: ``"raise"``
    """

    def __init__(self, plan: Plan, adapter: Adapter, on_error: str = "raise") -> None:
        self.plan, self.adapter, self.on_error = plan, adapter, on_error
        self.runs = plan.runs()
        self.layers = {v.name: adapter.check_layer(v.layer) for v in plan.variants if not v.floor}
        counts = [adapter.check_layer(run["layer"]) for run, _ in self.runs]
        # the block that most runs read: its outputs are kept, so that they recompute nothing below
        self.layer = max(counts, key=counts.count) if counts else adapter.recommended_block
        self.wants_repeated = any(maps.needs_repeated(v.stages()) for v in plan.variants)

    def measure(self, image_id: Any, sample: Sample, say: Say) -> tuple[Record, Record]:
        r"""Result and cost of one image, without its index; says each variant's name first."""
        start = time.perf_counter()
        say(f"{image_id}: answer")
        bound, result = self.answer(image_id, sample)
        cost: Record = {"generation": time.perf_counter() - start, "runs": [], "variants": {}}
        result["variants"] = {}
        for variant in self.plan.variants if bound.words else ():
            if variant.floor:
                say(f"{image_id}: {variant.name}")
                self._score(bound, variant, self._floor(bound, variant), result, cost)
        for run, variants in self.runs if bound.words else ():
            say(f"{image_id}: {variants[0].name}")
            found = self._run(bound, run, variants, cost)
            for variant in variants:
                self._score(bound, variant, found, result, cost)
        cost["seconds"] = time.perf_counter() - start
        return result, cost

    def answer(self, image_id: Any, sample: Sample) -> tuple[BoundImage, Record]:
        """The answer with its words and masks, and what is stored of it."""
        plan = self.plan
        prompt = sample.prompt if plan.prompt is None else plan.prompt
        if prompt is None:
            raise InputError("the data set has no prompt for it: give the plan one (--prompt)")
        forward = DenoisingForward(self.adapter, self.layer)
        image = as_image(sample.image(), upright=False)  # its masks fit the pixels as they are
        request = self.adapter.prepare([[image]], [prompt])
        generator = torch.Generator().manual_seed(derived_seed(plan.seed, image_id, "answer"))
        settings = dict(plan.answer)
        asked = Asked(request, sample, plan.generation, generator)
        ANSWERS[settings.pop("name")](forward, asked, **settings)
        trajectory = forward.trajectory
        judge = sample.judged if "labelled" in plan.words else None
        answer = read_answer(forward, sample.objects, judge)
        words = tuple(w for w in answer.words if w.kind in plan.words)
        masks = read_masks(words, sample.objects, request.layout.grids[0].image_size)
        repeated: tuple[Target, ...] = ()
        if self.wants_repeated:
            repeated = repeated_function_words(tuple(w.target for w in answer.words))
        tokens = trajectory.tokens[0].tolist()
        record = {
            "prompt": prompt,
            "answer": answer_text(self.adapter, tokens),
            "length": len([t for t in tokens if t not in self.adapter.stop_ids]),
            "steps": trajectory.steps,
            "calls": len(trajectory.calls),
            "feasible": len(trajectory.feasible),
            "lengths": [[n, len(list(same))] for n, same in groupby(trajectory.lengths)],
            "image_end": trajectory.image_end,
            "tagger": answer.tagger,
            "lemmatizer": answer.lemmatizer,
            "words": [_word_record(w, masks, trajectory) for w in words],
        }
        return BoundImage(image_id, forward, words, repeated, masks), record

    # -- maps -----------------------------------------------------------------------------------

    def _floor(self, bound: BoundImage, variant: Variant) -> VariantResult:
        found, complete = FLOORS[variant.method](
            bound.words,
            bound.masks,
            bound.forward.request.layout,
            derived_seed(self.plan.seed, bound.image_id, variant.method),
            **variant.settings,
        )
        return VariantResult(found, tuple(complete))

    def _run(
        self, bound: BoundImage, run: Record, variants: list[Variant], cost: Record
    ) -> VariantResult:
        method, words = variants[0].build(), bound.targets
        generator = generator_of(self._run_seed(bound, run), method.name)
        done = run_method(
            method,
            AttributionTask(
                bound.at(run["layer"]), words, run["score"], generator, variants[0].backward
            ),
            None if run["passes"] is None else Budget(run["passes"]),
            "raise" if self.on_error == "raise" else "report",
        )
        cost["runs"].append({"variants": [v.name for v in variants], **asdict(done.cost)})
        status = done.status_of(len(bound.words))
        return VariantResult(done.found.maps, done.complete, status, done.note, done.found.text)

    def _run_seed(self, bound: BoundImage, run: Record) -> int:
        return derived_seed(self.plan.seed, bound.image_id, run)

    def _refined(
        self, bound: BoundImage, variant: Variant, found: VariantResult, cost: Record
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, list[str] | None]:
        """Positive maps after refinements, the repeated words' on each grid, DACG's branches."""
        own = None
        if not variant.floor:
            own = maps.mean_of(found.raw, bound.targets, bound.repeated, found.complete)
        forward = bound.forward if variant.floor else bound.at(variant.layer)
        watched = [_Watched(stage) for stage in variant.stages()]
        contexts = maps.contexts_of(forward, own, watched)
        count = len(bound.words)
        try:
            refined = maps.refine_words([m[:count] for m in found.raw], watched, contexts)
        finally:
            cost["stages"] += [[w.describe()["name"], w.seconds] for w in watched]
        return refined, own, next((w.routes for w in reversed(watched) if w.routes), None)

    # -- scores ---------------------------------------------------------------------------------

    def _score(
        self,
        bound: BoundImage,
        variant: Variant,
        found: VariantResult,
        result: Record,
        cost: Record,
    ) -> None:
        """Refine and measure one variant; a failure says why in its record, or is raised."""
        record: Record = {"status": found.status}
        if found.note:
            record["note"] = found.note
        result["variants"][variant.name] = record
        if found.status == "failed":
            return
        complete = list(found.complete[: len(bound.words)])
        if not all(complete):
            record["complete"] = complete
            if not variant.floor:
                record["status"] = "partial"
        spent: Record = {"stages": []}
        cost["variants"][variant.name] = spent
        try:
            scores = self._measured(bound, variant, found, spent)
        except Exception as error:  # a variant that cannot be measured is a result, not the end
            if self.on_error == "raise":
                raise
            record.update(status="failed", note=f"{type(error).__name__}: {error}")
            return
        record["scores"], record["image"] = scores

    def _measured(
        self, bound: BoundImage, variant: Variant, found: VariantResult, spent: Record
    ) -> Scores:
        """Scores of the complete words in columns of all words; DACG's branches come last."""
        count = len(bound.words)
        refined, repeated, taken = self._refined(bound, variant, found, spent)
        at = [i for i in range(count) if found.complete[i]]
        own = {} if taken is None else {"dacg_route": spread([taken[i] for i in at], at, count)}
        if not at:
            return Scores(own)
        before = time.perf_counter()
        run_seed = self._run_seed(bound, variant.run)
        case = VariantMaps(
            tuple(bound.words[i] for i in at),
            tuple(m[at] for m in refined),
            tuple(m[:count][at] for m in found.raw),
            None if found.text is None else found.text[:count][at],
            bound.masks,
            bound.forward if variant.floor else bound.at(variant.layer),
            None if variant.floor else _explain(variant, repeated, run_seed),
            variant.score,
            bool(variant.refinements),
            derived_seed(self.plan.seed, bound.image_id, "metrics"),
        )
        scores = measure(case, self.plan.metrics)
        spent["metrics"] = time.perf_counter() - before
        words = {name: spread(column, at, count) for name, column in scores.words.items()}
        return Scores({**words, **own}, scores.image)


def branches_of(stage: DACG, maps: Tensor) -> Tensor:
    """The branch (N,) of DACG that each map takes, as a place in :data:`DACG_BRANCHES`."""
    bounds = {name: getattr(stage, name) for name in ("high_std", "high_mean", "low_mean")}
    return dacg_branch(maps, **bounds)


class _Watched:
    """A refinement that notes its seconds, and DACG's branch of the first grid's maps."""

    def __init__(self, stage: Refinement) -> None:
        self.stage, self.needs = stage, needs_of(stage)
        self.seconds = 0.0
        self.routes: list[str] | None = None

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        return self.over((maps,), (context,))[0]

    def over(
        self, maps: Sequence[Tensor], contexts: Sequence[RefineContext | None]
    ) -> tuple[Tensor, ...]:
        if isinstance(self.stage, DACG):
            self.routes = [DACG_BRANCHES[b] for b in branches_of(self.stage, maps[0]).tolist()]
        before = time.perf_counter()
        refined = over_grids(self.stage, maps, contexts)
        self.seconds += time.perf_counter() - before
        return refined

    def describe(self) -> Record:
        return self.stage.describe()


def _explain(variant: Variant, repeated: Sequence[Tensor] | None, seed: int) -> Callable[..., Any]:
    """The variant as a function of any bound forward and targets; always the same draws, and the
    same maps of repeated words."""

    def explain(forward: DenoisingForward, targets: tuple[Target, ...]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        one = single(forward)
        task = AttributionTask(one, tuple(targets), variant.score, generator, variant.backward)
        raw = variant.build().attribute(task).maps
        stages = variant.stages()
        if not stages:
            return raw
        return maps.refine_words(raw, stages, maps.contexts_of(one, repeated, stages))

    return explain


def _word_record(word: Word, masks: dict[str, Tensor], trajectory: Any) -> Record:
    """A word as it is stored; ``area`` is the share of the image that its mask fills."""
    where = list(word.target.positions)
    own = [masks[name] for name in word.objects if name in masks]
    area = numbers(torch.stack(own).any(0).float().mean()[None])[0] if own else None
    labels = {} if word.label is None else {"label": word.label, "span": word.span}
    return labels | {
        "text": word.target.text,
        "positions": where,
        "tokens": list(word.target.token_ids),
        "tag": word.tag,
        "kind": word.kind,
        "mask": word.name,
        "objects": list(word.objects),
        "phrase": word.phrase,
        "area": area,
        "commit": trajectory.commit_step[0, where].tolist(),
        "confidence": numbers(trajectory.confidence[0, where]),
    }
