r"""What the parts of a saved result must be, checked before anything is made of them.

Shapes are written with letters: N words, T tokens of the answer, S steps, h and w of a grid. What
does not fit raises :class:`~captum_dcam.errors.ExplanationError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import ExplanationError
from captum_dcam.model.trajectory import stored_cache
from captum_dcam.results.scores import COLUMNS, TEXTS, WHOLE

#: kinds of numbers that a tensor may hold, for messages and checks
_FLOAT, _WHOLE, _TRUTH = "floating-point numbers", "int64", "bool"
#: how far a comparison's method may have come
STATUSES = ("done", "partial", "failed")


def _refuse(what: str, found: Any, expected: str) -> ExplanationError:
    shown = str(found) if isinstance(found, str) else repr(found)
    return ExplanationError(
        f"the saved {what} is {shown[:120]}: expected {expected}; it is damaged, make it again"
    )


# -- plain values ----------------------------------------------------------------------------------


def _is(what: str, value: Any, kind: type, expected: str) -> Any:
    """The value, which must be of this very type: True is no number."""
    if type(value) is not kind:
        raise _refuse(what, value, expected)
    return value


def _text(what: str, value: Any) -> str:
    found: str = _is(what, value, str, "a text")
    return found


def _whole(what: str, value: Any, low: int = 0) -> int:
    if type(value) is not int or value < low:
        raise _refuse(what, value, f"a whole number of at least {low}")
    return value


def _record(what: str, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = _is(what, value, dict, "a record")
    return found


def _list(what: str, value: Any, kind: type | None = None, count: int | None = None) -> list[Any]:
    """A list, of ``count`` items of one type."""
    found: list[Any] = _is(what, value, list, "a list")
    if count is not None and len(found) != count:
        raise _refuse(f"list of {what}", f"{len(found)} long", f"{count} of them")
    if kind is not None:
        for one in found:
            _is(what, one, kind, f"a list of {kind.__name__}")
    return found


# -- tensors ---------------------------------------------------------------------------------------


def _tensor(tensors: Mapping[str, Tensor], name: str, kind: str, *shape: int | None) -> Tensor:
    """A tensor of a shape, None standing for any size."""
    if name not in tensors:
        raise _refuse("tensors", f"without {name!r}", "all that the manifest counts")
    found = tensors[name]
    fits = {
        _FLOAT: found.is_floating_point(),
        _WHOLE: found.dtype == torch.int64,
        _TRUTH: found.dtype == torch.bool,
    }
    sizes = len(found.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
    )
    if not fits[kind] or not sizes:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        what = f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        raise _refuse(f"tensor {name!r}", what, f"{kind} of shape ({expected})")
    return found


# -- what both kinds of results have ---------------------------------------------------------------


def _shared(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> list[tuple[int, int]]:
    """Check texts, settings and the layout; returns (h, w) of every grid."""
    for name in ("prompt", "answer"):
        _text(name, manifest[name])
    _record("settings", manifest["settings"])
    for name, version in _record("versions", manifest["versions"]).items():
        _text(f"version of {name}", version)
    _whole("prefix_length", manifest["prefix_length"])
    shapes = []
    for i, grid in enumerate(_list("grids", manifest["grids"], dict)):
        shape = _tensor(tensors, f"grid.{i}.positions", _WHOLE, None, None).shape
        _tensor(tensors, f"grid.{i}.y_edges", _FLOAT, shape[0], 2)
        _tensor(tensors, f"grid.{i}.x_edges", _FLOAT, shape[1], 2)
        sides = _list(f"image_size of grid {i}", grid["image_size"], int, 2)
        number = _whole(f"image of grid {i}", grid["image"])
        if number >= len(images) or images[number].size != (sides[1], sides[0]):
            held = f"{len(images)} images of {', '.join(str(i.size) for i in images[:4])}"
            raise _refuse(f"grid {i}", f"of image {number}, {sides} px", f"one of {held}")
        shapes.append((shape[0], shape[1]))
    stray = sum(name.startswith("grid.") for name in tensors) - 3 * len(shapes)
    if not shapes or stray:
        raise _refuse("list of grids", f"{len(shapes)} long", "as many as there are tensors of")
    return shapes


def _targets(records: Any, length: int | None) -> int:
    """Check targets of an answer of ``length`` tokens; returns how many there are."""
    for n, one in enumerate(_list("targets", records, dict)):
        _text(f"target {n}", one["text"])
        positions = _list(f"positions of target {n}", one["positions"], int)
        _list(f"token_ids of target {n}", one["token_ids"], int, len(positions))
        if "foil_ids" in one:
            _list(f"foil_ids of target {n}", one["foil_ids"], int, len(positions))
        if not positions or min(positions) < 0 or (length is not None and max(positions) >= length):
            within = "the answer" if length is None else f"its {length} tokens"
            raise _refuse(f"target {n}", f"at {positions}", f"positions within {within}")
    return len(records)


# -- explanations ----------------------------------------------------------------------------------


def check_explanation(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> None:
    r"""Check what an explanation is made of.

    Raises:
        ExplanationError: a value of another type, or a tensor of another shape or type.
        KeyError: a value that is missing.
    """
    shapes = _shared(manifest, tensors, images)
    length = len(_list("pieces", manifest["pieces"], str))
    words = _targets(manifest["targets"], length)
    for i, shape in enumerate(shapes):
        _tensor(tensors, f"maps.{i}", _FLOAT, words, *shape)
        _tensor(tensors, f"peaks.{i}", _FLOAT, words)
    steps = _trajectory(_record("trajectory", manifest["trajectory"]), tensors, length)
    if any(name.startswith("steps.") for name in tensors):
        _tensor(tensors, "steps.probabilities", _FLOAT, steps, words)
        for i, shape in enumerate(shapes):
            _tensor(tensors, f"steps.maps.{i}", _FLOAT, steps, words, *shape)
            _tensor(tensors, f"steps.peaks.{i}", _FLOAT, steps, words)
    for n in range(words):
        if f"mask.{n}" in tensors:
            _tensor(tensors, f"mask.{n}", _TRUTH, *manifest["grids"][0]["image_size"])
    if "trust" in manifest or any(name.startswith("trust.") for name in tensors):
        _trust(_record("trust", manifest["trust"]), tensors, words, steps, shapes)


def _trust(
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    words: int,
    steps: int,
    shapes: Sequence[tuple[int, int]],
) -> None:
    """Check what an explanation says of its own maps."""
    _tensor(tensors, "trust.localises", _FLOAT, words)
    _is("calibration", record["calibrated"], bool, "true or false")
    for name in ("source", "warning"):
        _text(f"{name} of the trust", record[name])
    for word in _list("candidates", record["candidates"], list, words):
        for token in word:
            for one in _list("candidates of a token", token, list):
                if len(one) != 3:
                    raise _refuse("candidate", one, "an id, a text and a probability")
                _whole("candidate's id", one[0])
                _text("candidate's text", one[1])
                _is("candidate's probability", one[2], float, "a number")
    if "trust.signs" in tensors:
        _tensor(tensors, "trust.signs", _FLOAT, words, 2)
    if "trust.probabilities" in tensors:
        _tensor(tensors, "trust.probabilities", _FLOAT, steps, words)
    if "trust.text" in tensors:
        known = len(_list("texts of the trust", record["pieces"], str))
        _whole("number of the prompt's tokens", record["prompt"])
        _tensor(tensors, "trust.text", _FLOAT, words, known)
        for name in ("positions", "ids"):
            _tensor(tensors, f"trust.{name}", _WHOLE, known)
        for i, shape in enumerate(shapes):
            _tensor(tensors, f"trust.maps.{i}", _FLOAT, words, *shape)
    if "scores" in record or any(name.startswith("trust.scores.") for name in tensors):
        _scores(_record("scores", record["scores"]), tensors, words)


def _scores(record: Mapping[str, Any], tensors: Mapping[str, Tensor], words: int) -> None:
    """Check what an explanation says of whether its words are so."""
    for name in TEXTS:
        _list(f"{name} of the scores", record[name], str, words)
    _text("calibrator", record["calibrator"])
    below = _is("bound of the calibrator", record["below"], float, "a probability")
    if not 0 <= below < 1:
        raise _refuse("bound of the calibrator", below, "a probability")
    for name in COLUMNS:
        _tensor(tensors, f"trust.scores.{name}", _WHOLE if name in WHOLE else _FLOAT, words)


def _trajectory(stored: Mapping[str, Any], tensors: Mapping[str, Tensor], length: int) -> int:
    """Check the record of a generation; returns S, its steps."""
    cache = stored_cache(_text("regime", stored["regime"]))
    _whole("image_end", stored["image_end"], 1)
    _record("settings of the generation", stored["settings"])
    _tensor(tensors, "tokens", _WHOLE, 1, length)
    commit = _tensor(tensors, "commit_step", _WHOLE, 1, length)
    _tensor(tensors, "confidence", _FLOAT, 1, length)
    steps = 0
    for i in range(_whole("number of states", stored["states"], 1)):
        for name in (f"state.{i}", f"final_state.{i}"):
            if name not in tensors or (name[0] == "s" and not tensors[name].ndim):
                raise _refuse("tensors", f"without {name!r}", "all states of the generation")
        steps = len(tensors[f"state.{i}"])
        if tensors[f"state.{i}"].shape[1:] != tensors[f"final_state.{i}"].shape:
            raise _refuse(f"state {i}", tuple(tensors[f"state.{i}"].shape), "as its final state")
    if "final_step" in tensors:
        _tensor(tensors, "final_step", _WHOLE, 1, length)
    if "read_at" in tensors:
        _tensor(tensors, "read_at", _TRUTH, steps, 1, length)
    if "given" in tensors:
        _tensor(tensors, "given", _TRUTH, 1, length)
    calls = steps + (cache == "prefix")
    _list("lengths", stored["lengths"], int, calls)
    if length and not 0 <= int(commit.min()) <= int(commit.max()) < steps:
        raise _refuse("commit_step", "out of range", f"steps from 0 to {steps - 1}")
    return steps


# -- comparisons -----------------------------------------------------------------------------------


def check_comparison(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> None:
    """Check what a comparison is made of; raises as :func:`check_explanation`."""
    shapes = _shared(manifest, tensors, images)
    words = _targets(manifest["words"], None)
    for n, word in enumerate(manifest["words"]):
        steps = _list(f"commit_steps of word {n}", word["commit_steps"], int)
        if len(steps) != len(word["positions"]):
            raise _refuse(f"word {n}", f"with {len(steps)} steps", "one per token")
        if f"mask.{n}" in tensors:
            _tensor(tensors, f"mask.{n}", _TRUTH, None, None)
    tokens = _record("tokens", manifest["tokens"])
    known = len(_list("token texts", tokens["pieces"], str))
    _whole("number of the prompt's tokens", tokens["prompt"])
    for name in ("positions", "ids"):
        _tensor(tensors, f"tokens.{name}", _WHOLE, known)
    _is("masked", manifest["masked"], bool, "true or false")
    methods = _list("methods", manifest["methods"], dict)
    _list("scored", manifest["scored"], bool, len(methods))
    for r, row in enumerate(methods):
        _row(row, r, words, shapes, known, tensors)


def _row(
    row: Mapping[str, Any],
    r: int,
    words: int,
    shapes: Sequence[tuple[int, int]],
    known: int,
    tensors: Mapping[str, Tensor],
) -> None:
    for name in ("name", "label", "group", "status", "note"):
        _text(f"{name} of method {r}", row[name])
    if row["status"] not in STATUSES:
        raise _refuse(f"status of method {r}", row["status"], f"one of {', '.join(STATUSES)}")
    _record(f"settings of method {r}", row["settings"])
    _list(f"complete of method {r}", row["complete"], bool, words)
    cost = _record(f"cost of method {r}", row["cost"])
    for name, value in cost.items():
        if type(value) not in (int, float) and not (name == "peak_bytes" and value is None):
            raise _refuse(f"{name} of method {r}", value, "a number")
    for i, shape in enumerate(shapes):
        for name in ("maps", "raw"):
            _tensor(tensors, f"row.{r}.{name}.{i}", _FLOAT, words, *shape)
    if f"row.{r}.text" in tensors:
        _tensor(tensors, f"row.{r}.text", _FLOAT, words, known)
    for n in range(words):
        if f"row.{r}.scores.{n}" in tensors:
            _tensor(tensors, f"row.{r}.scores.{n}", _FLOAT, 4)
