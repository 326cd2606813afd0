r"""The result of a comparison: maps of the same words by several methods, and what each cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from captum_dcam.errors import UnknownNameError, near
from captum_dcam.layout import Layout
from captum_dcam.methods import Cost
from captum_dcam.metrics import LocalizationScores
from captum_dcam.sequence import TextTokens
from captum_dcam.targets import Target

METRICS = ("obj_iou", "contrast", "concentration", "f3")


@dataclass(frozen=True)
class Row:
    r"""One method's part of a comparison.

    Args:
        name (str): unique in the comparison: the method's name, numbered where it comes twice.
        label (str), group (str): as in its facts.
        settings (dict): of the method.
        status (str): ``done``, ``partial`` (its budget ended) or ``failed`` (``note`` says why).
        note (str): what a reader must know; empty if nothing.
        maps (tuple of Tensor): one (N, h, w) a grid, non-negative, after post-transforms; zeros
            where there is none.
        raw (tuple of Tensor): the same with the method's own sign and scale.
        complete (tuple of bool): for every word, whether its map is whole.
        text (Tensor or None): (N, K) relevance of text tokens on the scale of ``raw``.
        cost (Cost): of all words together.
        scores (tuple or None): localisation of every word that has a mask.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    status: str
    note: str
    maps: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]
    complete: tuple[bool, ...]
    text: Tensor | None
    cost: Cost
    scores: tuple[LocalizationScores | None, ...] | None

    def mean(self, metric: str) -> float | None:
        """Mean of a localisation score over the words that have one."""
        found = [float(getattr(s, metric)) for s in self.scores or () if s is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Comparison:
    r"""Maps of N words by several methods, with what each cost.

    Args:
        prompt (str), answer (str): the question and the whole answer.
        targets (tuple of Target): the words.
        rows (tuple of Row): one a method, in the order asked for.
        layout (Layout): from token to pixel.
        tokens (TextTokens): what the columns of ``Row.text`` are.
        commit_steps (tuple): for every word, the step that committed each of its tokens.
        settings (dict): model, block, score, refinements, seed, …: JSON-able.
        versions (dict): of this package and what it computes with.
        images (tuple): the pictures.
        masks (tuple or None): (H, W) bool of every word that has one.
    """

    prompt: str
    answer: str
    targets: tuple[Target, ...]
    rows: tuple[Row, ...]
    layout: Layout
    tokens: TextTokens
    commit_steps: tuple[tuple[int, ...], ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    images: tuple[Image.Image, ...] = field(repr=False)
    masks: tuple[Tensor | None, ...] | None = field(default=None, repr=False)

    @property
    def words(self) -> tuple[str, ...]:
        """Text of every word."""
        return tuple(t.text for t in self.targets)

    def row(self, name: str) -> Row:
        """A method's row; UnknownNameError with near names otherwise."""
        for one in self.rows:
            if one.name == name:
                return one
        raise UnknownNameError(f"no method {name!r} here{near(name, [r.name for r in self.rows])}")

    def pixel_maps(self, name: str, grid: int = 0, mode: str = "bilinear") -> Tensor:
        """A method's maps (N, H, W) in the pixels of the grid's picture."""
        return self.layout.grids[grid].to_pixels(self.row(name).maps[grid], mode)

    def records(self) -> list[dict[str, Any]]:
        r"""One flat record for every method and word: ``pandas.DataFrame(comparison.records())``.

        ``seconds``, ``forwards``, ``backwards`` and ``peak_bytes`` are those of the method for all
        words together; scores are None for words without a mask and for maps that are not whole.
        """
        out = []
        for row in self.rows:
            for n, target in enumerate(self.targets):
                own = None if row.scores is None else row.scores[n]
                out.append(
                    {
                        "method": row.name,
                        "label": row.label,
                        "group": row.group,
                        "status": row.status,
                        "note": row.note,
                        "word": target.text,
                        "position": target.positions[0],
                        "complete": row.complete[n],
                        **{m: None if own is None else float(getattr(own, m)) for m in METRICS},
                        "peak": max(float(r[n].max()) for r in row.raw),
                        "seconds": row.cost.seconds,
                        "forwards": row.cost.forwards,
                        "backwards": row.cost.backwards,
                        "peak_bytes": row.cost.peak_bytes,
                    }
                )
        return out

    # -- saving ---------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        r"""Write the comparison into a new folder, all or nothing, or in an earlier one's place.

        Files: ``comparison.json`` (words, settings, methods, records; versioned),
        ``comparison.csv`` (:meth:`records`), ``maps.safetensors``, ``image-0.png``, …

        Raises:
            FileExistsError: the folder exists and is not an earlier comparison.
            OSError: it cannot be written; nothing is left behind.
        """
        from captum_dcam.comparison_files import save_comparison

        return save_comparison(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a saved comparison; ExplanationError says what is missing or damaged."""
        from captum_dcam.comparison_files import load_comparison

        return load_comparison(folder)
