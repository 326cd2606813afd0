r"""An explanation in a few words: one row per word, and its scores where masks are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from captum_dcam.data.scenes import Scene, scene_mask
from captum_dcam.metrics import LocalizationScores, localization
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
        steps (tuple of int): the steps that committed them, each once.
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


def scene_scores(explanation: Explanation, scene: Scene) -> tuple[LocalizationScores | None, ...]:
    r"""Localisation of every word that names an object of the scene, against its masks.

    Returns:
        tuple: one per target: scalars of :func:`captum_dcam.metrics.localization` on the bilinear
        map in pixels; None for words that name no object, or one that is not in the scene.
    """
    maps = explanation.pixel_maps()
    masks = [scene_mask(scene, explanation.token_texts, target) for target in explanation.targets]
    return tuple(
        None if mask is None else localization(own, mask)
        for own, mask in zip(maps, masks, strict=True)
    )
