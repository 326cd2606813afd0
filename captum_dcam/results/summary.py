r"""An explanation in a few words: one row per word, and its scores where masks are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from captum_dcam.data.scenes import Scene, scene_mask
from captum_dcam.metrics import LocalizationScores, localization
from captum_dcam.model.trajectory import NO_STEP
from captum_dcam.model.words import Target, least_sure
from captum_dcam.results.explanation import Explanation, region
from captum_dcam.results.scores import WordScores
from captum_dcam.results.trust import Candidate


@dataclass(frozen=True)
class WordSummary:
    r"""One explained word.

    Args:
        number (int): from 1, in the order of the explanation.
        word (str): its text.
        positions (tuple of int): of its tokens in the answer.
        steps (tuple of int): the steps that committed them, each once; -1: it was given.
        confidence (float): probability at that step, of the least sure token.
        image (int): the image that the word looks at most, from 0.
        region (str): where its highest token lies, in words.
        peak (tuple or None): (x0, y0, x1, y1) in pixels of its highest token; None: an empty map.
        area (float): fraction of image tokens that hold half of its mass.
        localises (float or None): how well its map does, see :class:`Trust`; None: not known.
        doubtful (bool): its map is said to localise nothing.
        instead (tuple): (text, probability) of what else might have stood in the place of its
            most contested token, the likeliest first.
        said (str): what the steps say of whether the word is so, in a few words; empty where
            that was not computed.
        doubted (bool): a calibrator says that it is probably not grounded.
    """

    number: int
    word: str
    positions: tuple[int, ...]
    steps: tuple[int, ...]
    confidence: float
    image: int
    region: str
    peak: tuple[float, float, float, float] | None
    area: float
    localises: float | None
    doubtful: bool
    instead: tuple[tuple[str, float], ...]
    said: str = ""
    doubted: bool = False

    @property
    def when(self) -> str:
        """The steps as text; "given" for a token that the answer brought with it."""
        return ", ".join("given" if step == NO_STEP else str(step) for step in self.steps)


def summarise(explanation: Explanation) -> tuple[WordSummary, ...]:
    """One row per explained word, in order."""
    confidence = explanation.trajectory.confidence[0].tolist()
    grids, trust = explanation.layout.grids, explanation.trust
    scores = None if trust is None else trust.parts.get("scores")
    rows = []
    for n, (target, steps) in enumerate(
        zip(explanation.targets, explanation.commit_steps(), strict=True)
    ):
        peaks = [float(p[n]) for p in explanation.peaks]
        best = peaks.index(max(peaks))
        focus = explanation.focus(n, best)
        rows.append(
            WordSummary(
                number=n + 1,
                word=target.text,
                positions=target.positions,
                steps=tuple(sorted(set(steps))),
                confidence=least_sure(confidence, target),
                image=grids[best].image,
                region=_region(focus["peak"], grids[best].image_size),
                peak=focus["peak"],
                area=focus["area"],
                localises=None if trust is None else float(trust.localises[n]),
                doubtful=trust is not None and trust.doubtful[n],
                instead=() if trust is None else _instead(target, trust.candidates[n]),
                said="" if scores is None else _said(scores, n),
                doubted=scores is not None and scores.doubted[n],
            )
        )
    return tuple(rows)


def given_words(explanation: Explanation) -> tuple[tuple[tuple[str, float], ...], ...]:
    r"""What the given words of an answer with holes say for every explained word.

    Returns:
        tuple: per target (text, relevance), the strongest first: gradient × activation, the sum of
        a given word's tokens, on the scale of the word's map (:attr:`Trust.text`). Empty where
        nothing was given, or the family's decoder does not show its own answer to gradients.
    """
    given, trust = explanation.trajectory.given, explanation.trust
    if given is None or trust is None:
        return ((),) * len(explanation.targets)
    groups: list[list[int]] = []
    for p, (text, own) in enumerate(zip(explanation.token_texts, given[0].tolist(), strict=True)):
        if own and text:
            glued = groups and groups[-1][-1] == p - 1 and not text[:1].isspace()
            groups = [*groups[:-1], [*groups[-1], p]] if glued else [*groups, [p]]
    names = ["".join(explanation.token_texts[p] for p in one).strip() for one in groups]
    values = trust.text.values[:, trust.text.tokens.prompt :].double()
    found = []
    for n, target in enumerate(explanation.targets):
        row = [
            float(values[n, [p for p in one if p not in target.positions]].sum()) for one in groups
        ]
        known = [(name, v) for name, v in zip(names, row, strict=True) if v == v]
        found.append(tuple(sorted(known, key=lambda pair: -abs(pair[1]))))
    return tuple(found)


def _said(scores: WordScores, n: int) -> str:
    """A word's scores in a few words, the verdict of a calibrator first."""
    parts = ["not grounded?"] if scores.doubted[n] else []
    if not math.isnan(grounded := float(scores.grounded[n])):
        parts.append(f"grounded {grounded:.0%}")
    else:
        parts.append(f"entropy {float(scores.entropy[n]):.2f}")
    if not scores.doubted[n] and not math.isnan(fall := float(scores.grey[n])):
        parts.append(f"without picture {-fall:+.1f}")
    return " · ".join(parts)


def _instead(
    target: Target, candidates: tuple[tuple[Candidate, ...], ...]
) -> tuple[tuple[str, float], ...]:
    """Text and probability of what else might have stood in the place of the token whose rivals
    are the likeliest."""
    every = zip(target.token_ids, candidates, strict=True)
    rivals = [[c for c in row if c.id != own] for own, row in every]
    closest = max(rivals, key=lambda row: row[0].probability if row else 0.0)
    return tuple((c.text.strip(), c.probability) for c in closest)


def _region(peak: tuple[float, float, float, float] | None, size: tuple[int, int]) -> str:
    """The peak's place in words. Unlike a mean, it does not move with faint values far from it."""
    if peak is None:
        return "nowhere"
    return region((peak[0] + peak[2]) / 2 / size[1], (peak[1] + peak[3]) / 2 / size[0])


def scene_masks(explanation: Explanation, scene: Scene) -> tuple[Tensor | None, ...]:
    """Mask (H, W) bool of every word that names an object of the scene; None for the others."""
    return tuple(scene_mask(scene, explanation.token_texts, t) for t in explanation.targets)


def mask_scores(
    explanation: Explanation, masks: Sequence[Tensor | None]
) -> tuple[LocalizationScores | None, ...]:
    r"""Localisation of every word that has a mask in the first image.

    Returns:
        tuple: one per target: scalars of :func:`captum_dcam.metrics.localization` on the bilinear
        map in pixels; None for words without a mask.
    """
    return tuple(
        None if mask is None else localization(own, mask)
        for own, mask in zip(explanation.pixel_maps(), masks, strict=True)
    )
