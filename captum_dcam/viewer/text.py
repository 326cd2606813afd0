r"""Relevance of text: tokens of prompt and answer coloured by value, as HTML or as a figure.

What speaks for the explained word is orange, what speaks against it is blue. The strongest value
of all tokens has full colour.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.viewer.fonts import EMPTY, families, one_line

#: red, green and blue of what speaks for the word, and of what speaks against it
FOR, AGAINST = (232, 118, 0), (38, 112, 220)
#: opacity of the strongest value: text on it stays readable on a light and on a dark page
STRONGEST = 0.6
#: a token's probability beside its text
Candidate = tuple[str, float]


@dataclass(frozen=True)
class _Token:
    """One token as it is drawn; its value is in [-1, 1], or None where it has none."""

    text: str
    value: float | None
    raw: float
    explained: bool
    space: bool
    breaks: int


def text_html(
    token_texts: Sequence[str],
    values: Sequence[float] | Tensor | np.ndarray,
    prompt: int,
    *,
    explained: Collection[int] = (),
    candidates: Sequence[Candidate] = (),
    vmax: float | None = None,
) -> str:
    r"""Relevance of text as HTML that needs no other file.

    It has only inline styles, and translucent colours behind text of the page's own colour, so
    that it can be read on light and dark pages, in notebooks and mails. Hovering over a token
    shows its value.

    Args:
        token_texts (sequence of str): text of K tokens, with a leading space where a word begins;
            empty ones (stop tokens) are left out.
        values (sequence, Tensor or array): (K,) relevance; NaN: none, as for the explained token.
        prompt (int): how many of the tokens are the prompt's; the rest is the answer.
        explained (collection of int, optional): numbers of the tokens that are explained; they are
            framed. Default: none
        candidates (sequence, optional): (text, probability) of words that the model considered
            there, likeliest first. Default: none
        vmax (float, optional): the absolute value of full colour. Default: the largest

    Returns:
        str: one ``<div>``.

    Raises:
        ValueError: lengths, ``prompt``, ``explained``, ``vmax`` or a probability out of range.

    Examples::

        >>> "title" in text_html([" a", " cat"], [0.5, float("nan")], 1, explained=[1])
        True
    """
    tokens = _tokens(token_texts, values, prompt, explained, vmax)
    parts = {
        "Prompt": "".join(map(_span, tokens[:prompt])),
        "Answer": "".join(map(_span, tokens[prompt:])),
        "Candidates": " ".join(map(_candidate, _checked(candidates))),
    }
    label = "display:inline-block;min-width:6.5em;opacity:.65;font-size:12px"
    lines = "".join(
        f'<div><span style="{label}">{name}</span>{part}</div>'
        for name, part in parts.items()
        if part
    )
    style = "font-family:system-ui,sans-serif;font-size:15px;line-height:1.9;max-width:60em"
    return f'<div style="{style}">{lines}{_scale()}</div>'


def _span(token: _Token) -> str:
    rules = ["padding:.1em .12em", "border-radius:.25em", "white-space:pre-wrap"]
    if token.value:
        r, g, b = FOR if token.value > 0 else AGAINST
        rules.append(f"background:rgba({r},{g},{b},{abs(token.value) * STRONGEST:.3f})")
    if token.explained:
        rules += ["outline:2px solid currentColor", "font-weight:600"]
    title = "explained" if token.explained else "no value"
    if token.value is not None:
        title = f"{token.raw:+.4g}"
    blank = " " if token.space else ""
    text = html.escape(token.text)
    line = "<br>" * token.breaks
    return f'{blank}<span style="{";".join(rules)}" title="{title}">{text}</span>{line}'


def _candidate(candidate: Candidate) -> str:
    text, probability = candidate
    bar = f"rgba(128,128,128,.45) {probability:.1%},rgba(128,128,128,.13) {probability:.1%}"
    style = f"padding:.1em .5em;border-radius:.25em;background:linear-gradient(90deg,{bar})"
    shown = html.escape(_visible(text)) + "&nbsp;" + html.escape(percent(probability))
    return f'<span style="{style}">{shown}</span>'


def _scale() -> str:
    (r, g, b), (s, t, u) = AGAINST, FOR
    ramp = f"rgba({r},{g},{b},{STRONGEST}),rgba(128,128,128,0),rgba({s},{t},{u},{STRONGEST})"
    bar = "display:inline-block;width:7em;height:.7em;border-radius:.2em;margin:0 .5em"
    style = "font-size:12px;opacity:.8"
    return (
        f'<div style="{style}">against<span style="{bar};'
        f'background:linear-gradient(90deg,{ramp})"></span>for the word</div>'
    )


def percent(probability: float) -> str:
    """``62%``, ``0.4%``, ``<0.1%``."""
    if 0 < probability < 0.0005:
        return "<0.1%"
    return f"{probability:.1%}" if 0 < probability < 0.01 else f"{probability:.0%}"


# -- figure -------------------------------------------------------------------------------------


def text_strip(
    token_texts: Sequence[str],
    values: Sequence[float] | Tensor | np.ndarray,
    prompt: int,
    *,
    explained: Collection[int] = (),
    candidates: Sequence[Candidate] = (),
    vmax: float | None = None,
    width: float = 8.0,
    size: float = 11.0,
) -> Figure:
    r"""Relevance of text as a matplotlib figure, built without pyplot's global state.

    ``figure.savefig("text.pdf")`` writes it; a notebook shows it. No LaTeX, no mathtext: a dollar
    sign is a dollar sign.

    Args:
        token_texts, values, prompt, explained, candidates, vmax: as in :func:`text_html`.
        width (float, optional): of the figure in inches. Default: 8
        size (float, optional): of the text in points. Default: 11

    Returns:
        matplotlib.figure.Figure: as high as its lines need.

    Raises:
        ValueError: as in :func:`text_html`; or ``width``, ``size`` out of range.
    """
    tokens = _tokens(token_texts, values, prompt, explained, vmax)
    if not 2 <= width <= 100 or not 4 <= size <= 72:
        raise InputError(f"width {width} in, text {size} pt: expected 2 to 100 in and 4 to 72 pt")
    chosen = _checked(candidates)
    words = [f"{_visible(text)} {percent(p)}" for text, p in chosen]
    parts = {
        "Prompt": tokens[:prompt],
        "Answer": tokens[prompt:],
        "Candidates": [_Token(word, None, 0.0, False, True, 0) for word in words],
    }
    strip = _Strip(width, size)
    for label, part in parts.items():
        if part:
            strip.section(label, part)
    return strip.finished()


class _Strip:
    """Draws words line by line, in points from the upper left corner."""

    def __init__(self, width: float, size: float) -> None:
        self.figure = Figure(figsize=(width, 1))
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.size, self.wide = size, width * 72
        self.left, self.margin, self.leading = size * 6.4, size * 0.6, size * 2.0
        self.line = -1

    def _length(self, text: str, weight: str) -> float:
        text, style = _drawn(text, weight)
        drawn = self.figure.text(0, 0, text, size=self.size, parse_math=False, **style)
        box = drawn.get_window_extent(self.renderer)
        drawn.remove()
        return box.width / self.figure.dpi * 72

    def _write(self, x: float, text: str, **style: Any) -> float:
        """A text in the current line; returns the line's middle."""
        y = self.margin + (self.line + 0.5) * self.leading
        text, own = _drawn(text, style.pop("weight", "normal"))
        self.axes.text(x, y, text, va="center_baseline", parse_math=False, **own, **style)
        return y

    def section(self, label: str, tokens: Sequence[_Token]) -> None:
        """A label, and its tokens in as many lines as they need."""
        self.line += 1
        self._write(self.margin, label, size=self.size * 0.8, color="0.4")
        x, blank, pad = self.left, self.size * 0.3, self.size * 0.14
        for token in tokens:
            weight = "bold" if token.explained else "normal"
            length = self._length(token.text, weight) + 2 * pad
            x += blank * 1.6 if token.space and x > self.left else 0.0
            if x + length > self.wide - self.margin and x > self.left:
                self.line, x = self.line + 1, self.left
            self._token(token, x, length, weight)
            x += length
            if token.breaks:
                self.line, x = self.line + token.breaks, self.left

    def _token(self, token: _Token, x: float, length: float, weight: str) -> None:
        middle, style = x + length / 2, {"size": self.size, "weight": weight, "color": "0.1"}
        y = self._write(middle, token.text, ha="center", **style)
        value = token.value or 0.0
        color = FOR if value > 0 else AGAINST
        box = FancyBboxPatch(
            (x, y - self.size * 0.72),
            length,
            self.size * 1.44,
            boxstyle=f"round,pad=0,rounding_size={self.size * 0.25}",
            facecolor=(*(c / 255 for c in color), abs(value) * STRONGEST),
            edgecolor="0.1" if token.explained else "none",
            linewidth=1.2,
        )
        self.axes.add_patch(box)

    def finished(self) -> Figure:
        """The figure, as high as its lines."""
        high = (self.line + 1) * self.leading + 2 * self.margin
        self.figure.set_size_inches(self.wide / 72, high / 72)
        self.axes.set(xlim=(0, self.wide), ylim=(high, 0))
        self.axes.set_axis_off()
        return self.figure


def _drawn(text: str, weight: str) -> tuple[str, dict[str, Any]]:
    """A text, and its weight and fonts as matplotlib takes them."""
    text, more = families(text, weight == "bold")
    if not more:
        return text, {"weight": weight}
    return text, {"family": [*rcParams["font.family"], *more]}  # other fonts are seldom bold


# -- input --------------------------------------------------------------------------------------


def _tokens(
    token_texts: Sequence[str],
    values: Sequence[float] | Tensor | np.ndarray,
    prompt: int,
    explained: Collection[int],
    vmax: float | None,
) -> list[_Token]:
    """Checked input: one record per token, values in [-1, 1]."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    raw, count = np.asarray(values, dtype=np.float64), len(token_texts)
    if raw.shape != (count,):
        raise InputError(f"values have shape {raw.shape}: expected ({count},), one per token")
    if not 0 <= prompt <= count:
        raise InputError(f"prompt is {prompt}: expected a number of tokens, 0 to {count}")
    if strange := sorted(set(explained) - set(range(count))):
        raise InputError(f"explained token {strange[0]} is not one of the {count} tokens")
    if np.isinf(raw).any():
        raise InputError("values hold an infinity: expected numbers, or NaN for none")
    if vmax is not None and not (vmax > 0 and math.isfinite(vmax)):
        raise InputError(f"vmax is {vmax}: expected a positive number")
    known = np.abs(raw[~np.isnan(raw)])
    top = vmax if vmax is not None else float(known.max(initial=0.0)) or 1.0
    out = []
    for k, (text, value) in enumerate(zip(token_texts, raw.tolist(), strict=True)):
        if not text and k not in explained:
            continue
        shown = None if math.isnan(value) else max(-1.0, min(1.0, value / top))
        space, breaks = text[:1].isspace() and text[:1] != "\n", text.count("\n")
        out.append(_Token(_visible(text), shown, value, k in explained, space, breaks))
    return out


def _visible(text: str) -> str:
    """A token's text without spaces around it; line breaks as signs."""
    return one_line(text).strip() or EMPTY


def _checked(candidates: Sequence[Candidate]) -> list[Candidate]:
    for text, probability in candidates:
        if not 0 <= probability <= 1:
            raise InputError(f"candidate {text!r} has probability {probability}: expected 0 to 1")
    return list(candidates)
