r"""The result of a comparison of models: one answer in all of them, maps side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from captum_dcam.errors import ExplanationError
from captum_dcam.results.comparison import Comparison

#: fields of a word's order that hold one value per word
IN_ORDER = ("words", "steps", "missing")
#: where :attr:`Comparison.settings` keeps what a comparison of models has besides
KEY = "models"


@dataclass(frozen=True)
class WordAgreement:
    r"""How far two models' maps of one word agree, see :func:`captum_dcam.metrics.agreement`.

    Args:
        method (str): whose maps.
        first (str), second (str): the models.
        word (int): its number, from 0.
        rank (float), overlap (float), distance (float): as the metric has them; means over images.
    """

    method: str
    first: str
    second: str
    word: int
    rank: float
    overlap: float
    distance: float


@dataclass(frozen=True)
class WritingOrder:
    r"""In which order a model wrote the answer that it writes itself.

    Args:
        model (str): its name.
        answer (str): what it writes.
        words (tuple of str): of this answer.
        steps (tuple of int): for every word, the step in which its first token was committed.
        missing (tuple of int): for every word, how many tokens to its left were not yet written
            then. An autoregressive model has none.
    """

    model: str
    answer: str
    words: tuple[str, ...]
    steps: tuple[int, ...]
    missing: tuple[int, ...]

    @property
    def early(self) -> tuple[str, ...]:
        """Words that were written before the whole text to their left was."""
        return tuple(w for w, n in zip(self.words, self.missing, strict=True) if n)


@dataclass(frozen=True, repr=False)
class ModelComparison:
    r"""Maps of N words of one answer by several models.

    Args:
        comparison (Comparison): a row for each model and method, called ``"model: method"``, whose
            group is the model. All rows lie on one layout: the models' own where it is the same,
            else one grid over each image, onto which maps were interpolated.
        agreement (tuple of WordAgreement): for each method, pair of models and word.
        orders (tuple of WritingOrder): for each model.
    """

    comparison: Comparison
    agreement: tuple[WordAgreement, ...]
    orders: tuple[WritingOrder, ...]

    def __repr__(self) -> str:
        return f"ModelComparison({', '.join(self.models)}: {self.comparison!r})"

    @property
    def models(self) -> tuple[str, ...]:
        """Names, in the order asked for."""
        return tuple(order.model for order in self.orders)

    def records(self) -> list[dict[str, Any]]:
        """The agreement, one flat record per method, pair and word."""
        words = self.comparison.words
        return [{**asdict(a), "word": words[a.word], "number": a.word} for a in self.agreement]

    def save(
        self,
        folder: str | Path,
        pictures: Mapping[str, Image.Image] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Path:
        """Write it as :meth:`Comparison.save` does; agreement and orders are in its settings."""
        own = {"agreement": [*map(asdict, self.agreement)], "orders": [*map(asdict, self.orders)]}
        settings = {**self.comparison.settings, KEY: own}
        return replace(self.comparison, settings=settings).save(folder, pictures, texts)

    @classmethod
    def load(cls, folder: str | Path) -> ModelComparison:
        """Read what :meth:`save` wrote; ExplanationError says what is missing or damaged."""
        comparison = Comparison.load(folder)
        own = comparison.settings.get(KEY)
        if own is None:
            raise ExplanationError(
                f"{folder} holds a comparison of methods on one model: read it with Comparison.load"
            )
        settings = {k: v for k, v in comparison.settings.items() if k != KEY}
        try:
            agreement = tuple(WordAgreement(**one) for one in own["agreement"])
            orders = tuple(
                WritingOrder(one["model"], one["answer"], *map(tuple, (one[k] for k in IN_ORDER)))
                for one in own["orders"]
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ExplanationError(
                f"the comparison of models in {folder} is damaged ({error!r}): make it again"
            ) from error
        return cls(replace(comparison, settings=settings), agreement, orders)
