r"""Any set of methods on the same model, image, answer and words, side by side."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_dcam import checks, maps
from captum_dcam.errors import BudgetExhaustedError, InputError, InputTypeError, MethodError
from captum_dcam.methods import (
    METHODS,
    Attribution,
    AttributionTask,
    Budget,
    Cost,
    Method,
    metered,
    method,
    method_names,
)
from captum_dcam.metrics import LocalizationScores, localization
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.answers import AnswerLike, bind_answer, check_answer
from captum_dcam.model.foils import FoilLike, check_foil, with_foils
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.layout import Layout
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.progress import ProgressLike, as_progress, watched
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.sequence import text_tokens
from captum_dcam.model.tagging import DEFAULT_TAGGER, check_tagger
from captum_dcam.model.trajectory import STORED_CACHES, Score, check_score
from captum_dcam.model.weights import identity
from captum_dcam.model.words import Target, WordsLike, answer_text, asked
from captum_dcam.refine import Compose, Refinement
from captum_dcam.results.comparison import Comparison, ComparisonRow
from captum_dcam.results.explanation import versions

#: what :func:`compare` runs when nothing is asked for: one or two methods of each kind that needs
#: no extra, each of a few passes per word
QUICK = (
    "diffusion_cam",
    "diffusion_cam_paper",
    "diffusion_cam_base",
    "finer_cam",
    "logit_lens",
    "tam",
    "attention",
    "attn_lrp",
    "layer_gradient_x_activation",
    "saliency",
)
Mask = np.ndarray | Tensor
#: masks of words: by text, one per target, or a function of the target
MasksLike = Mapping[str, Mask] | Sequence[Mask | None] | Callable[[Target], Mask | None] | None
#: a name, or a method with its settings
MethodLike = str | Method


def compare(
    adapter: Adapter,
    image: Pictures,
    prompt: Prompt,
    words: WordsLike = None,
    methods: str | Sequence[MethodLike] | None = None,
    *,
    foil: FoilLike = None,
    answer: AnswerLike = None,
    layer: int | None = None,
    score: Score = "commit",
    backward: str = "exact",
    refinements: Refinement | Sequence[Refinement] = (),
    masks: MasksLike = None,
    budget: Budget | Mapping[str, Budget] | None = None,
    seed: int = 0,
    errors: str = "report",
    tagger: str = DEFAULT_TAGGER,
    progress: ProgressLike = None,
    **generation: Any,
) -> Comparison:
    r"""Generate an answer and explain its words by several methods.

    Args:
        adapter (Adapter): from :func:`captum_dcam.load` or :func:`captum_dcam.wrap`.
        image (path, PIL.Image.Image, Video or sequence): one image or video, or several; see
            :mod:`captum_dcam.model.images`.
        prompt (str or sequence of dict): the question, or the messages of a conversation.
        words (optional): what to explain, see :func:`captum_dcam.model.words.resolve`.
            Default: every word
        methods (optional): ``"all"``, or names and methods (``method("tam", eci=False)``).
            Default: :data:`QUICK`, one of each kind
        foil (str or dict, optional): why this word and not that one, as in
            :func:`captum_dcam.explain`; methods that differentiate no difference of logits fail.
            Default: none
        answer (str or sequence of int, optional): as in :func:`captum_dcam.explain`. Default: what
            the model writes
        layer (int, optional): block that methods read. Default: the family's recommended one
        score (str or int, optional): state whose logits methods read, or the number of a denoising
            step. Default: ``"commit"``
        backward (str, optional): how every method's gradients pass through norms, ``exact`` or
            ``constant_norms``, see :mod:`captum_dcam.model.norms`; methods whose rules or preset
            say it themselves keep their own. Default: ``"exact"``
        refinements (Refinement or sequence, optional): transforms of every method's positive maps;
            presets that bring their own keep those. Default: none
        masks (optional): where the words' objects are in the first image, (H, W) bool: by word,
            one per target, or a function of the target. Default: none, no scores
        budget (Budget or dict, optional): where an expensive method stops; one for all, or by
            name. Default: none
        seed (int, optional): of methods that draw and of sampled decoding. A method draws the same
            numbers whatever other methods run. Default: 0
        errors (str, optional): ``report`` (a method that fails says why in its row, the others go
            on) or ``raise``. Default: ``"report"``
        tagger (str, optional): who tells nouns and function words, see
            :func:`captum_dcam.model.tagging.tag`. Default: ``"phrases"``
        progress (bool or callable, optional): True shows a bar; a function receives every method's
            name before it runs, see :mod:`captum_dcam.model.progress`. Default: nothing
        **generation: the family's decoding settings.
    """
    images = pictures_of(image)
    chosen = chosen_methods(methods)  # names are checked before any work
    check_answer(answer, check_score(score), None, generation, adapter)
    check_foil(foil)
    seed = _check(backward, budget, seed, errors, progress)
    check_tagger(tagger)
    forward = DenoisingForward(adapter, layer, score)
    _check_packages(chosen, errors)
    request = adapter.prepare([images], [prompt])
    told = as_progress(progress, "compare", "method")
    generator = torch.Generator().manual_seed(seed)
    with forward.held():
        with watched(adapter, told, "compare"):
            told.say("generation")
            bind_answer(forward, request, answer, generator, generation)
        return compare_generation(
            forward,
            words,
            chosen,
            foil=foil,
            score=score,
            backward=backward,
            refinements=refinements,
            masks=masks,
            budget=budget,
            seed=seed,
            errors=errors,
            tagger=tagger,
            progress=told,
        )


@holding
def compare_generation(
    forward: DenoisingForward,
    words: WordsLike = None,
    methods: str | Sequence[MethodLike] | None = None,
    *,
    example: int = 0,
    foil: FoilLike = None,
    score: Score = "commit",
    backward: str = "exact",
    refinements: Refinement | Sequence[Refinement] = (),
    masks: MasksLike = None,
    budget: Budget | Mapping[str, Budget] | None = None,
    seed: int = 0,
    errors: str = "report",
    tagger: str = DEFAULT_TAGGER,
    progress: ProgressLike = None,
) -> Comparison:
    r"""Compare methods on one example of a generation that is bound to ``forward`` already.

    Args and returns as :func:`compare`; ``example`` chooses from the batch.
    """
    score = forward.trajectory.check_score(score)
    seed = _check(backward, budget, seed, errors, progress)
    chosen = chosen_methods(methods)
    check_tagger(tagger)
    _check_packages(chosen, errors)
    one = single(forward, example)
    request, trajectory = one.request, one.trajectory
    tokens = trajectory.tokens[0].tolist()
    targets = asked(one.adapter, trajectory, 0, words, tagger, score)
    targets = with_foils(one.adapter, tokens, targets, foil)
    if errors == "raise":
        for method_ in chosen:
            method_.check_foils(targets)
    refine = maps.as_compose(refinements)
    own_masks = _masks(masks, targets, request.layout)
    wanted = maps.needs_repeated(refine)
    repeated = maps.repeated_words(one, 0, tagger, score) if wanted else ()
    shared = _Shared(one, targets, repeated, refine, own_masks)
    rows = []
    with watched(one.adapter, progress, "compare", len(chosen), "method") as told:
        for name, method_ in _named(chosen):
            told.say(name)
            task = AttributionTask(one, shared.asked, score, generator_of(seed, name), backward)
            run = run_method(method_, task, _budget_of(budget, name, method_), errors)
            rows.append(shared.row(name, method_, run))
            told.image()
    return Comparison(
        prompt=request.prompts[0],
        answer=answer_text(one.adapter, tokens),
        targets=targets,
        rows=tuple(rows),
        layout=request.layout,
        tokens=text_tokens(one),
        commit_steps=tuple(trajectory.commits(0, t.positions) for t in targets),
        settings={
            "family": one.adapter.family,
            **identity(one.adapter),
            "regime": STORED_CACHES[trajectory.cache],
            "steps": trajectory.steps,
            "generation": dict(trajectory.settings),
            "layer": one.layer,
            "score": score,
            "backward": backward,
            "refinements": refine.describe(),
            "tagger": tagger,
            "foil": dict(foil) if isinstance(foil, Mapping) else foil,
            "seed": seed,
            "dtype": str(one.adapter.dtype),
        },
        versions=versions(),
        images=request.images[0],
        masks=own_masks,
    )


def _check(backward: Any, budget: Any, seed: Any, errors: Any, progress: Any) -> int:
    """Raise for settings that both functions share; gives the seed."""
    checks.choice("errors", errors, ("report", "raise"))
    checks.choice("backward", backward, BACKWARDS)
    for one in budget.values() if isinstance(budget, Mapping) else (budget,):
        if not isinstance(one, Budget | None):
            raise InputTypeError(
                f"budget is {one!r}, a {type(one).__name__}: expected Budget(passes=…), or by "
                "method's name"
            )
    as_progress(progress, "compare")
    return checks.whole("seed", seed, least=0)


def _budget_of(
    budget: Budget | Mapping[str, Budget] | None, name: str, method_: Method
) -> Budget | None:
    """A row's own budget, its method's, or that of all."""
    if isinstance(budget, Mapping):
        return budget.get(name, budget.get(method_.name))
    return budget


def _check_packages(methods: Sequence[Method], errors: str) -> None:
    """Where a method that fails is to raise, raise before any work for packages that it lacks."""
    if errors == "raise":
        for one in methods:
            one.check_packages()


def chosen_methods(methods: str | Sequence[MethodLike] | None) -> tuple[Method, ...]:
    """Methods from what a caller wrote; errors before any work."""
    if methods is None:
        methods = QUICK
    elif isinstance(methods, str):
        methods = method_names() if methods == "all" else [methods]
    out = []
    for one in methods:
        if not isinstance(one, str | Method):
            raise InputTypeError(f"method is a {type(one).__name__}: expected a name or a Method")
        out.append(method(one) if isinstance(one, str) else one)
    if not out:
        raise InputError(f"no methods: give names, which {METHODS.listed} lists, or 'all'")
    return tuple(out)


def _named(methods: Sequence[Method]) -> Iterator[tuple[str, Method]]:
    """Methods by unique names: one that comes again gets a number."""
    seen: Counter[str] = Counter()
    for one in methods:
        seen[one.name] += 1
        yield (one.name if seen[one.name] == 1 else f"{one.name}#{seen[one.name]}"), one


def generator_of(seed: int, name: str) -> torch.Generator:
    """A method's source of randomness, the same whatever other methods run."""
    return torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**64)


@dataclass(frozen=True, eq=False)
class MethodRun:
    r"""What one method gave for N words, and what it cost.

    Args:
        found (Attribution): its maps; zeros where there is none.
        status (str): ``done``, ``partial`` (its budget ended) or ``failed`` (``note`` says why).
        note (str): what a reader must know; empty if nothing.
        cost (Cost): of all words together.
    """

    found: Attribution
    status: str
    note: str
    cost: Cost

    @property
    def complete(self) -> tuple[bool, ...]:
        """For every word, whether its map is whole."""
        return tuple(self.found.done.tolist())

    def status_of(self, count: int) -> str:
        """The status of the first ``count`` words: the missing maps may be those of other words."""
        whole = self.status == "partial" and all(self.complete[:count])
        return "done" if whole else self.status


def run_method(
    method_: Method, task: AttributionTask, budget: Budget | None = None, errors: str = "report"
) -> MethodRun:
    r"""Run one method under the meter, without what an earlier method has left in memory.

    Args:
        method_ (Method): what to run.
        task (AttributionTask): words of a bound generation.
        budget (Budget, optional): where it stops. Default: never
        errors (str, optional): ``report`` (a failure becomes a run that says why) or ``raise``.
            Default: ``"report"``
    """
    found, note, cost = None, "", Cost()
    try:
        method_.check(task)
        with task.forward.afresh(), metered(task.forward, budget) as cost:
            found = method_.attribute(task)
        if not all(bool(m.isfinite().all()) for m in found.maps):
            found = None
            raise MethodError("its maps hold values that are not finite")
    except BudgetExhaustedError as error:
        note, status = f"{error} before any map was complete", "partial"
    except Exception as error:  # a rival that cannot run is a result, not the end
        if errors == "raise":
            raise
        note, status = f"{type(error).__name__}: {error}", "failed"
    if found is None:
        none = torch.zeros(len(task.targets), dtype=torch.bool)
        return MethodRun(Attribution(task.empty(), none), status, note, cost)
    status = "done" if bool(found.done.all()) else "partial"
    return MethodRun(found, status, found.note, cost)


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all methods of a comparison share: words, refinements, masks."""

    forward: DenoisingForward
    targets: tuple[Target, ...]
    repeated: tuple[Target, ...]
    refine: Compose
    masks: tuple[Tensor | None, ...] | None

    @property
    def asked(self) -> tuple[Target, ...]:
        """Every word that a method explains: the repeated ones too, where SICD needs them."""
        return maps.with_repeated(self.targets, self.repeated)

    def row(self, name: str, method_: Method, run: MethodRun) -> ComparisonRow:
        """A method's maps of the words that were asked for, refined and scored."""
        count, complete = len(self.targets), run.complete
        own = maps.mean_of(run.found.maps, self.asked, self.repeated, complete)
        raw = tuple(m[:count] for m in run.found.maps)
        stages = Compose([]) if run.status == "failed" or method_.refines else self.refine
        refined = maps.refine_words(raw, stages, maps.contexts_of(self.forward, own, stages))
        return ComparisonRow(
            name=name,
            label=method_.facts.label,
            group=method_.facts.group,
            settings=method_.describe(),
            status=run.status_of(count),
            note=run.note,
            maps=refined,
            raw=raw,
            complete=complete[:count],
            text=None if run.found.text is None else run.found.text[:count],
            cost=run.cost,
            scores=self._scores(refined[0], complete[:count]),
        )

    def _scores(
        self, values: Tensor, complete: Sequence[bool]
    ) -> tuple[LocalizationScores | None, ...] | None:
        """Localisation of every word that has a mask and a whole map."""
        if self.masks is None:
            return None
        pixels = self.forward.request.layout.grids[0].to_pixels(values)
        return tuple(
            localization(p, m) if m is not None and whole else None
            for p, m, whole in zip(pixels, self.masks, complete, strict=True)
        )


def _masks(
    masks: MasksLike, targets: Sequence[Target], layout: Layout
) -> tuple[Tensor | None, ...] | None:
    """One (H, W) bool per target, or None where there is no mask (or an empty one)."""
    if masks is None:
        return None
    found: list[Mask | None]
    if callable(masks):
        found = [masks(t) for t in targets]
    elif isinstance(masks, Mapping):
        found = [masks.get(t.text) for t in targets]
    else:
        found = list(masks)
        if len(found) != len(targets):
            raise InputError(f"{len(found)} masks for {len(targets)} words: give one each, or None")
    size = layout.grids[0].image_size
    out: list[Tensor | None] = []
    for target, one in zip(targets, found, strict=True):
        mask = None if one is None else torch.as_tensor(one).bool().cpu()
        if mask is not None and mask.shape != size:
            raise InputError(
                f"the mask of {target.text!r} has shape {tuple(mask.shape)}: expected {size}, the "
                "image's height and width"
            )
        out.append(mask if mask is not None and bool(mask.any()) else None)
    return tuple(out)
