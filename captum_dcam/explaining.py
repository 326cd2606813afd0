r"""From an image and a prompt to an explanation, in one function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks, maps
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward, check_example, holding
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.words import Target, WordsLike, answer_text, answer_token_texts, resolve
from captum_dcam.presets import Preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.refine import Refinement
from captum_dcam.results.explanation import Explanation, versions


def explain(
    adapter: Adapter,
    image: Pictures,
    prompt: Prompt,
    words: WordsLike = None,
    *,
    layer: int | None = None,
    preset: str | Preset = "default",
    score: str | None = None,
    step: int | None = None,
    product: str | None = None,
    center: bool | None = None,
    backward: str | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    tagger: str | None = None,
    generator: torch.Generator | None = None,
    internal_batch_size: int | None = None,
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
        layer (int, optional): block to tap. Default: the family's recommended block
        preset (str or Preset, optional): ``default``, ``paper`` or ``base``, the path of a file
            that ``captum-dcam calibrate`` wrote. Default: ``"default"``
        score, step, product, center, backward, refinements: as in
            :meth:`captum_dcam.attribution.DiffusionCAM.attribute`. Default: the preset's
        tagger (str, optional): who tells nouns and function words, see
            :func:`captum_dcam.model.tagging.tag`. Default: the preset's
        generator (torch.Generator, optional): for sampled decoding.
        internal_batch_size (int, optional): number of words per backward pass, see
            :class:`~captum_dcam.model.forward.DenoisingForward`. Default: the forward's
        **generation: the family's decoding settings (``gen_length``, ``steps``, …), or
            ``decoding="demo"``, as :meth:`DenoisingForward.generate` takes them.

    Returns:
        Explanation: maps of every target at token resolution.
    """
    images = pictures_of(image)
    chosen = find_preset(preset)  # what cannot be read is refused before any work
    chosen.reading(
        score=score, product=product, center=center, step=step, tagger=tagger, backward=backward
    )
    checks.draws("generator", generator)
    forward = DenoisingForward(adapter, layer, internal_batch_size=internal_batch_size)
    request = adapter.prepare([images], [prompt])
    with forward.held():
        forward.generate(request, generator=generator, **generation)
        return explain_generation(
            forward,
            words,
            preset=chosen,
            score=score,
            step=step,
            product=product,
            center=center,
            backward=backward,
            refinements=refinements,
            tagger=tagger,
        )


@holding
def explain_generation(
    forward: DenoisingForward,
    words: WordsLike = None,
    *,
    example: int = 0,
    preset: str | Preset = "default",
    score: str | None = None,
    step: int | None = None,
    product: str | None = None,
    center: bool | None = None,
    backward: str | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    tagger: str | None = None,
) -> Explanation:
    r"""Explain words of one example of a generation that is bound to ``forward`` already.

    Args and returns as :func:`explain`; ``example`` chooses from the batch.
    """
    chosen = find_preset(preset)
    reading = chosen.reading(
        score=score, product=product, center=center, step=step, tagger=tagger, backward=backward
    )
    refine = maps.as_compose(chosen.refinements() if refinements is None else refinements)
    request, trajectory = forward.request, forward.trajectory
    example = check_example(request, example)
    tokens = trajectory.tokens[example].tolist()
    targets = resolve(forward.adapter, tokens, words, reading.tagger)
    signed, refined = maps.explained(forward, targets, reading, refine, example)
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
            "dtype": str(forward.adapter.dtype),
        },
        versions=versions(),
        images=request.images[example],
    )


@holding
def sign_check(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Sequence[Tensor],
    generator: torch.Generator,
    *,
    example: int = 0,
    score: str = "commit",
    share: float = 0.1,
) -> Tensor:
    r"""Does removing what a map highlights lower the token's probability?

    The mean image token replaces the ``share`` of image tokens with the highest values at the tap,
    and, for comparison, the same number of random ones. Then the explained tokens are read again.

    Args:
        forward (DenoisingForward): with the bound generation.
        targets (sequence of Target): N targets of the example.
        maps (sequence of Tensor): one (N, h, w) per grid.
        generator (torch.Generator): draws the random tokens.
        example (int, optional), score (str, optional): as in :func:`explain_generation`.
        share (float, optional): fraction of image tokens removed. Default: 0.1

    Returns:
        Tensor: (N, 2) float64: the fall of the log-probability (mean over the target's tokens) when
        the highlighted tokens are removed, and when random ones are. A map whose first column is
        not above the second is no evidence; one whose first column is below zero is inverted.
    """
    share = checks.real("share", share, 0, 1, above=True)
    checks.draws("generator", generator)
    out = torch.zeros(len(targets), 2, dtype=torch.float64)
    for n, target in enumerate(targets):
        before = _log_probability(forward, target, example, score)
        for column, values in enumerate(
            ([m[n] for m in maps], [torch.rand(m[n].shape, generator=generator) for m in maps])
        ):
            masks = [_top(v, share) for v in values]

            def erase(features: Tensor, grid: int, masks: list[Tensor] = masks) -> Tensor:
                mean = features.mean((-2, -1), keepdim=True)
                return torch.where(masks[grid].to(features.device), mean, features)

            with forward.edited(erase):
                out[n, column] = before - _log_probability(forward, target, example, score)
    return out


def _top(values: Tensor, share: float) -> Tensor:
    """Boolean mask of the highest ``share`` of values; the first of equal ones count."""
    count = max(1, round(share * values.numel()))
    order = values.flatten().float().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order.cpu()] = True
    return mask.view(values.shape)


def _log_probability(forward: DenoisingForward, target: Target, example: int, score: str) -> float:
    """Mean log-probability of a target's tokens, each read at its own step."""
    trajectory = forward.trajectory
    steps = [trajectory.step_of(example, p, score) for p in target.positions]
    with torch.no_grad():
        logits = forward.replay(torch.full((len(steps),), example), torch.tensor(steps))
    rows = torch.arange(len(steps))
    chosen = logits[rows, list(target.positions)].double().log_softmax(-1)
    return float(chosen[rows, list(target.token_ids)].mean())
