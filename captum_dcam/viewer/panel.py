r"""The panel of a comparison: one row a method, one column a word, in one image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from captum_dcam.errors import InputError
from captum_dcam.results.comparison import Comparison, ComparisonRow
from captum_dcam.viewer.header import GAP, INNER, MARGIN, bar, header, running
from captum_dcam.viewer.ink import MUTED, PAPER, RULE, TEXT, Color, Ink, stacked
from captum_dcam.viewer.overlay import CMAP
from captum_dcam.viewer.panel_plan import BLOCK_GAP, CELL_GAP, GUTTER, ROW, Plan, plan_of
from captum_dcam.viewer.thumbnails import OUTLINE, Thumbnails, grid_height

SCALES = ("map", "row")
#: colours: chips of words, what failed, what is partial, ground of a cell without a map
CHIP: Color = (226, 232, 240)
FAILED: Color = (190, 40, 40)
PARTIAL: Color = (196, 110, 0)
BLANK: Color = (241, 243, 246)
#: sizes of text: words, names of methods, what is below these, why one failed, group headings
WORD, NAME, FACT, SMALL, GROUP = 12.5, 11.5, 10.0, 9.0, 10.5
#: a reason gets a box over the cells if these are together at least so wide
NARROW = 110.0


def comparison_panel(
    comparison: Comparison,
    *,
    scale: str = "map",
    width: int = 1600,
    cmap: str = CMAP,
    mode: str = "bilinear",
) -> Image.Image:
    r"""Draw a comparison on one sheet.

    The picture, the prompt and the answer; then a row a method, with its seconds for all words
    and its mean F3 where masks are known, and a column a word, whose object is outlined. Many
    methods stand in several blocks side by side, many words in several sections. A method that
    failed says why; a cell that its budget left unfinished is marked, or blank. A flat map shows
    the plain picture.

    Args:
        comparison (Comparison): the result; one picture or several (a mosaic in every cell).
        scale (str, optional): ``map`` paints every map to its own maximum; ``row`` gives a
            method's maps one scale, so that words that hardly look at the picture stay pale.
            Default: ``"map"``
        width (int, optional): in pixels; all else scales with it. Default: 1600
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``
        mode (str, optional): ``bilinear``, or ``nearest`` to see the image tokens.
            Default: ``"bilinear"``

    Returns:
        PIL.Image.Image: RGB.

    Raises:
        ValueError: unknown ``scale``, or less than 600 pixels of ``width``.
    """
    if scale not in SCALES:
        raise InputError(f"scale is {scale!r}: expected one of {SCALES}")
    if width < 600:
        raise InputError(f"width is {width} px: nothing can be read below 600")
    ink = Ink(width)
    answer = running(_spoken(comparison), comparison.targets, [CHIP] * len(comparison.targets))
    plan = _plan(ink, comparison)
    cells = Thumbnails(comparison, ink.px(plan.cell), scale, cmap, mode)
    parts = [
        header(ink, comparison.images, comparison.prompt, answer),
        _legend(ink, comparison, scale, cmap),
    ]
    for words in plan.sections(len(comparison.targets)):
        parts.append(_section(ink, comparison, plan, cells, words))
    return stacked(parts, width, ink.px(MARGIN), ink.px(GAP))


def _spoken(comparison: Comparison) -> list[str]:
    """Text of every token of the answer, empty for tokens that end it."""
    at, out = 0, []
    for piece in comparison.tokens.token_texts[comparison.tokens.prompt :]:
        text = piece if at else piece.lstrip()
        own = text if comparison.answer.startswith(text, at) else ""
        at += len(own)
        out.append(piece if own else "")
    return out


def _plan(ink: Ink, comparison: Comparison) -> Plan:
    ratio = grid_height([i.size for i in comparison.images], 1000) / 1000
    need = max(
        (
            ink.length(text, size) * 1000 / ink.width
            for row in comparison.rows
            for text, size in ((row.label, NAME), (_facts(comparison, row)[0], FACT))
        ),
        default=0.0,
    )
    groups = sum(1 for i in range(len(comparison.rows)) if _begins(comparison.rows, i))
    return plan_of(len(comparison.rows), groups, len(comparison.targets), ratio, need)


def _begins(rows: Sequence[ComparisonRow], i: int) -> bool:
    """Whether a group begins at row ``i``."""
    return i == 0 or rows[i].group != rows[i - 1].group


# -- legend -------------------------------------------------------------------------------------


def _legend(ink: Ink, comparison: Comparison, scale: str, cmap: str) -> Image.Image:
    """What the colours mean, and the settings."""
    out = Image.new("RGB", (ink.px(INNER), ink.px(46)), PAPER)
    draw = ImageDraw.Draw(out)
    draw.line((0, 0, out.width, 0), fill=RULE, width=max(1, ink.px(1)))
    y = ink.px(30)
    own = "each map's highest" if scale == "map" else "the method's highest"
    x = bar(ink, out, (0, y), f"heat: low … {own}", cmap, (40, 255)) + ink.px(24)
    if any(mask is not None for mask in comparison.masks or ()):
        side, inset = ink.px(13), ink.px(3)
        box = (x, y - side // 2, x + side, y + side // 2)
        draw.rectangle(box, fill=MUTED)
        inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
        draw.rectangle(inner, outline=OUTLINE, width=max(1, ink.px(1)))
        x = _note(ink, draw, (x + side, y), "the object's mask")
    if any(row.status == "partial" for row in comparison.rows):
        side = ink.px(11)
        box = (x, y - side // 2, x + side, y + side // 2)
        draw.rectangle(box, fill=BLANK)
        _corner(draw, (x, y - side // 2), side)
        x = _note(ink, draw, (x + side, y), "unfinished")
    text = ink.clipped(_settings(comparison), 12.5, out.width - x)
    ink.write(draw, (out.width, y), text, 12.5, MUTED, anchor="rm")
    return out


def _note(ink: Ink, draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> int:
    """Text behind a sign; returns the x where the next one begins."""
    x = at[0] + ink.px(7)
    ink.write(draw, (x, at[1]), text, 12.5, MUTED)
    return x + round(ink.length(text, 12.5)) + ink.px(24)


def _settings(comparison: Comparison) -> str:
    s = comparison.settings
    stages = (s.get("refinements") or {}).get("stages") or ()
    parts = [
        str(s.get("family", "")),
        {"prefix": "prefix cache", "full": "no cache"}.get(s.get("regime", ""), ""),
        f"block {s.get('layer')}",
        f"{s.get('score')} score",
        " + ".join(str(stage.get("name")) for stage in stages),
    ]
    return " · ".join(p for p in parts if p)


# -- rows ---------------------------------------------------------------------------------------


def _section(
    ink: Ink, comparison: Comparison, plan: Plan, cells: Thumbnails, words: range
) -> Image.Image:
    """All methods for some of the words, in blocks side by side."""
    rows = comparison.rows
    heights = [_height(ink, cells, row) for row in rows]
    several = len({row.group for row in rows}) > 1
    marks = [ink.px(GROUP + 9) if several and _begins(rows, i) else 0 for i in range(len(rows))]
    parts = plan.split([h + m + ink.px(CELL_GAP) for h, m in zip(heights, marks, strict=True)])
    blocks = [_block(ink, comparison, plan, cells, words, part, several) for part in parts]
    out = Image.new("RGB", (ink.px(INNER), max(b.height for b in blocks)), PAPER)
    pitch = (ink.px(INNER) + ink.px(BLOCK_GAP)) / plan.blocks
    for i, block in enumerate(blocks):
        out.paste(block, (round(i * pitch), 0))
    return out


def _height(ink: Ink, cells: Thumbnails, row: ComparisonRow) -> int:
    return ink.px(ROW) if row.status == "failed" else max(ink.px(ROW), cells.height)


def _block(
    ink: Ink,
    comparison: Comparison,
    plan: Plan,
    cells: Thumbnails,
    words: range,
    part: range,
    several: bool,
) -> Image.Image:
    """Column headings, group headings and rows of some of the methods."""
    rows, gap = comparison.rows, ink.px(CELL_GAP)
    label = ink.px(plan.label)
    left = label + ink.px(GUTTER)
    head = _headings(ink, comparison, cells, words)
    marked = [i for i in part if several and (i == part[0] or _begins(rows, i))]
    width = left + len(words) * (cells.width + gap)
    height = head.height + len(marked) * ink.px(GROUP + 9)
    height += sum(_height(ink, cells, rows[i]) + gap for i in part)
    out = Image.new("RGB", (width, height), PAPER)
    out.paste(head, (left, 0))
    draw = ImageDraw.Draw(out)
    y = head.height
    for i in part:
        if i in marked:
            text = rows[i].group if _begins(rows, i) else f"{rows[i].group} (continued)"
            ink.write(draw, (0, y + ink.px(GROUP + 9) / 2), text, GROUP, MUTED, bold=True)
            x = ink.length(text, GROUP, bold=True) + ink.px(8)
            middle = y + ink.px(GROUP + 9) / 2
            draw.line((x, middle, width - gap, middle), fill=RULE, width=max(1, ink.px(0.7)))
            y += ink.px(GROUP + 9)
        tall = _height(ink, cells, rows[i])
        failed, room = rows[i].status == "failed", width - left - gap
        narrow = failed and room < ink.px(NARROW)
        across = (width - gap if narrow else label, narrow)
        _label(ink, draw, comparison, rows[i], (0, y + tall / 2), *across)
        if failed and not narrow:
            _reason(ink, draw, rows[i], (left, y + tall / 2), room)
        elif not failed:
            _cells(ink, out, cells, rows[i], i, words, (left, y + (tall - cells.height) // 2))
        y += tall + gap
    return out


def _headings(ink: Ink, comparison: Comparison, cells: Thumbnails, words: range) -> Image.Image:
    """The words above their columns; upright where the columns are too narrow for them."""
    gap, texts = ink.px(CELL_GAP), [comparison.words[n] for n in words]
    longest = max(ink.length(w, WORD) for w in texts)
    if longest <= cells.width:
        out = Image.new("RGB", (len(words) * (cells.width + gap), ink.px(22)), PAPER)
        draw = ImageDraw.Draw(out)
        for k, text in enumerate(texts):
            x = k * (cells.width + gap) + cells.width / 2
            ink.write(draw, (x, ink.px(10)), text, WORD, anchor="mm")
        return out
    high = min(longest, ink.px(96))
    out = Image.new("RGB", (len(words) * (cells.width + gap), round(high) + ink.px(6)), PAPER)
    for k, text in enumerate(texts):
        shown = ink.clipped(text, WORD, high)
        line = Image.new("RGB", (round(high), ink.px(WORD * 1.4)), PAPER)
        ink.write(ImageDraw.Draw(line), (0, line.height / 2), shown, WORD)
        upright = line.transpose(Image.Transpose.ROTATE_90)
        x = k * (cells.width + gap) + (cells.width - upright.width) // 2
        out.paste(upright, (x, 0))
    return out


def _facts(comparison: Comparison, row: ComparisonRow) -> tuple[str, Color]:
    """The line below a method's name."""
    parts = [seconds_text(row.cost.seconds)]
    mean = row.mean("f3")
    if mean is not None:
        parts.append(f"F3 {mean:.2f}")
    if row.status == "failed":
        return "failed", FAILED
    if row.status == "partial":
        parts.append(f"{sum(row.complete)} of {len(row.complete)} words")
        return " · ".join(parts), PARTIAL
    return " · ".join(parts), MUTED


def seconds_text(seconds: float) -> str:
    """``0.042 s``, ``4.2 s``, ``123 s``."""
    digits = 3 if seconds < 0.1 else 2 if seconds < 1 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def _label(
    ink: Ink,
    draw: ImageDraw.ImageDraw,
    comparison: Comparison,
    row: ComparisonRow,
    at: tuple[float, float],
    room: int,
    reason: bool = False,
) -> None:
    x, y = at
    ink.write(draw, (x, y - ink.px(7)), ink.clipped(row.label, NAME, room), NAME, TEXT)
    text, color = _facts(comparison, row)
    if reason:
        text = f"{text}: {_why(row)}"
    ink.write(draw, (x, y + ink.px(7)), ink.clipped(text, FACT, room), FACT, color)


def _why(row: ComparisonRow) -> str:
    """The reason without the exception's name."""
    kind, _, rest = row.note.partition(": ")
    return rest if kind.endswith("Error") and rest else row.note


def _reason(
    ink: Ink, draw: ImageDraw.ImageDraw, row: ComparisonRow, at: tuple[float, float], room: int
) -> None:
    half = ink.px(ROW) / 2 - ink.px(3)
    draw.rounded_rectangle((at[0], at[1] - half, at[0] + room, at[1] + half), ink.px(3), fill=BLANK)
    inner = room - 2 * ink.px(7)
    words = _why(row).split()
    first = len(words)
    while first > 1 and ink.length(" ".join(words[:first]), SMALL) > inner:
        first -= 1
    lines = [" ".join(words[:first]), " ".join(words[first:])]
    lines = [ink.clipped(line, SMALL, inner) for line in lines if line]
    for k, line in enumerate(lines):
        y = at[1] + ink.px(11.5) * (k - (len(lines) - 1) / 2)
        ink.write(draw, (at[0] + ink.px(7), y), line, SMALL, FAILED)


def _cells(
    ink: Ink,
    out: Image.Image,
    cells: Thumbnails,
    row: ComparisonRow,
    number: int,
    words: range,
    at: tuple[int, int],
) -> None:
    """The thumbnails of one method."""
    draw = ImageDraw.Draw(out)
    for k, n in enumerate(words):
        x, y = at[0] + k * (cells.width + ink.px(CELL_GAP)), at[1]
        pictures = cells.pictures(number, n)
        if pictures is None:
            box = (x, y, x + cells.width - 1, y + cells.height - 1)
            draw.rounded_rectangle(box, ink.px(3), fill=BLANK)
            ink.write(
                draw, (x + cells.width / 2, y + cells.height / 2), "–", WORD, MUTED, False, "mm"
            )
        else:
            for picture, (left, top) in pictures:
                out.paste(ink.rounded(picture, 2.5), (x + left, y + top))
        if not row.complete[n]:
            _corner(draw, (x, y), max(ink.px(9), cells.width // 8))


def _corner(draw: ImageDraw.ImageDraw, at: tuple[float, float], side: int) -> None:
    """The mark of an unfinished map: a triangle in the upper left corner."""
    x, y = at
    draw.polygon(((x, y), (x + side, y), (x, y + side)), fill=PARTIAL)
