r"""Two explanations of an answer, before and after a word of it was exchanged."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from captum_dcam.results.explanation import Explanation


@dataclass(frozen=True, eq=False)
class Edit:
    r"""How the maps of N words moved when one word was exchanged.

    Args:
        before (Explanation), after (Explanation): of the same N words in the same order; of the
            exchanged one it is the old word, and the new.
        exchanged (tuple of bool): which words hold what was exchanged.
        correlation (Tensor): (N,) float64 in [-1, 1], Spearman's rank correlation of the two maps:
            1 where nothing moved.
        distance (Tensor): (N,) float64, from peak to peak as a share of the image's diagonal; NaN
            where they lie on two images, or a map is empty.
        overlap (Tensor): (N,) float64 in [0, 1], intersection over union of the highest tenths of
            the two maps, see :func:`captum_dcam.metrics.top_overlap`.
    """

    before: Explanation
    after: Explanation
    exchanged: tuple[bool, ...]
    correlation: Tensor
    distance: Tensor
    overlap: Tensor

    def records(self) -> list[dict[str, Any]]:
        """One flat record per word."""
        names = [f.name for f in fields(self) if f.name not in ("before", "after", "exchanged")]
        columns = {name: getattr(self, name).tolist() for name in names}
        words = zip(self.before.words, self.after.words, self.exchanged, strict=True)
        return [
            {
                "before": one,
                "after": other,
                "exchanged": new,
                **{n: c[i] for n, c in columns.items()},
            }
            for i, (one, other, new) in enumerate(words)
        ]
