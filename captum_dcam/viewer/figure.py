"""Words and their maps as a matplotlib figure, for papers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from captum_dcam.errors import InputError
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.summary import WordSummary, summarise
from captum_dcam.viewer.fonts import EMPTY, families, one_line
from captum_dcam.viewer.overlay import ALPHA, CMAP, MUTE, muted, word_map

#: longer side of the images in a figure, in pixels
SIDE = 640


def word_figure(
    explanation: Explanation,
    words: Iterable[str | int] | None = None,
    *,
    image: int = 0,
    columns: int = 4,
    width: float = 8.0,
    cmap: str = CMAP,
) -> Figure:
    r"""Maps of words over the image, built without pyplot's global state.

    ``figure.savefig("words.pdf")`` writes it; text is text there, not pixels. Every map has its own
    colour scale, from 0 to its highest value, which its colour bar shows: values of two words are
    not to be compared by their colours.

    Args:
        explanation (Explanation): the result.
        words (iterable of str or int, optional): words, or numbers of targets from 0.
            Default: all
        image (int, optional): number of the image. Default: 0
        columns (int, optional): maps side by side, at most. Default: 4
        width (float, optional): of the figure in inches. Default: 8
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``

    Returns:
        matplotlib.figure.Figure: as high as its rows need.

    Raises:
        TargetError: a word that was not explained.
        InputError: no words; ``image``, ``columns`` or ``width`` out of range.
    """
    chosen = [words] if isinstance(words, str | int) else words
    numbers = (
        range(len(explanation.targets)) if chosen is None else [*map(explanation.index, chosen)]
    )
    if not numbers:
        raise InputError("no words to draw: give some of those that were explained")
    if not 0 <= image < len(explanation.images):
        raise InputError(f"image is {image}: expected 0 to {len(explanation.images) - 1}")
    if columns < 1 or not 2 <= width <= 100:
        raise InputError(
            f"columns is {columns}, width {width} in: expected at least 1, and 2 to 100 in"
        )
    picture = explanation.images[image]
    factor = min(1.0, SIDE / max(picture.size))
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    ground = np.asarray(muted(picture.resize(size), MUTE))
    across = min(columns, len(numbers))
    rows = math.ceil(len(numbers) / across)
    cell = width / across
    figure = Figure(figsize=(width, rows * (cell * size[1] / size[0] * 0.84 + 0.62)))
    FigureCanvasAgg(figure)
    summary = summarise(explanation)
    for place, number in enumerate(numbers):
        axes = figure.add_subplot(rows, across, place + 1)
        axes.imshow(ground)
        values = word_map(explanation, number, image, size).double().numpy()
        _draw(figure, axes, values, summary[number], colormaps[cmap])
    s = explanation.settings
    made = f"{s.get('family')}, block {s.get('layer')}, {s.get('score')} score"
    note = f"{made}; each map 0 to its own highest value"
    figure.text(0.01, 0.005, note, size=7, color="0.35")
    figure.subplots_adjust(
        0.01, 0.6 / figure.get_figheight() * 0.6, 0.97, 1 - 0.25 / figure.get_figheight(), 0.12, 0.3
    )
    return figure


def _draw(
    figure: Figure, axes: Axes, values: np.ndarray, row: WordSummary, colors: Colormap
) -> None:
    """One word's map over the image, with its name and a scale of its own."""
    top = float(values.max()) or 1.0
    heat = colors((values / top).clip(0, 1))
    heat[..., 3] = (values / top).clip(0, 1) * ALPHA
    axes.imshow(heat)
    axes.set_axis_off()
    text, more = families(one_line(row.word) or EMPTY)
    own: dict[str, Any] = {"family": ["DejaVu Sans", *more]} if more else {}
    axes.set_title(text, size=10, loc="left", parse_math=False, **own)
    facts = f"step {', '.join(map(str, row.steps))}, p = {row.confidence:.2f}"
    axes.text(0.0, -0.03, facts, size=7, va="top", transform=axes.transAxes)
    scale = ScalarMappable(Normalize(0, top), colors)
    bar = figure.colorbar(scale, ax=axes, fraction=0.046, pad=0.02, ticks=[0, top])
    bar.ax.set_yticklabels(["0", f"{top:.2g}"], size=6)
    bar.outline.set_linewidth(0.4)
