r"""Whether to believe a word's map: what an explanation says of itself, word by word.

Of all this only :attr:`Trust.scores` is about whether a word is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import NotBoundError
from captum_dcam.methods.text_relevance import TextRelevance
from captum_dcam.model.sequence import TextTokens
from captum_dcam.results.scores import WordScores, read_scores

#: parts that cost passes of the model, and are computed when they are first asked for
LATER = ("signs", "text", "probabilities", "scores")
#: below it a map is said to localise nothing, where the probability is calibrated
DOUBT = 0.5


@dataclass(frozen=True)
class Candidate:
    """A token that might have stood in a word's place: its id, text, and probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Trust:
    r"""What there is to say about N words' maps.

    ``signs``, ``text``, ``probabilities`` and ``scores`` are computed when they are first read, on
    the model that was explained; a saved explanation has those that were there.

    Args:
        localises (Tensor): (N,) in [0, 1]: how well the word's map, before refinements, singles out
            a region, as maps of words for objects do and those of function words do not. A
            probability where ``calibrated``; it does not tell true words from invented ones.
        calibrated (bool): whether it was fitted to this model.
        source (str): what it was fitted on, or what stands in for a fit.
        candidates (tuple): per word and token, the three most probable tokens at the step that is
            read, the most probable first.
        warning (str, optional): what a reader must know before anything else, such as a picture of
            a kind that the model never saw. Default: empty
        parts (dict, optional): what of :data:`LATER` is there already.
        later (callable, optional): computes one of them by its name.
    """

    localises: Tensor
    calibrated: bool
    source: str
    candidates: tuple[tuple[tuple[Candidate, ...], ...], ...]
    warning: str = ""
    parts: dict[str, Any] = field(default_factory=dict, repr=False)
    later: Callable[[str], Any] | None = field(default=None, repr=False)

    @property
    def signs(self) -> Tensor:
        """(N, 2) float64: the fall of the word's log-probability when what its map highlights is
        removed, and when random image tokens are; see :func:`captum_dcam.sign_check`."""
        found: Tensor = self._part("signs")
        return found

    @property
    def text(self) -> TextRelevance:
        """Relevance of prompt and answer tokens, on the scale of the map: -1 to 1, see
        :func:`captum_dcam.methods.text_relevance.text_relevance`."""
        found: TextRelevance = self._part("text")
        return found

    @property
    def probabilities(self) -> Tensor:
        """(S, N) float32: each word's probability at every denoising step, of its least sure token;
        NaN where a step does not compute it."""
        found: Tensor = self._part("probabilities")
        return found

    @property
    def scores(self) -> WordScores:
        """What the steps of the generation say of each word, and a calibrator's verdict where one
        was fitted to the model; see :func:`captum_dcam.word_scores`."""
        found: WordScores = self._part("scores")
        return found

    @property
    def shares(self) -> Tensor:
        """(N, 3) float32: how much of what speaks for the word lies on the image, on the prompt and
        on the answer's other words: positive relevance, as shares of 1; 0 where nothing does."""
        text = self.text
        values, cut = text.values.nan_to_num().relu(), text.tokens.prompt
        image = torch.stack([m.relu().sum((-2, -1)) for m in text.maps]).sum(0)
        parts = torch.stack((image, values[:, :cut].sum(1), values[:, cut:].sum(1)), dim=1)
        total = parts.sum(1, keepdim=True)
        return parts / total.masked_fill(total == 0, 1)

    @property
    def doubtful(self) -> tuple[bool, ...]:
        """Whether each word's map is said to localise nothing; never where nothing is fitted."""
        return tuple(self.calibrated and p < DOUBT for p in self.localises.tolist())

    def complete(self) -> Trust:
        """With all parts computed."""
        for name in LATER:
            self._part(name)
        return self

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            if self.later is None:
                raise NotBoundError(
                    f"this explanation was saved without {name}, and the model is not at hand: "
                    f"explain again, and read trust.{name} before saving (or explain(…, "
                    "trust=True))"
                )
            self.parts[name] = self.later(name)
        return self.parts[name]

    def __getstate__(self) -> dict[str, Any]:
        # a copy in another process has what is there, and no model
        return {**vars(self), "later": None}

    # -- saving ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        out: dict[str, Any] = {
            "calibrated": self.calibrated,
            "source": self.source,
            "warning": self.warning,
            "candidates": [
                [[[c.id, c.text, c.probability] for c in token] for token in word]
                for word in self.candidates
            ],
        }
        if (text := self.parts.get("text")) is not None:
            out["pieces"] = text.tokens.token_texts
            out["prompt"] = text.tokens.prompt
        if (scores := self.parts.get("scores")) is not None:
            out["scores"] = scores.record()
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names that files have for them."""
        out = {"trust.localises": self.localises}
        out |= {f"trust.{n}": self.parts[n] for n in ("signs", "probabilities") if n in self.parts}
        if (text := self.parts.get("text")) is not None:
            out["trust.text"] = text.values
            out["trust.positions"], out["trust.ids"] = text.tokens.positions, text.tokens.ids
            out |= {f"trust.maps.{i}": m for i, m in enumerate(text.maps)}
        if (scores := self.parts.get("scores")) is not None:
            out |= scores.tensors()
        return {name: tensor.contiguous() for name, tensor in out.items()}


def read_trust(
    record: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], grids: int
) -> Trust | None:
    """The trust of a saved explanation; None where an earlier version saved it."""
    if record is None:
        return None
    parts: dict[str, Any] = {
        n: tensors[f"trust.{n}"] for n in ("signs", "probabilities") if f"trust.{n}" in tensors
    }
    if "trust.text" in tensors:
        tokens = TextTokens(
            tensors["trust.positions"],
            tensors["trust.ids"],
            tuple(record["pieces"]),
            record["prompt"],
        )
        maps = tuple(tensors[f"trust.maps.{i}"] for i in range(grids))
        parts["text"] = TextRelevance(tokens, tensors["trust.text"], maps)
    if "scores" in record:
        parts["scores"] = read_scores(record["scores"], tensors)
    return Trust(
        tensors["trust.localises"],
        record["calibrated"],
        record["source"],
        tuple(
            tuple(tuple(Candidate(*c) for c in token) for token in word)
            for word in record["candidates"]
        ),
        record["warning"],
        parts,
    )
