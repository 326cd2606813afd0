r"""From an image and a prompt to an explanation, in one function; and to two, of another word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks, maps
from captum_dcam.errors import InfeasibleStepError, InputError, TargetError
from captum_dcam.metrics import rank_correlation, top_overlap
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.answers import (
    AnswerLike,
    bind_answer,
    check_answer,
    force,
    without_steps,
)
from captum_dcam.model.foils import FoilLike, check_foil, with_foils
from captum_dcam.model.forward import DenoisingForward, check_example, holding
from captum_dcam.model.progress import ProgressLike, as_progress, watched
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.trajectory import Score
from captum_dcam.model.weights import identity
from captum_dcam.model.words import (
    Target,
    WordsLike,
    answer_text,
    answer_token_texts,
    asked,
    resolve,
)
from captum_dcam.presets import Preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.refine import Compose, Refinement
from captum_dcam.results.edit import Edit
from captum_dcam.results.explanation import Explanation, versions
from captum_dcam.results.steps import StepMaps
from captum_dcam.truth.trust import TrustReader, completed


def explain(
    adapter: Adapter,
    image: Pictures,
    prompt: Prompt,
    words: WordsLike = None,
    *,
    foil: FoilLike = None,
    answer: AnswerLike = None,
    every_step: bool = False,
    layer: int | None = None,
    preset: str | Preset = "default",
    score: Score | None = None,
    step: int | None = None,
    product: str | None = None,
    center: bool | None = None,
    backward: str | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    tagger: str | None = None,
    trust: bool = False,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
    progress: ProgressLike = None,
    **generation: Any,
) -> Explanation:
    r"""Generate an answer and explain its words.

    Args:
        adapter (Adapter): from :func:`captum_dcam.load` or :func:`captum_dcam.wrap`.
        image (path, PIL.Image.Image, Video or sequence): one image or video, or several; see
            :mod:`captum_dcam.model.images`.
        prompt (str or sequence of dict): the question, which may be empty, or the messages of a
            conversation, see :mod:`captum_dcam.model.prompts`.
        words (optional): what to explain, see :func:`captum_dcam.model.words.resolve`.
            Default: every word
        foil (str or dict, optional): why this word and not that one: what might stand in the place
            of every word, or of single words ({"red": "blue"}). A word's map is then of the
            difference of logits, see :func:`captum_dcam.model.foils.with_foils`. Default: none
        answer (str, sequence of int or Reveals, optional): explain this text, or these token ids,
            as if the model had written it, see :func:`captum_dcam.model.answers.force`; or what it
            wrote elsewhere, with the step of every token, see
            :mod:`captum_dcam.model.reveals`. Then nothing is decoded, and settings of decoding are
            refused. In ``"a [MASK] circle"`` the model fills the hole, see
            :mod:`captum_dcam.model.infill`, and words are those that it wrote. Default: what the
            model writes
        every_step (bool, optional): also give the map and the probability of every word at every
            denoising step, see :func:`explain_steps`. Default: False
        layer (int, optional): block to tap. Default: the preset's where its file names one, or the
            family's recommended block
        preset (str or Preset, optional): ``default``, ``paper`` or ``base``, the path of a file
            that ``captum-dcam calibrate`` wrote. Default: ``"default"``
        score, step, product, center, backward, refinements: as in
            :meth:`captum_dcam.attribution.DiffusionCAM.attribute`. Default: the preset's
        tagger (str, optional): who tells nouns and function words, see
            :func:`captum_dcam.model.tagging.tag`. Default: the preset's
        trust (bool, optional): compute sign check, relevance of text and probabilities of every
            step now, and not when :attr:`Explanation.trust` is asked for them. Default: False
        generator (torch.Generator, optional): for sampled decoding.
        internal_batch_size (int, optional): number of words per backward pass, see
            :class:`~captum_dcam.model.forward.DenoisingForward`. Default: the forward's
        progress (bool or callable, optional): True shows what is done and counts the model's
            passes, see :mod:`captum_dcam.model.progress`. Default: nothing
        **generation: the family's decoding settings (``gen_length``, ``steps``, …), or
            ``decoding="demo"``, as :meth:`DenoisingForward.generate` takes them.

    Returns:
        Explanation: maps of every target at token resolution.
    """
    images = pictures_of(image)
    chosen = find_preset(preset)  # what cannot be read is refused before any work
    reading = chosen.reading(
        score=score, product=product, center=center, step=step, tagger=tagger, backward=backward
    )
    check_foil(foil)
    checks.draws("generator", generator)
    check_answer(answer, reading.score, generator, generation, adapter)
    told = as_progress(progress, "explain")
    if checks.flag("every_step", every_step):
        check_steps(without_steps(answer), step)
    block = chosen.layer if layer is None else layer
    forward = DenoisingForward(adapter, block, internal_batch_size=internal_batch_size)
    request = adapter.prepare([images], [prompt])
    with forward.held(), watched(adapter, told, "explain"):
        told.say("the answer")
        bind_answer(forward, request, answer, generator, generation)
        told.say("its words")
        return explain_generation(
            forward,
            words,
            foil=foil,
            every_step=every_step,
            preset=chosen,
            score=score,
            step=step,
            product=product,
            center=center,
            backward=backward,
            refinements=refinements,
            tagger=tagger,
            trust=trust,
        )


@holding
def explain_generation(
    forward: DenoisingForward,
    words: WordsLike = None,
    *,
    example: int = 0,
    foil: FoilLike = None,
    every_step: bool = False,
    preset: str | Preset = "default",
    score: Score | None = None,
    step: int | None = None,
    product: str | None = None,
    center: bool | None = None,
    backward: str | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    tagger: str | None = None,
    trust: bool = False,
) -> Explanation:
    r"""Explain words of one example of a generation that is bound to ``forward`` already.

    Args and returns as :func:`explain`; ``example`` chooses from the batch.
    """
    chosen = find_preset(preset)
    if checks.flag("every_step", every_step):
        check_steps(forward.trajectory.forced, step)
    forward.trajectory.check_score(chosen.score if score is None else score)
    reading = chosen.reading(
        score=score, product=product, center=center, step=step, tagger=tagger, backward=backward
    )
    refine = maps.as_compose(chosen.refinements() if refinements is None else refinements)
    request, trajectory = forward.request, forward.trajectory
    example = check_example(request, example)
    tokens = trajectory.tokens[example].tolist()
    targets = _targets(forward, example, words, reading, foil)
    steps = _steps(forward, targets, reading, refine, example) if every_step else None
    read = TrustReader(forward, targets, reading, example, text=checks.flag("trust", trust))
    signed, refined = maps.explained(
        forward, targets, reading, refine, example, seen=read.seen, rows=read.rows
    )
    found = read.found(
        signed, refined, chosen, refine, None if steps is None else steps.probabilities
    )
    return Explanation(
        prompt=request.prompts[example],
        answer=answer_text(forward.adapter, tokens),
        targets=targets,
        maps=tuple(m.cpu() for m in refined),
        peaks=tuple(m.relu().amax((-2, -1)).cpu() for m in signed),
        token_texts=answer_token_texts(forward.adapter, tokens),
        layout=request.layout,
        trajectory=trajectory.single(example),
        settings={
            "family": forward.adapter.family,
            **identity(forward.adapter),
            "layer": forward.layer,
            "preset": chosen.name,
            "score": reading.score,
            "step": reading.step,
            "product": reading.product,
            "center": reading.center,
            "backward": reading.backward,
            "refinements": refine.describe(),
            "tagger": reading.tagger,
            "foil": dict(foil) if isinstance(foil, Mapping) else foil,
            "seed": trajectory.seed,
            "dtype": str(forward.adapter.dtype),
        },
        versions=versions(),
        images=request.images[example],
        steps=steps,
        trust=completed(found, forward, example) if trust else found,
    )


@holding
def explain_steps(
    forward: DenoisingForward,
    words: WordsLike = None,
    *,
    example: int = 0,
    foil: FoilLike = None,
    preset: str | Preset = "default",
    product: str | None = None,
    center: bool | None = None,
    backward: str | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    tagger: str | None = None,
) -> StepMaps:
    r"""Maps and probabilities of words at every denoising step of a bound generation.

    One prefill serves all steps where the prefix is cached; without a cache every step has image
    states of its own. At the steps after a word was committed it is visible to the model. Families
    that denoise one canvas or block after the other compute a word at some steps only; a causal
    model from the word's turn on, and the same at each of them.

    Args:
        forward (DenoisingForward): with a bound generation; no given answer, which has no steps.
        words, example, foil, preset, product, center, backward, refinements, tagger: as in
            :func:`explain_generation`.

    Returns:
        StepMaps: (S, N, h, w) per grid, scaled over a word's steps together, and (S, N).

    Raises:
        InfeasibleStepError: a given answer, or a word whose tokens no step computes together.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> trajectory = forward.generate(request, gen_length=8)
        >>> found = explain_steps(forward, "nouns")
        >>> found.words, found.maps[0].shape, found.probabilities.shape
        (('ring',), torch.Size([8, 1, 24, 24]), torch.Size([8, 1]))
    """
    chosen = find_preset(preset)
    check_steps(forward.trajectory.forced, None)
    reading = chosen.reading(product=product, center=center, tagger=tagger, backward=backward)
    refine = maps.as_compose(chosen.refinements() if refinements is None else refinements)
    example = check_example(forward.request, example)
    targets = _targets(forward, example, words, reading, foil)
    return _steps(forward, targets, reading, refine, example)


def _targets(
    forward: DenoisingForward, example: int, words: WordsLike, reading: maps.Reading, foil: FoilLike
) -> tuple[Target, ...]:
    """The words that were asked for, with their foils."""
    trajectory, tagger = forward.trajectory, reading.tagger
    tokens = trajectory.tokens[example].tolist()
    targets = asked(forward.adapter, trajectory, example, words, tagger, reading.score)
    return with_foils(forward.adapter, tokens, targets, foil)


def check_steps(forced: bool, step: int | None) -> None:
    """Raise for what excludes maps of every step."""
    if forced:
        raise InfeasibleStepError(
            "every step of an answer that was given, not generated: each of its states hides one "
            "token, and they are no steps of a generation; leave out every_step, or the answer"
        )
    if step is not None:
        raise InputError(
            f"step is {step} together with every_step, which explains each step's own image "
            "states: leave one of them out"
        )


def _steps(
    forward: DenoisingForward,
    targets: tuple[Target, ...],
    reading: maps.Reading,
    refine: Compose,
    example: int,
) -> StepMaps:
    shown, peaks, probabilities = maps.explained_steps(forward, targets, reading, refine, example)
    return StepMaps(
        targets, tuple(m.cpu() for m in shown), tuple(p.cpu() for p in peaks), probabilities
    )


# -- a word is another -----------------------------------------------------------------------------


def exchange_word(
    adapter: Adapter,
    image: Pictures,
    prompt: Prompt,
    word: str,
    other: str,
    words: WordsLike = None,
    *,
    answer: AnswerLike = None,
    layer: int | None = None,
    generator: torch.Generator | None = None,
    generation: dict[str, Any] | None = None,
    **how: Any,
) -> Edit:
    r"""Exchange a word of an answer, and explain both answers in the same way.

    Both are given answers (:func:`captum_dcam.model.answers.force`): every word is read with all
    others visible, so that nothing differs but the word.

    Args:
        adapter (Adapter), image, prompt: as in :func:`captum_dcam.explain`.
        word (str): what is exchanged; it stands in the answer once. A longer part of the text says
            which, where there are several.
        other (str): what stands there instead; of any number of tokens.
        words (optional): of the answer before, to explain in both, see
            :func:`captum_dcam.model.words.resolve`. Default: every word
        answer (str or sequence of int, optional): the answer before; ``[MASK]`` is filled first.
            Default: what the model writes
        layer (int, optional), **how: as in :func:`captum_dcam.explain_generation`.
        generator (torch.Generator, optional), generation (dict, optional): of decoding, where the
            model writes. Default: the family's settings

    Returns:
        Edit: both explanations, and how far each word's map moved.

    Raises:
        TargetError: the word is not in the answer, or several times; or the other has no token.
        InputError: they are the same.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter, image = captum_dcam.load("mini"), make_scene(0, 3).image
        >>> found = exchange_word(
        ...     adapter, image, "describe the image .", "purple", "red", answer="a purple ring ."
        ... )
        >>> found.before.words, found.after.words, found.exchanged
        (('a', 'purple', 'ring'), ('a', 'red', 'ring'), (False, True, False))
        >>> bool((found.correlation <= 1).all())
        True
    """
    for name, text in (("word", word), ("other", other)):
        if not isinstance(text, str) or not text.strip():
            raise TargetError(f"{name} is {text!r}: expected a text")
    if word.split() == other.split():
        raise InputError(f"word and other are both {word!r}: give another word in its place")
    settings = generation or {}
    chosen = find_preset(how.get("preset", "default"))
    reading = chosen.reading(score=how.get("score"), tagger=how.get("tagger"))
    check_answer(answer, reading.score, generator, settings, adapter)
    images = pictures_of(image)
    forward = DenoisingForward(adapter, chosen.layer if layer is None else layer)
    request = adapter.prepare([images], [prompt])
    with forward.held():
        bind_answer(forward, request, answer, generator, settings)
        before = _said(forward)
        old = _place(adapter, before, word)
        first, end = old.positions[0], old.positions[-1] + 1
        blank = adapter.token_texts([before[first]])[0][:1].isspace()
        new = adapter.encode(f" {other.strip()}" if blank else other.strip())
        if not new:
            raise TargetError(f"other is {other!r}: {adapter.family} makes no token of it")
        after = [*before[:first], *new, *before[end:]]
        targets = resolve(adapter, before, words, reading.tagger)
        moved = [_moved(t, after, first, end, len(new), (word, other)) for t in targets]
        found = []
        for ids, own in ((before, list(targets)), (after, moved)):
            force(forward, ids, request)
            found.append(explain_generation(forward, own, **how))
    one, two = found
    exchanged = tuple(any(first <= p < end for p in t.positions) for t in targets)
    return Edit(one, two, exchanged, *_distances(one, two))


def _said(forward: DenoisingForward) -> list[int]:
    """Ids of the bound answer without the stop tokens at its end."""
    ids: list[int] = forward.trajectory.tokens[0].tolist()
    while ids and ids[-1] in forward.adapter.stop_ids:
        ids.pop()
    return ids


def _place(adapter: Adapter, ids: Sequence[int], word: str) -> Target:
    """Where the word stands, as whole tokens."""
    found = resolve(adapter, ids, word)
    if len(found) > 1:
        raise TargetError(
            f"{word!r} stands in the answer {len(found)} times: give more of the text around the "
            "one to exchange, such as two words in a row"
        )
    places = found[0].positions
    text = "".join(adapter.token_texts(ids)[places[0] : places[-1] + 1]).strip()
    if text.casefold().split() != word.casefold().split():
        raise TargetError(f"the tokens of {word!r} read {text!r}: exchange all of that")
    return found[0]


def _moved(
    target: Target, ids: Sequence[int], first: int, end: int, new: int, texts: tuple[str, str]
) -> Target:
    """A word of the answer before, in the answer after, whose tokens ``ids`` are."""
    places: list[int] = []
    for p in target.positions:
        if first <= p < end:
            places += [one for one in range(first, first + new) if one not in places]
        else:
            places.append(p if p < first else p + new - (end - first))
    inside = any(first <= p < end for p in target.positions)
    text = target.text.replace(*texts) if inside and texts[0] in target.text else target.text
    if inside and text == target.text:
        text = texts[1]  # a part of what was exchanged
    return Target(text, tuple(places), tuple(ids[p] for p in places))


def _distances(one: Explanation, other: Explanation) -> tuple[Tensor, Tensor, Tensor]:
    """Rank correlation, distance of peaks, and overlap of every word's two maps."""
    both = [torch.cat([m.flatten(1) for m in e.maps], 1).double() for e in (one, other)]
    overlap = top_overlap(both[0][:, None], both[1][:, None])
    apart = [_apart(_peak(one, n), _peak(other, n)) for n in range(len(both[0]))]
    return rank_correlation(*both), torch.tensor(apart, dtype=torch.float64), overlap


def _peak(explanation: Explanation, number: int) -> tuple[int, float, float, float] | None:
    """Image, x, y of a word's highest token, and the image's diagonal, in pixels."""
    grids = explanation.layout.grids
    best = max(range(len(grids)), key=lambda i: float(explanation.maps[i][number].max()))
    box = explanation.focus(number, best)["peak"]
    if box is None:
        return None
    height, width = grids[best].image_size
    diagonal = float((height**2 + width**2) ** 0.5)
    return grids[best].image, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, diagonal


def _apart(one: Any, other: Any) -> float:
    if one is None or other is None or one[0] != other[0]:
        return float("nan")
    return float(((one[1] - other[1]) ** 2 + (one[2] - other[2]) ** 2) ** 0.5 / one[3])
