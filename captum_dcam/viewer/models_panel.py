"""The panel of a comparison of models: maps side by side, how far they agree, how each writes."""

from __future__ import annotations

from PIL import Image

from captum_dcam.results.model_comparison import ModelComparison, WritingOrder
from captum_dcam.viewer.ink import BODY, INNER, MUTED, SMALL, Color, Ink, Page, Run
from captum_dcam.viewer.panel import comparison_panel

#: ground of a word that was written before all words to its left were
EARLY: Color = (253, 220, 160)
#: heights of lines, in thousandths of the width; left edges of the table's columns
LINE, TALL = 22.0, 32.0
COLUMNS = (0.0, 170.0, 430.0, 560.0, 690.0, 830.0)
HEADS = ("method", "models", "word", "ranks", "highest tenth", "peaks apart")


def models_panel(found: ModelComparison, *, width: int = 1600) -> Image.Image:
    r"""Draw a comparison of models on one sheet.

    :func:`~captum_dcam.viewer.comparison_panel` with the models as groups; below it the agreement
    of each word's maps (correlation of ranks, overlap of the highest tenth, distance of the peaks
    in diagonals), and the answer that each model writes itself, where a word that was written
    before all words to its left were stands on a coloured ground.

    Args:
        found (ModelComparison): the result.
        width (int, optional): in pixels; all else scales with it. Default: 1600

    Returns:
        PIL.Image.Image: RGB.
    """
    ink = Ink(width)
    parts = [
        comparison_panel(found.comparison, width=width),
        _below(ink, [_agreement(ink, found), _writing(ink, found)]),
    ]
    sheet = Image.new("RGB", (width, sum(p.height for p in parts)), (255, 255, 255))
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], ((width - parts[1].width) // 2, parts[0].height))
    return sheet


def _below(ink: Ink, pages: list[Page]) -> Image.Image:
    """Pages below one another, with room at the end."""
    out = ink.page(ink.px(INNER), sum(p.image.height for p in pages) + ink.px(TALL)).image
    y = 0
    for page in pages:
        out.paste(page.image, (0, y))
        y += page.image.height
    return out


def _title(page: Page, y: float, text: str) -> float:
    """A section's heading on a rule; the y of the first line below it."""
    page.rule(0, y, page.image.width)
    page.write((0, y + page.px(LINE)), text, 11.5, MUTED, bold=True)
    return y + page.px(LINE + LINE)


def _agreement(ink: Ink, found: ModelComparison) -> Page:
    """One line per method, pair and word."""
    lines = found.agreement
    page = ink.page(ink.px(INNER), ink.px(LINE * (len(lines) + 4)))
    y = _title(page, 0, "AGREEMENT OF THE MODELS' MAPS")
    for x, head in zip(COLUMNS, HEADS, strict=True):
        page.write((ink.px(x), y), head, SMALL, MUTED)
    last = ("", "", "")
    for one in lines:
        y += ink.px(LINE)
        same = (one.method, one.first, one.second) == last
        last = (one.method, one.first, one.second)
        cells = (
            "" if same else one.method,
            "" if same else f"{one.first} · {one.second}",
            found.comparison.words[one.word],
            f"{one.rank:+.2f}",
            f"{one.overlap:.0%}",
            f"{one.distance:.2f}",
        )
        ends = (*COLUMNS[1:], float(INNER))
        for x, end, cell in zip(COLUMNS, ends, cells, strict=True):
            page.write((ink.px(x), y), page.clipped(cell, SMALL, ink.px(end - x - 8)), SMALL)
    return page


def _writing(ink: Ink, found: ModelComparison) -> Page:
    """The answer of every model in its own order."""
    room = ink.px(INNER - COLUMNS[1])
    texts = [ink.lines(_runs(order), BODY, room) for order in found.orders]
    page = ink.page(ink.px(INNER), ink.px(TALL * sum(map(len, texts)) + LINE * 3))
    y = _title(page, 0, "WHAT EACH WRITES ITSELF")
    note = "on a coloured ground: written before all words to its left were"
    page.write((ink.px(COLUMNS[1] + 90), page.px(LINE)), note, SMALL, MUTED)
    for order, lines in zip(found.orders, texts, strict=True):
        name = page.clipped(order.model, SMALL, ink.px(COLUMNS[1] - 8))
        page.write((0, y + ink.px(TALL) / 2), name, SMALL)
        y = page.flow((ink.px(COLUMNS[1]), y), lines, BODY, TALL)
    return page


def _runs(order: WritingOrder) -> list[Run]:
    words = zip(order.words, order.missing, strict=True)
    return [Run(w, EARLY if missing else None) for w, missing in words] or [Run("(empty)")]
