r"""What the explorer's page reads, from an explanation or a comparison.

One JSON object; what an answer lacks is null. Maps are packed as
:func:`captum_dcam.viewer.packed.packed_maps` does: one entry per grid, of (words, h, w) or (steps,
words, h, w) bytes, every word on its own scale.

- ``title``, ``prompt``, ``answer``, ``python`` (code that makes it again): texts; ``forced``: the
  answer was given; ``count``: S, its denoising steps.
- ``warnings``: what a reader must know first. ``facts``: [name, value] pairs.
- ``palettes``: 256 colours each of ``heat`` and ``steps``, three bytes per colour in base64.
- ``images``: ``source`` (a ``data:`` address), ``name``, ``width`` and ``height`` of the original.
- ``grids``: ``image``, and the left and right (``x``), upper and lower (``y``) edges of tokens.
- ``tokens``: of the answer: ``text``, ``commit`` (step), ``probability`` then.
- ``words``: ``text``, ``positions``, ``commits``, ``probability``, ``image`` that it looks at most,
  ``said`` (where), ``doubtful``, ``reason``, ``foil``, ``candidates``, ``scores``, ``more`` (of
  whether it is so), ``mask``.
- ``methods``: ``name``, ``label``, ``status``, ``note``, ``seconds``, ``passes``, ``complete`` and
  ``scores`` by word, ``refined`` and ``bare`` maps, ``text``: relevance by word and text token.
- ``text``: ``tokens`` of prompt and answer, of which ``prompt`` are the prompt's.
- ``steps``: ``holds`` (whether a step's states hold the image), ``probability`` by word and step,
  ``maps``; null where there are none, as of comparisons and given answers.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_dcam.metrics import LocalizationScores
from captum_dcam.model.layout import Layout
from captum_dcam.model.words import Target
from captum_dcam.results.comparison import METRICS, Comparison, ComparisonRow
from captum_dcam.results.explanation import Explanation, shortened
from captum_dcam.results.summary import WordSummary, mask_scores, summarise
from captum_dcam.results.trust import Trust
from captum_dcam.viewer.ink import STEP_CMAP
from captum_dcam.viewer.overlay import CMAP, palette
from captum_dcam.viewer.packed import image_source, packed_maps, packed_mask
from captum_dcam.viewer.panel import spoken
from captum_dcam.viewer.python_code import python_code

#: format and version of the document
FORMAT, VERSION = "captum-dcam explorer", 1
#: how metrics are called for people
HEADS = {"obj_iou": "Obj-IoU", "contrast": "contrast", "concentration": "concentration", "f3": "F3"}
#: settings that are shown elsewhere, or say nothing to a reader
UNTOLD = ("foil", "generation", "models", "single", "steps")
#: what the steps say of a word, by the names that a reader sees; the rest stands elsewhere
SAID = {
    "grounded": "probability that it is so, by a calibrator",
    "doubted": "probably not so",
    "runner_up": "next likeliest",
    "margin": "ahead of the next likeliest",
    "entropy": "entropy when committed, nats",
    "mean_entropy": "mean entropy up to then",
    "all_entropy": "mean entropy of all steps",
    "final": "probability at the last step",
    "flips": "how often its likeliest token changed",
    "grey": "fall of its log-probability with a grey picture",
    "blurred": "… with a blurred picture",
    "overlap": "overlap with the maps of its phrase",
    "repetition": "how often it stands before",
}


def explorer_document(result: Explanation | Comparison) -> dict[str, Any]:
    """The document of a result, JSON-able but for numbers that are not finite."""
    own = _explained(result) if isinstance(result, Explanation) else _compared(result)
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": f"{shortened(result.answer, 80)} · captum-dcam",
        "prompt": result.prompt,
        "answer": result.answer,
        "palettes": {name: _colors(cmap) for name, cmap in (("heat", CMAP), ("steps", STEP_CMAP))},
        "images": _images(result),
        "grids": _grids(result.layout),
        "facts": _facts(result.settings, result.versions),
        "python": python_code(result),
        **own,
    }


def _colors(cmap: str) -> str:
    return base64.b64encode(palette(cmap).tobytes()).decode()


def _images(result: Explanation | Comparison) -> list[dict[str, Any]]:
    """The images that a grid shows: of several frames of a video that share one, the first."""
    chosen = [(number, result.images[number]) for number in result.layout.images]
    return [
        {
            "name": f"image {number + 1}",
            "width": image.width,
            "height": image.height,
            "source": image_source(image, len(chosen)),
        }
        for number, image in chosen
    ]


def _grids(layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "image": layout.images.index(g.image),
            **{
                n: [[round(v, 2) for v in e] for e in getattr(g, f"{n}_edges").tolist()]
                for n in "xy"
            },
        }
        for g in layout.grids
    ]


def _facts(settings: Mapping[str, Any], versions: Mapping[str, str]) -> list[list[str]]:
    """Settings and versions as pairs of texts."""
    told = {k: v for k, v in settings.items() if v is not None and k not in UNTOLD}
    found = [[name, _told(value)] for name, value in told.items()]
    found += [[name, _told(v)] for name, v in (settings.get("generation") or {}).items()]
    return [*found, *([name, version] for name, version in versions.items())]


def _told(value: Any) -> str:
    """A setting in words: refinements by their names and own settings."""
    if isinstance(value, Mapping) and "stages" in value:
        return " + ".join(map(_told, value["stages"])) or "none"
    if isinstance(value, Mapping):
        own = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}({own})" if own else str(value.get("name", ""))
    return str(value).removeprefix("torch.")


def _foil(settings: Mapping[str, Any], target: Target) -> str | None:
    """The text of a word's foil."""
    foil = settings.get("foil")
    if target.foil_ids is None or foil is None:
        return None
    return foil.get(target.text) if isinstance(foil, Mapping) else str(foil)


def _rounded(values: Any, digits: int = 4) -> Any:
    """Nested lists of numbers with few digits."""
    if isinstance(values, list):
        return [_rounded(v, digits) for v in values]
    return float(f"{values:.{digits}g}")


def _localisation(scores: Sequence[LocalizationScores | None]) -> list[dict[str, float]]:
    """Localisation scores of every word, by the names that a reader sees."""
    return [
        {} if own is None else {HEADS[m]: float(getattr(own, m)) for m in METRICS} for own in scores
    ]


# -- explanations ----------------------------------------------------------------------------------


def _explained(explanation: Explanation) -> dict[str, Any]:
    trajectory, trust = explanation.trajectory, explanation.trust
    confidence = trajectory.confidence[0].tolist()
    commits = trajectory.commit_step[0].tolist()
    text = None if trust is None else trust.parts.get("text")
    rows = summarise(explanation)
    masks = explanation.masks
    more = None if trust is None else trust.parts.get("scores")
    scores = [{}] * len(rows) if more is None else more.records()
    method = {
        "name": "diffusion_cam",
        "label": f"Diffusion-CAM ({explanation.settings.get('preset') or 'own settings'})",
        "status": "done",
        "note": "",
        "complete": [True] * len(rows),
        "scores": None if masks is None else _localisation(mask_scores(explanation, masks)),
        "seconds": None,
        "passes": None,
        "refined": packed_maps(explanation.maps),
        "bare": None if text is None else packed_maps([m.relu() for m in text.maps]),
        "text": None if text is None else _rounded(text.values.tolist()),
    }
    return {
        "kind": "explanation",
        "forced": trajectory.forced,
        "count": trajectory.steps,
        "warnings": _warnings(explanation),
        "tokens": [
            {"text": t, "commit": commits[p], "probability": confidence[p]}
            for p, t in enumerate(explanation.token_texts)
        ],
        "words": [_word(explanation, row, known) for row, known in zip(rows, scores, strict=True)],
        "methods": [method],
        "text": None if text is None else _text(text.tokens.token_texts, text.tokens.prompt),
        "steps": _steps(explanation),
    }


def _text(tokens: Sequence[str], prompt: int) -> dict[str, Any]:
    return {"tokens": list(tokens), "prompt": prompt}


def _word(explanation: Explanation, row: WordSummary, known: Mapping[str, Any]) -> dict[str, Any]:
    n = row.number - 1
    target, trust = explanation.targets[n], explanation.trust
    mask = None if explanation.masks is None else explanation.masks[n]
    image = f"image {row.image + 1}, " if len(explanation.images) > 1 else ""
    said = f"highest: {image}{row.region} · half of it on {row.area:.0%} of the image's tokens"
    reason = f"its map localises nothing ({row.localises:.0%})" if row.doubtful else None
    return {
        "text": row.word,
        "positions": list(target.positions),
        "commits": list(explanation.commit_steps()[n]),
        "probability": row.confidence,
        "image": explanation.layout.images.index(row.image),
        "said": said,
        "first": row.localises is not None and not row.doubtful,
        "doubtful": row.doubtful,
        "reason": reason,
        "foil": _foil(explanation.settings, target),
        "candidates": None if trust is None else _candidates(trust, n),
        "scores": _word_scores(explanation, n),
        "more": _named(known),
        "mask": None if mask is None else packed_mask(mask),
    }


def _candidates(trust: Trust, n: int) -> list[list[list[Any]]]:
    return [[[c.text, c.probability] for c in token] for token in trust.candidates[n]]


def _word_scores(explanation: Explanation, n: int) -> dict[str, float | str]:
    """What is known of a word, by the names that a reader sees."""
    trust = explanation.trust
    found: dict[str, float | str] = {}
    if trust is None:
        return found
    found["how well its map singles out a region"] = f"{float(trust.localises[n]):.0%}"
    if "signs" in trust.parts:
        highlighted, random = trust.signs[n].tolist()
        found["fall of its log-probability without what the map highlights"] = highlighted
        found["… without as many random tokens"] = random
    if "text" in trust.parts:
        for name, share in zip(
            ("image", "prompt", "answer"), trust.shares[n].tolist(), strict=True
        ):
            found[f"what speaks for it: {name}"] = f"{share:.0%}"
    return found


def _named(known: Mapping[str, Any]) -> dict[str, float | str]:
    """A word's record of scores, where they are defined, by the names that a reader sees."""
    told = {name: known[key] for key, name in SAID.items() if known.get(key) is not None}
    return {k: ("yes" if v else "no") if isinstance(v, bool) else v for k, v in told.items()}


def _warnings(explanation: Explanation) -> list[str]:
    """What a reader must know before anything else."""
    trust = explanation.trust
    found = [explanation.note] if explanation.note else []
    if trust is None:
        return found
    found += [trust.warning] if trust.warning else []
    if "signs" in trust.parts:
        pairs = zip(explanation.words, trust.signs.tolist(), trust.doubtful, strict=True)
        failed = [w for w, (own, random), doubtful in pairs if own <= random and not doubtful]
        if failed:
            found.append(
                f"sign check failed for {', '.join(failed)}: removing what the map highlights "
                "lowers the word's probability no more than removing as many random image tokens"
            )
    return found


def _steps(explanation: Explanation) -> dict[str, Any] | None:
    """Every denoising step; None for an answer that was given."""
    trajectory, steps, trust = explanation.trajectory, explanation.steps, explanation.trust
    if trajectory.forced:
        return None
    calls = trajectory.calls[-trajectory.steps :]
    probabilities: Tensor | None = None if steps is None else steps.probabilities
    if probabilities is None and trust is not None:
        probabilities = trust.parts.get("probabilities")
    return {
        "holds": [call.valid for call in calls],
        "probability": None if probabilities is None else _rounded(probabilities.T.tolist(), 3),
        "maps": None if steps is None else packed_maps(steps.maps, word=1),
    }


# -- comparisons -----------------------------------------------------------------------------------


def _compared(comparison: Comparison) -> dict[str, Any]:
    commits = {
        p: step
        for target, steps in zip(comparison.targets, comparison.commit_steps, strict=True)
        for p, step in zip(target.positions, steps, strict=True)
    }
    texts = [row for row in comparison.rows if row.text is not None]
    tokens, labels = comparison.tokens, Counter(row.label for row in comparison.rows)
    return {
        "kind": "comparison",
        "forced": comparison.forced,
        "count": int(comparison.settings.get("steps") or 1 + max(commits.values(), default=0)),
        "warnings": [comparison.note] if comparison.note else [],
        "tokens": [
            {"text": t, "commit": commits.get(p), "probability": None}
            for p, t in enumerate(spoken(comparison))
        ],
        "words": [_compared_word(comparison, n) for n in range(len(comparison.targets))],
        "methods": [_row(row, labels[row.label] > 1) for row in comparison.rows],
        "text": _text(tokens.token_texts, tokens.prompt) if texts else None,
        "steps": None,
    }


def _compared_word(comparison: Comparison, n: int) -> dict[str, Any]:
    target = comparison.targets[n]
    mask = None if comparison.masks is None else comparison.masks[n]
    return {
        "text": target.text,
        "positions": list(target.positions),
        "commits": list(comparison.commit_steps[n]),
        "probability": None,
        "image": 0,
        "said": "",
        "first": True,
        "doubtful": False,
        "reason": None,
        "foil": _foil(comparison.settings, target),
        "candidates": None,
        "scores": {},
        "more": {},
        "mask": None if mask is None else packed_mask(mask),
    }


def _row(row: ComparisonRow, shared: bool) -> dict[str, Any]:
    """A row; by its name where others have its label: of other models, with other settings."""
    cost, whole = row.cost, any(row.complete)
    refined = packed_maps(row.maps) if whole else None
    bare = packed_maps([m.relu() for m in row.raw]) if whole else None
    return {
        "name": row.name,
        "label": row.name if shared else row.label,
        "status": row.status,
        "note": row.note,
        "complete": list(row.complete),
        "scores": None if row.scores is None else _localisation(row.scores),
        "seconds": None if row.status == "failed" else cost.seconds,
        "passes": None if row.status == "failed" else f"{cost.forwards} + {cost.backwards} passes",
        "refined": refined,
        "bare": None if bare == refined else bare,
        "text": None if row.text is None else _rounded(row.text.tolist()),
    }
