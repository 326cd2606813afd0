r"""All checks, one after the other: an error of one is its line, and does not stop the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from captum_dcam import checks
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.doctor import answer, gradients, maps, model
from captum_dcam.doctor.report import LOOK, STOP, UNJUDGED, Line, Report
from captum_dcam.doctor.subject import Subject, Unjudged
from captum_dcam.errors import (
    DcamError,
    InputTypeError,
    MissingPackageError,
    ProcessorError,
    WeightsError,
)
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.families import said
from captum_dcam.model.progress import ProgressLike, as_progress
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of, summary

#: the lines in their order; each is judged from what the ones before have found
CHECKS: tuple[tuple[str, Callable[[Subject], Line]], ...] = (
    ("versions", model.versions),
    ("processor", model.processor),
    ("weights", model.weights),
    ("repairs", model.repaired),
    ("block", model.block),
    ("chat template", model.template),
    ("special ids", model.special_ids),
    ("image span", model.span),
    ("answer", answer.answer),
    ("replay", answer.replay),
    ("rotary", answer.rotary),
    ("feasible calls", answer.feasible),
    ("gradient", gradients.gradient),
    ("small gradients", gradients.small),
    ("norms", gradients.norms),
    ("precision", maps.precision),
    ("clustering", maps.clustering),
    ("sign", maps.sign),
    ("cost", maps.cost),
    ("batch size", maps.batch),
)
#: what loading refuses before there is a model to look at, and the line that it belongs to
REFUSED: tuple[tuple[type[DcamError], str], ...] = (
    (MissingPackageError, "versions"),
    (ProcessorError, "processor"),
    (WeightsError, "weights"),
)
#: what is asked where nothing else is said, of the held-out scene of that number
PROMPT, SCENE = "describe the image .", 12
#: what to do about an error that is not this library's
FULL = "free memory, or take a smaller image, a shorter answer or a deeper block: docs/COST.md"
BUG = "report it with this file, and the traceback of captum_dcam.explain on this image"


def doctor(
    model: Adapter | Callable[[], Adapter],
    image: Pictures | None = None,
    prompt: Prompt | None = None,
    *,
    layer: int | None = None,
    seed: int = 0,
    progress: ProgressLike = None,
    **generation: Any,
) -> Report:
    r"""Look at a model before its maps are believed: what is fine, and what is not.

    The model is as before when it returns. Whatever a check raises is its line's *stop*; the others
    go on as far as they can.

    Args:
        model (Adapter or callable): from :func:`captum_dcam.load` or :func:`captum_dcam.wrap`; or a
            function without arguments that calls one of them, so that what it refuses becomes a
            line as well: ``doctor(lambda: captum_dcam.wrap(model, processor))``.
        image (path, PIL.Image.Image or sequence, optional): as :func:`captum_dcam.explain` takes
            it; a photograph says most. Default: a drawn scene
        prompt (str or sequence of dict, optional): Default: ``"describe the image ."``
        layer (int, optional): block to explain. Default: the recommended one
        seed (int, optional): of everything that is drawn. Default: 0
        progress (bool or callable, optional): True shows a bar; a function receives the name of
            every check before it, see :mod:`captum_dcam.model.progress`. Default: nothing
        **generation: the family's decoding settings, or ``decoding="demo"``.

    Returns:
        Report: its lines by name, in order.

    Raises:
        DcamError: image, prompt or arguments that cannot be; a model that nobody knows.
    """
    seed = checks.whole("seed", seed, least=None)
    told = as_progress(progress, "doctor", "check")
    shown = make_scene(HELD_OUT, SCENE).image if image is None else image
    images = pictures_of(shown)
    if not isinstance(model, Adapter):
        made = _made(model)
        if isinstance(made, Report):
            return made
        model = made
    asked = PROMPT if prompt is None else prompt
    subject = Subject(model, images, asked, layer, seed, generation)
    lines: dict[str, Line] = {}
    told.begin(len(CHECKS))
    for name, check in CHECKS:
        told.say(name)
        lines[name] = _judged(check, subject)
        told.image()
    told.end()
    name = f"{model.family}: {type(model.model).__name__}"
    written = str(lines["answer"].values.get("answer", ""))
    return Report(name, summary(asked), written, lines)


def _made(make: Callable[[], Adapter]) -> Adapter | Report:
    """The adapter, or the report about why there is none."""
    try:
        made = make()
    except tuple(kind for kind, _ in REFUSED) as error:
        place = next(name for kind, name in REFUSED if isinstance(error, kind))
        rest = Line(UNJUDGED, "there is no model")
        lines = {name: rest for name, _ in CHECKS}
        lines[place] = Line(STOP, str(error), "see to this first")
        return Report("none", "", "", lines)
    if not isinstance(made, Adapter):
        raise InputTypeError(
            f"model is a {type(made).__name__}: expected an adapter, or a function that makes one, "
            "such as lambda: captum_dcam.wrap(model, processor)"
        )
    return made


def _judged(check: Callable[[Subject], Line], subject: Subject) -> Line:
    """A check's line; whatever it raises is a line too."""
    try:
        return check(subject)
    except Unjudged as reason:
        return Line(UNJUDGED, str(reason))
    except DcamError as error:
        return Line(STOP, str(error))
    except torch.cuda.OutOfMemoryError as error:
        return Line(LOOK, f"memory is full: {error}", FULL)
    except Exception as error:  # noqa: BLE001  a model's code may raise anything
        return Line(STOP, said(error), BUG)
