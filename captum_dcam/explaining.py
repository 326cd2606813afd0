r"""From an image and a prompt to an explanation, in one function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from captum_dcam import checks, maps
from captum_dcam.errors import InfeasibleStepError, InputError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.answers import AnswerLike, bind_answer, check_answer, without_steps
from captum_dcam.model.foils import FoilLike, check_foil, with_foils
from captum_dcam.model.forward import DenoisingForward, check_example, holding
from captum_dcam.model.progress import ProgressLike, as_progress, watched
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target, WordsLike, answer_text, answer_token_texts, asked
from captum_dcam.presets import Preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.refine import Compose, Refinement
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
