r"""One answer in several models: what each looks at for the same words, and how each writes.

The same text is forced into every model, so that their maps are of the same words. How a model
writes is read from its own generation, because a given answer has no steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from captum_dcam import checks
from captum_dcam.comparing.methods import (
    MasksLike,
    MethodLike,
    chosen_methods,
    compare_generation,
)
from captum_dcam.errors import InputError, InputTypeError, TargetError
from captum_dcam.metrics import agreement
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.answers import check_answer, force
from captum_dcam.model.foils import FoilLike, check_foil
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.infill import has_holes, plain
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.progress import Progress, ProgressLike, as_progress
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.segmentation import folded
from captum_dcam.model.tagging import DEFAULT_TAGGER, check_tagger
from captum_dcam.model.trajectory import Score, Trajectory, check_score
from captum_dcam.model.words import WordsLike, answer_text, words_of
from captum_dcam.refine import Refinement
from captum_dcam.results.comparison import Comparison, ComparisonRow
from captum_dcam.results.model_comparison import ModelComparison, WordAgreement, WritingOrder

#: cells in a line that maps of other layouts are brought to, at most
FINEST = 64


def compare_models(
    models: Sequence[Adapter] | Mapping[str, Adapter],
    image: Pictures,
    prompt: Prompt,
    words: WordsLike = None,
    methods: str | Sequence[MethodLike] = ("diffusion_cam",),
    *,
    answer: str | None = None,
    foil: FoilLike = None,
    layers: Sequence[int | None] | None = None,
    score: Score = "commit",
    backward: str = "exact",
    refinements: Refinement | Sequence[Refinement] = (),
    masks: MasksLike = None,
    seed: int = 0,
    errors: str = "report",
    tagger: str = DEFAULT_TAGGER,
    internal_batch_size: int | None = None,
    progress: ProgressLike = None,
    generation: Sequence[Mapping[str, Any] | Trajectory] | None = None,
) -> ModelComparison:
    r"""Force one answer into several models and explain its words in each.

    Every model reads the answer in its own way: a denoising model each token with all others
    known, an autoregressive one with those before it (:func:`captum_dcam.model.answers.force`).

    Args:
        models (sequence or dict): at least two adapters, perhaps by name. Default names: the
            families, numbered where one comes twice
        image, prompt: as in :func:`captum_dcam.compare`.
        words (str or sequence of str, optional): texts, ``"all"`` or ``"nouns"``; positions of
            tokens differ between tokenizers and are refused. Default: every word
        methods (optional): as in :func:`captum_dcam.compare`; each runs on each model.
            Default: Diffusion-CAM alone
        answer (str, optional): the text. Default: what the first model writes
        foil (optional), score (str, optional), backward (str, optional), refinements (optional),
            masks (optional), seed (int, optional), errors (str, optional), tagger (str, optional),
            progress (callable, optional): as in :func:`captum_dcam.compare`; a given answer has no
            numbered steps.
        layers (sequence of int or None, optional): block of each model. Default: recommended ones
        generation (sequence of dict or Trajectory, optional): decoding settings of each model for
            the answer that it writes itself, or what it has written of this image and prompt
            already. Default: the families' own
        internal_batch_size (int, optional): as in
            :class:`~captum_dcam.model.forward.DenoisingForward`. Default: what fits

    Raises:
        InputError: fewer than two models, or lists of another length than the models.
        TargetError: a tokenizer cannot spell the answer, or finds other words in it; names the
            model and the first difference.

    Examples:
        >>> import captum_dcam
        >>> from captum_dcam.data.scenes import make_scene
        >>> image = make_scene(2_000_003, 12).image
        >>> both = [captum_dcam.load("mini"), captum_dcam.load("mini_ar")]
        >>> found = captum_dcam.compare_models(both, image, "describe the image .", "nouns")
        >>> found.models
        ('mini', 'mini_ar')
    """
    named = _named(models)
    images = pictures_of(image)
    chosen = chosen_methods(methods)
    checked = check_score(score)
    _check_text(answer, checked)
    check_foil(foil)
    check_tagger(tagger)
    told = as_progress(progress, "compare models", "model")
    _check_words(words)
    seed = checks.whole("seed", seed, least=0)
    depths = _each("layers", layers, len(named), None)
    settings = _each("generation", generation, len(named), {})
    forwards = {
        name: DenoisingForward(adapter, layer, checked, internal_batch_size=internal_batch_size)
        for (name, adapter), layer in zip(named.items(), depths, strict=True)
    }
    if answer is not None:
        _check_spelled(forwards, answer)
    requests = {name: f.adapter.prepare([images], [prompt]) for name, f in forwards.items()}
    orders = tuple(
        _order(name, forward.adapter, _written(forward, requests[name], own, seed))
        for (name, forward), own in zip(forwards.items(), settings, strict=True)
    )
    text = orders[0].answer if answer is None else answer
    if not text:
        raise TargetError(f"{orders[0].model} writes an empty answer: give answer=…")
    if answer is None:
        _check_spelled(forwards, text)
    how = {
        "words": words,
        "methods": chosen,
        "foil": foil,
        "score": checked,
        "backward": backward,
        "refinements": refinements,
        "seed": seed,
        "errors": errors,
        "tagger": tagger,
    }
    told.begin(len(forwards))
    try:
        found = _forced(forwards, requests, text, masks, told, how)
    finally:
        told.end()
    return _joined(found, orders)


def _written(
    forward: DenoisingForward, request: Request, own: Mapping[str, Any] | Trajectory, seed: int
) -> Trajectory:
    """What a model writes by itself, by its settings of decoding; or has written already."""
    if isinstance(own, Trajectory):
        return own
    with forward.held():
        return forward.generate(request, generator=torch.Generator().manual_seed(seed), **own)


def _forced(
    forwards: Mapping[str, DenoisingForward],
    requests: Mapping[str, Request],
    text: str,
    masks: MasksLike,
    told: Progress,
    how: Mapping[str, Any],
) -> dict[str, Comparison]:
    """Every model's comparison of methods on the answer; masks: of the first one's words."""
    found: dict[str, Comparison] = {}
    for name, forward in forwards.items():
        told.say(name)
        own = masks if masks is None or not found else next(iter(found.values())).masks
        with forward.held():
            force(forward, text, requests[name])
            found[name] = compare_generation(forward, masks=own, **how)
        _check_same_words(found)
        told.image()
    return found


# -- what is checked -------------------------------------------------------------------------------


def _named(models: Any) -> dict[str, Adapter]:
    """Models by name."""
    every = list(models.values()) if isinstance(models, Mapping) else list(models)
    for one in every:
        if not isinstance(one, Adapter):
            raise InputTypeError(
                f"a model is a {type(one).__name__}: expected adapters, from captum_dcam.load or "
                "captum_dcam.wrap"
            )
    if len(every) < 2:
        raise InputError(f"{len(every)} models: expected at least two to compare")
    if isinstance(models, Mapping):
        return dict(models)
    out: dict[str, Adapter] = {}
    for one in every:
        same = sum(other.family == one.family for other in out.values())
        out[one.family if not same else f"{one.family}#{same + 1}"] = one
    return out


def _each(what: str, given: Sequence[Any] | None, count: int, default: Any) -> list[Any]:
    if given is None:
        return [default] * count
    if isinstance(given, str | Mapping) or len(given) != count:
        raise InputError(f"{what} is {given!r}: expected one for each of the {count} models")
    return list(given)


def _check_text(answer: Any, score: Score) -> None:
    """A given answer is a whole text; whoever writes one, it is forced: no step has a number."""
    check_answer("it" if answer is None else answer, score, None, {})
    if answer is not None and not isinstance(answer, str):
        raise InputTypeError(
            f"answer is {answer!r}: expected a text, since token ids differ between tokenizers"
        )
    if has_holes(answer):
        raise InputError(
            f"the answer {answer!r} has holes: each model would fill them with words of its own; "
            "give a whole answer"
        )


def _check_words(words: WordsLike) -> None:
    texts = [words] if isinstance(words, str) or words is None else words
    for one in texts if isinstance(texts, Sequence) else [texts]:
        if one is not None and not isinstance(one, str):
            raise TargetError(
                f"word {one!r} is no text: positions and ids of tokens differ between models, so "
                "give words as they are written"
            )


def _check_spelled(forwards: Mapping[str, DenoisingForward], text: str) -> None:
    """Every tokenizer can spell the answer."""
    for name, forward in forwards.items():
        read = answer_text(forward.adapter, forward.adapter.encode(plain(text)))
        if folded(" ".join(read.split())) != folded(" ".join(plain(text).split())):
            raise TargetError(
                f"{name} cannot spell the answer {text!r}: its tokenizer reads {read!r}; give an "
                "answer=… in words that all models know"
            )


def _check_same_words(found: Mapping[str, Comparison]) -> None:
    """The last model's words are those of the first one."""
    first, name = next(iter(found)), list(found)[-1]
    wanted, words = ([folded(w) for w in found[n].words] for n in (first, name))
    if wanted != words:
        pairs = zip([*wanted, None], [*words, None], strict=False)
        one, other = next((a, b) for a, b in pairs if a != b)
        raise TargetError(
            f"{first} and {name} find other words in the answer: {one!r} and {other!r} are the "
            "first to differ; name the words to compare"
        )


# -- what is made of them --------------------------------------------------------------------------


def _order(name: str, adapter: Adapter, made: Trajectory) -> WritingOrder:
    """How a generation wrote its words."""
    tokens, steps = made.tokens[0].tolist(), made.commit_step[0].tolist()
    stop = adapter.stop_ids
    text, words = answer_text(adapter, tokens), words_of(adapter, tokens)
    first = [min(steps[p] for p in w.positions) for w in words]
    missing = [
        sum(steps[p] >= step and tokens[p] not in stop for p in range(min(w.positions)))
        for w, step in zip(words, first, strict=True)
    ]
    return WritingOrder(name, text, tuple(w.text for w in words), tuple(first), tuple(missing))


def _joined(
    found: Mapping[str, Comparison],
    orders: tuple[WritingOrder, ...],
) -> ModelComparison:
    """All models' rows on one layout, and how far their maps agree."""
    layouts = [one.layout for one in found.values()]
    common = None if all(_alike(layouts[0], other) for other in layouts) else _common(layouts)
    first = next(iter(found.values()))
    rows: list[ComparisonRow] = []
    by_model: dict[str, tuple[ComparisonRow, ...]] = {}
    for name, one in found.items():
        readable = one.tokens.token_texts == first.tokens.token_texts
        by_model[name] = tuple(
            replace(
                row,
                name=f"{name}: {row.name}",
                group=name,
                maps=_over(common, one.layout, row.maps),
                raw=_over(common, one.layout, row.raw),
                text=row.text if readable else None,
            )
            for row in one.rows
        )
        rows += by_model[name]
    single = {name: one.settings for name, one in found.items()}
    settings = {**first.settings, "family": ", ".join(found), "single": single}
    for key in ("model", "revision", "weights"):
        known = [own[key] for own in single.values()]
        settings[key] = ", ".join(map(str, known)) if any(known) else None
    joined = replace(first, rows=tuple(rows), layout=common or first.layout, settings=settings)
    return ModelComparison(joined, _agreement(by_model, joined), orders)


def _alike(one: Layout, other: Layout) -> bool:
    """Whether two models see the image through the same grids."""
    return len(one.grids) == len(other.grids) and all(
        a.shape == b.shape
        and a.image == b.image
        and torch.equal(a.x_edges, b.x_edges)
        and torch.equal(a.y_edges, b.y_edges)
        for a, b in zip(one.grids, other.grids, strict=True)
    )


def _common(layouts: Sequence[Layout]) -> Layout:
    """One grid over each image, as fine as the finest model's."""
    grids, start = [], 0
    for image in sorted({g.image for g in layouts[0].grids}):
        own = [[g for g in layout.grids if g.image == image] for layout in layouts]
        # grids of one image may stand side by side: the longest run of tokens in a line
        most = max(sum(max(g.shape) for g in grids_) for grids_ in own)
        height, width = own[0][0].image_size
        longer = min(most, FINEST)
        shape = (
            max(1, round(longer * min(1.0, height / width))),
            max(1, round(longer * min(1.0, width / height))),
        )
        grids.append(uniform_grid(start, shape, (height, width), image))
        start += shape[0] * shape[1]
    return Layout(tuple(grids), max(start, *(layout.prefix_length for layout in layouts)))


def _over(common: Layout | None, layout: Layout, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps of a model's own grids on the common ones."""
    if common is None:
        return tuple(maps)
    own = [m.float() for m in maps]
    most = max(max(g.shape) for g in layout.grids)
    out = []
    for grid in common.grids:
        k = max(1, -(-most // max(grid.shape)))  # tokens smaller than a cell are averaged
        fine = layout.over_image(own, grid.image, (grid.shape[0] * k, grid.shape[1] * k))
        out.append(avg_pool2d(fine[:, None], k)[:, 0] if k > 1 else fine)
    return tuple(out)


def _agreement(
    by_model: Mapping[str, tuple[ComparisonRow, ...]], joined: Comparison
) -> tuple[WordAgreement, ...]:
    """Of each method, pair of models and word whose maps are whole."""
    out = []
    for (first, ours), (second, theirs) in combinations(by_model.items(), 2):
        for one, other in zip(ours, theirs, strict=True):
            pairs = zip(one.maps, other.maps, strict=True)
            grids = [agreement(a, b) for a, b in pairs]
            for n in range(len(joined.words)):
                if not (one.complete[n] and other.complete[n]):
                    continue
                figures = (
                    float(torch.stack([getattr(g, what)[n] for g in grids]).mean())
                    for what in ("rank", "overlap", "distance")
                )
                method = one.name.removeprefix(f"{first}: ")
                out.append(WordAgreement(method, first, second, n, *figures))
    return tuple(out)
