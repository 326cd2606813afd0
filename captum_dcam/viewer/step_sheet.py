r"""The answer as it was written: a row per word, a column per denoising step."""

from __future__ import annotations

from PIL import Image

from captum_dcam.errors import InputError
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.steps import StepMaps
from captum_dcam.viewer.ink import (
    INNER,
    MUTED,
    SMALL,
    Ink,
    Run,
    header,
    running,
    stacked,
    step_color,
    titled,
)
from captum_dcam.viewer.overlay import CMAP, MUTE, fitted, overlay, scaled

#: columns of a sheet, at most
COLUMNS = 8


def step_sheet(
    explanation: Explanation, *, image: int = 0, width: int = 1600, cmap: str = CMAP
) -> Image.Image:
    r"""Draw the maps and probabilities of every word at some of the steps.

    The first and the last step, each word's own commit steps as far as there is room, and steps
    evenly between. A word's maps share one scale (:class:`captum_dcam.results.steps.StepMaps`), so
    that one sees when the evidence appears; the step that committed it has its colour.

    Args:
        explanation (Explanation): with ``steps``, see ``explain(…, every_step=True)``.
        image (int, optional): number of the image. Default: 0
        width (int, optional): of the sheet in pixels. Default: 1600
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``

    Returns:
        PIL.Image.Image: RGB.

    Raises:
        InputError: the explanation has no maps of every step.
    """
    steps = explanation.steps
    if steps is None:
        raise InputError(
            "the explanation has no maps of every step: explain(…, every_step=True), or "
            "--every-step on the command line"
        )
    ink, trajectory = Ink(width), explanation.trajectory
    commits = [max(own) for own in explanation.commit_steps()]
    colors = [step_color(step, trajectory.steps) for step in commits]
    answer = running(explanation.token_texts, explanation.targets, colors)
    shown = chosen_steps(trajectory.steps, commits)
    label, gap, edge = ink.px(110), ink.px(8), ink.px(2)
    cell = (ink.px(INNER) - label) // len(shown) - gap
    size = fitted(explanation.images[image].size, cell, cell * 1.2)
    picture = scaled(explanation.images[image], size)
    parts = [header(ink, explanation.images, explanation.prompt, answer, titled(explanation))]
    heads = ink.page(ink.px(INNER), ink.px(24))
    for column, step in enumerate(shown):
        heads.write((label + column * (cell + gap), ink.px(12)), f"step {step}", SMALL, MUTED)
    parts.append(heads.image)
    for n, word in enumerate(explanation.words):
        line = ink.page(ink.px(INNER), size[1] + ink.px(26))
        line.chip((0, size[1] // 2), Run(ink.clipped(word, 15, label - ink.px(30)), colors[n]), 15)
        for column, step in enumerate(shown):
            x = label + column * (cell + gap)
            heat = _cell(explanation, steps, n, step, image, picture, cmap)
            if step == commits[n]:
                frame = Image.new("RGB", (size[0] + 2 * edge, size[1] + 2 * edge), colors[n])
                line.image.paste(frame, (x - edge, 0))
            line.image.paste(heat, (x, edge))
            sure = float(steps.probabilities[step, n])
            text = "–" if sure != sure else f"{sure:.0%}"
            line.write((x, size[1] + edge + ink.px(13)), text, SMALL, MUTED)
        parts.append(line.image)
    return stacked(parts, ink)


def chosen_steps(count: int, commits: list[int], most: int = COLUMNS) -> list[int]:
    """At most ``most`` of the steps: the first, the last, commit steps, and evenly between."""
    if count <= most:
        return list(range(count))
    evenly = [round(i * (count - 1) / (most - 1)) for i in range(most)]
    own = sorted(set(commits))
    if len(own) > most - 2:
        own = [own[round(i * (len(own) - 1) / (most - 3))] for i in range(most - 2)]
    found = {0, count - 1, *own}
    for step in sorted(evenly, key=lambda s: -min(abs(s - f) for f in found)):
        if len(found) < most:
            found.add(step)
    return sorted(found)


def _cell(
    explanation: Explanation,
    steps: StepMaps,
    word: int,
    step: int,
    image: int,
    picture: Image.Image,
    cmap: str,
) -> Image.Image:
    """A word's map of one step over the image, on the scale of all its steps."""
    own = [maps[step, word] for maps in steps.maps]
    values = explanation.layout.over_image(own, image, (picture.height, picture.width), "bilinear")
    return overlay(picture, values, cmap=cmap, vmax=max(1.0, float(values.max())), mute=MUTE)
