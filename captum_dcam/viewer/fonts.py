r"""Which fonts draw a text: DejaVu Sans, which matplotlib carries, and, for what that lacks, the
first installed one that has it. What no font has is drawn as a box, and named once in a warning."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

#: files of fonts that read well, in order, before all others
PREFERRED = ("NotoSansCJK-Reg", "NotoSans", "SourceHanSans", "PingFang", "msyh", "Hiragino", "Noto")
#: not to be drawn with: placeholders, and pictures of one size
UNFIT = re.compile(r"LastResort|Last Resort|Adobe.?Blank|ColorEmoji|Color Emoji")
#: styles that are not those of running text
STYLED = re.compile(r"bold|ital|obli|light|black|thin|heavy|cond|mono|serif", re.IGNORECASE)
#: what is shown of a text that is blank
EMPTY = "␣"
BOX = "\N{WHITE SQUARE}"
#: signs in place of characters that would break a line or its layout
SHOWN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": " ", "\r": ""}


class GlyphWarning(UserWarning):
    """Characters that no installed font has; says which, and what to install."""


@lru_cache(maxsize=2)
def dejavu(bold: bool = False) -> str:
    """The file of DejaVu Sans."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@lru_cache(maxsize=128)
def font(size: int, bold: bool = False, file: str | None = None) -> ImageFont.FreeTypeFont:
    """A font file at a size in pixels. Default: DejaVu Sans"""
    return ImageFont.truetype(file or dejavu(bold), size)


def one_line(text: str) -> str:
    """A text without line breaks and other control characters: signs or blanks for them."""
    if text.isprintable():
        return text
    return "".join(_on_a_line(c) for c in text)


def _on_a_line(character: str) -> str:
    if character in SHOWN:
        return SHOWN[character]
    kind = unicodedata.category(character)
    return "" if kind == "Cs" else " " if kind in ("Cc", "Zl", "Zp") else character


def parts(text: str, bold: bool = False) -> list[tuple[str, str]]:
    """Stretches of a line with the file of the font that draws each."""
    text = one_line(text)
    if all(ord(c) in _characters(dejavu(bold)) for c in text):
        return [(text, dejavu(bold))]
    found: list[tuple[str, str]] = []
    for file, stretch in groupby(_drawn(text, bold), key=lambda pair: pair[1]):
        found.append(("".join(c for c, _ in stretch), file))
    return found


def _drawn(text: str, bold: bool) -> Iterator[tuple[str, str]]:
    """Characters as they are drawn, each with its font's file."""
    missing: list[str] = []
    before = dejavu(bold)
    for c in text:
        if ord(c) in _characters(before) and (c.isspace() or unicodedata.category(c)[0] in "MC"):
            file: str | None = before  # a mark, joiner or blank stays with what it stands behind
        else:
            file = _home(c, bold, installed())
        if file is not None:
            before = file
            yield c, file
        elif unicodedata.category(c) not in ("Cf", "Mn"):  # those show nothing by themselves
            missing.append(c)
            yield BOX, dejavu(bold)
    _warn(missing)


@lru_cache(maxsize=4096)
def _home(character: str, bold: bool, files: Sequence[str]) -> str | None:
    """The first font that has a character."""
    own = (dejavu(bold), *files)
    return next((file for file in own if ord(character) in _characters(file)), None)


@lru_cache(maxsize=512)
def _characters(file: str) -> frozenset[int]:
    """Code points that a font has; none for a file that is no font of any size."""
    try:
        made = FT2Font(file)
        return frozenset(made.get_charmap()) if made.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@lru_cache(maxsize=1)
def installed() -> tuple[str, ...]:
    """Files of the fonts of this machine, those that read well first."""
    from matplotlib.font_manager import findSystemFonts

    def order(file: str) -> tuple[int, bool, str]:
        name = Path(file).name
        rank = next((i for i, p in enumerate(PREFERRED) if name.startswith(p)), len(PREFERRED))
        return rank, bool(STYLED.search(name)), file

    return tuple(sorted((f for f in findSystemFonts() if not UNFIT.search(f)), key=order))


_named: set[str] = set()


def _warn(missing: Sequence[str]) -> None:
    """Name missing characters, each once per process."""
    new = sorted(set(missing) - _named)
    if not new:
        return
    _named.update(new)
    shown = ", ".join(f"{c} (U+{ord(c):04X})" for c in new[:8])
    more = f" and {len(new) - 8} more" if len(new) > 8 else ""
    warnings.warn(
        f"no installed font has {shown}{more}: pictures show boxes there. Install fonts of this "
        "script, such as the Noto fonts (Debian: fonts-noto-cjk for Chinese, Japanese and Korean, "
        "fonts-noto-core for most others), and start Python anew",
        GlyphWarning,
        stacklevel=3,
    )


def families(text: str, bold: bool = False) -> tuple[str, list[str]]:
    r"""A line as matplotlib is to draw it, and the families that it needs behind its own.

    They are made known to matplotlib, whose list of fonts may be older than they are.
    """
    from matplotlib.font_manager import fontManager

    found = parts(text, bold)
    names = []
    for file in dict.fromkeys(file for _, file in found):
        if file == dejavu(bold):
            continue
        if not any(entry.fname == file for entry in fontManager.ttflist):
            fontManager.addfont(file)
        names.append(next(e.name for e in fontManager.ttflist if e.fname == file))
    return "".join(part for part, _ in found), names
