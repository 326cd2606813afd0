"""The answer filling in, as an animation: every word's map as it commits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.files import check_names, write_atomically
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.summary import summarise
from captum_dcam.viewer.ink import BODY, MUTED, Color, Ink, Page, Run, running, step_color
from captum_dcam.viewer.overlay import fitted, scaled, word_overlay

#: colours of a frame, milliseconds of one, and of the last one
COLORS, PAUSE, LAST = 255, 900, 3000
#: what stands in place of a word that is not written yet
BLANK: Color = (229, 233, 239)


def write_animation(
    explanation: Explanation,
    path: str | Path,
    *,
    width: int = 720,
    milliseconds: int = PAUSE,
) -> Path:
    r"""Write a GIF: a frame per step that commits an explained word, and the whole answer last.

    A frame shows the first image with the map of the word that the step committed (of several, one
    frame each), and the answer so far: words not yet written are blanks.

    Args:
        explanation (Explanation): of an answer that was generated.
        path (path): where to; an earlier file is replaced.
        width (int, optional): in pixels. Default: 720
        milliseconds (int, optional): that a frame stays. Default: 900

    Raises:
        InputError: an answer that was given, which has no steps; no word; a size out of range.
        FileError: it cannot be written.
    """
    path = Path(path)
    width = checks.whole("width", width, 300)
    milliseconds = checks.whole("milliseconds", milliseconds, 20)
    if explanation.trajectory.forced:
        raise InputError("the answer was given, not generated: there are no steps to animate")
    if not explanation.targets:
        raise InputError("no word was explained: there is nothing to animate")
    check_names(path, 0)
    commits = [max(own) for own in explanation.commit_steps()]
    order = sorted(range(len(commits)), key=lambda n: (commits[n], n))
    film = _Film(explanation, width, commits)
    frames = [film.frame(n, commits[n], order[: i + 1]) for i, n in enumerate(order)]
    frames = [film.frame(None, -1, []), *frames, film.frame(None, film.last, order)]
    file = io.BytesIO()
    first, *rest = _few_colors(frames)
    times = [milliseconds] * (len(frames) - 1) + [max(LAST, milliseconds)]
    first.save(file, "gif", save_all=True, append_images=rest, duration=times, loop=0)
    write_atomically(path, [file.getvalue()])
    return path


def _few_colors(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames with one palette of all, so that nothing flickers."""
    wide, high = frames[0].size
    whole = Image.new("RGB", (wide, high * len(frames)))
    for i, frame in enumerate(frames):
        whole.paste(frame, (0, i * high))
    colors = whole.quantize(COLORS, Image.Quantize.FASTOCTREE)
    return [f.quantize(palette=colors, dither=Image.Dither.NONE) for f in frames]


class _Film:
    """Frames of one size."""

    def __init__(self, explanation: Explanation, width: int, commits: list[int]) -> None:
        self.explanation, self.commits = explanation, commits
        # sheets are a thousand units wide and laid out for 1600 px; a film is small, its text large
        self.ink, self.width = Ink(round(width * 1.35)), width
        self.margin = round(width * 0.025)
        side = round(width * 0.42)
        self.size = fitted(explanation.images[0].size, side, side)
        self.first, self.last = min(commits), explanation.trajectory.steps - 1
        span = max(commits) - self.first + 1
        self.colors = [step_color(c - self.first, span) for c in commits]
        self.rows = summarise(explanation)
        self.steps: Tensor = explanation.trajectory.commit_step[0]
        self.room = width - self.size[0] - 3 * self.margin
        self.height = max(self.size[1], self._text(self._page(10), [], self.last)) + 2 * self.margin

    def _page(self, height: int) -> Page:
        return self.ink.page(self.width, height)

    def frame(self, word: int | None, step: int, done: list[int]) -> Image.Image:
        """The state after a step; ``word`` is the one whose map is shown, ``done`` are written."""
        page = self._page(self.height)
        if word is None:
            shown = scaled(self.explanation.images[0], self.size)
        else:
            shown = word_overlay(self.explanation, word, 0, size=self.size)
        page.image.paste(self.ink.rounded(shown), (self.margin, self.margin))
        y = self._text(page, done, step)
        if word is not None:
            row, left = self.rows[word], 2 * self.margin + self.size[0]
            line = f"step {step}: “{row.word}”, probability {row.confidence:.0%}"
            page.write(
                (left, y - self.ink.px(13)), self.ink.clipped(line, 15, self.room), 15, MUTED
            )
        return page.image

    def _text(self, page: Page, done: list[int], step: int) -> int:
        """Draw prompt and answer; returns the y below them and a line for the step."""
        left, units = 2 * self.margin + self.size[0], BODY
        asked = self.ink.lines([Run(w) for w in self.explanation.prompt.split()], units, self.room)
        y = page.flow((left, self.margin), asked, units, 26) + self.ink.px(12)
        colors = [c if n in done else BLANK for n, c in enumerate(self.colors)]
        runs = running(self.explanation.token_texts, self.explanation.targets, colors)
        owned = {p for t in self.explanation.targets for p in t.positions}
        written = {
            self.explanation.token_texts[p].strip()
            for p, s in enumerate(self.steps.tolist())
            if p not in owned and s <= step
        }
        hidden = [
            Run("\N{NO-BREAK SPACE}" * (len(r.text) + 1), BLANK, r.glued)
            if r.color == BLANK or (r.color is None and r.text not in written)
            else r
            for r in runs
        ]
        said = self.ink.lines(hidden, units, self.room)
        return int(page.flow((left, y), said, units, 34)) + self.ink.px(30)
