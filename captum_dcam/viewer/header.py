r"""What sheets and panels have in common: pictures, prompt and answer on top, colour bars."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from captum_dcam.model.words import Target
from captum_dcam.viewer.ink import MUTED, PAPER, Color, Ink, Run
from captum_dcam.viewer.overlay import fitted, scaled

#: thousandths of the width: around everything, between parts, what is left, text of the answer
MARGIN, GAP = 28, 22
INNER = 1000 - 2 * MARGIN
BODY = 17.0


def header(
    ink: Ink, images: Sequence[Image.Image], prompt: str, answer: Sequence[Run]
) -> Image.Image:
    """Pictures on the left; prompt and answer on the right."""
    picture = _pictures(ink, images)
    left = picture.width + ink.px(26)
    room = ink.px(INNER) - left
    asked = ink.lines([Run(w) for w in prompt.split()], BODY, room)
    said = ink.lines(answer, BODY, room)
    need = ink.px(24) * 2 + ink.px(27) * len(asked) + ink.px(34) * len(said) + ink.px(16 + 4)
    out = Image.new("RGB", (ink.px(INNER), max(picture.height, need)), PAPER)
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    y = _label(ink, draw, (left, 0), "PROMPT")
    y = ink.flow(draw, (left, y), asked, BODY, 27) + ink.px(16)
    y = _label(ink, draw, (left, y), "ANSWER")
    ink.flow(draw, (left, y), said, BODY, 34)
    return out


def _label(ink: Ink, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str) -> float:
    ink.write(draw, (at[0], at[1] + ink.px(9)), text, 11.5, MUTED, bold=True)
    return at[1] + ink.px(24)


def _pictures(ink: Ink, images: Sequence[Image.Image]) -> Image.Image:
    """The request's picture, or a mosaic of its pictures."""
    if len(images) == 1:
        size = fitted(images[0].size, ink.px(330), ink.px(270))
        return ink.rounded(scaled(images[0], size))
    cell = ink.px(160 if len(images) <= 4 else 105)
    return mosaic(ink, [scaled(i, fitted(i.size, cell, cell)) for i in images])


def mosaic(ink: Ink, pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, two a row (three when there are more than four), tops aligned."""
    columns = 1 if len(pictures) == 1 else 2 if len(pictures) <= 4 else 3
    lines = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    gap = ink.px(6)
    heights = [max(p.height for p in line) for line in lines]
    width = max(sum(p.width for p in line) + gap * (len(line) - 1) for line in lines)
    out = Image.new("RGB", (width, sum(heights) + gap * (len(lines) - 1)), PAPER)
    y = 0
    for line, height in zip(lines, heights, strict=True):
        x = 0
        for picture in line:
            out.paste(ink.rounded(picture), (x, y))
            x += picture.width + gap
        y += height + gap
    return out


def running(
    token_texts: Sequence[str], targets: Sequence[Target], colors: Sequence[Color]
) -> list[Run]:
    """The answer as running text; tokens of an explained word are one chip of its colour."""
    owner: dict[int, int] = {}
    for n, target in enumerate(targets):
        for position in target.positions:
            owner.setdefault(position, n)
    runs: list[Run] = []
    last: int | None = None
    for position, piece in enumerate(token_texts):
        text, word = piece.strip(), owner.get(position)
        if not text:
            continue
        glued = not piece[:1].isspace()
        if runs and ((word is not None and word == last) or (word is None is last and glued)):
            runs[-1] = Run(
                runs[-1].text + ("" if glued else " ") + text, runs[-1].color, runs[-1].glued
            )
        else:
            runs.append(Run(text, None if word is None else colors[word], glued))
        last = word
    return runs or [Run("(empty)")]


def bar(
    ink: Ink, out: Image.Image, at: tuple[int, int], text: str, cmap: str, ends: tuple[int, int]
) -> int:
    """A colour bar and its label; returns the x behind them."""
    ramp = ink.ramp((ink.px(72), ink.px(9)), cmap, *ends)
    out.paste(ink.rounded(ramp, 3), (at[0], at[1] - ramp.height // 2))
    x = at[0] + ramp.width + ink.px(9)
    ink.write(ImageDraw.Draw(out), (x, at[1]), text, 12.5, MUTED)
    return x + round(ink.length(text, 12.5))
