r"""Named settings of Diffusion-CAM: the paper's, the reference code's, our own, and fitted ones.

``captum-dcam calibrate`` fits a preset's refinements to a model and writes a file; wherever a
preset's name is accepted, the file's path is too::

    {"format": "captum-dcam preset", "version": 4, "base": "default",
     "score": "commit", "product": "positionwise", "center": true, "backward": "constant_norms",
     "layer": 3, "reliability": {…}, "calibrator": {…},
     "refinements": [{"name": "affinity", "power": 6.0, …}, …],
     "fitted": {"model": …, "weights": …, "data": …, "images": […], "seed": 0, …},
     "digest": "sha256 of all the rest"}

``layer`` is there where the fit was asked for a block; without it, it is the model's recommended
one. ``reliability`` is there where masks told which words name objects, ``calibrator`` where
results of the suite ``inventions`` told which words are true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from captum_dcam.errors import (
    InputError,
    MissingFileError,
    PresetError,
    SettingError,
    UnknownNameError,
    near,
)
from captum_dcam.files import (
    WITHOUT,
    canonical,
    check_names,
    check_version,
    digest,
    read_json,
    reading,
    write_json,
)
from captum_dcam.maps import PRODUCTS, Reading
from captum_dcam.metrics import Calibrator, Reliability
from captum_dcam.metrics.logistic import L
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.tagging import DEFAULT_TAGGER, check_tagger, first_tagger
from captum_dcam.model.trajectory import Score, check_score
from captum_dcam.refine import Affinity, Compose, Refinement, paper_refinements, refinement


@dataclass(frozen=True)
class Preset:
    r"""Everything that turns a generation into a map.

    Args:
        score (str or int): state whose logits are read: ``commit``, ``final``, ``teacher``, or the
            number of a denoising step.
        product (str): ``pooled``, ``positionwise`` or ``plus_plus``.
        center (bool): subtract each channel's spatial mean from the features first.
        refinements (callable): makes the refinements.
        source (str): where the settings come from.
        name (str): its name in results: its own, or the path of its file. Default: ``"custom"``
        backward (str): how gradients pass through norms: ``exact`` or ``constant_norms``.
            Default: ``"exact"``
        taggers (tuple of str): of these, the first whose data is installed tells nouns and
            function words. Default: ``("phrases",)``, which every machine has
        layer (int, optional): block that :func:`captum_dcam.explain` and ``captum-dcam explain``
            tap when they are given none; a forward keeps its own. Default: the family's
            recommended one
        reliability (Reliability, optional): tells from a map before refinements how well it
            localises, fitted to the model. Default: none, but for the embedded model's own
        calibrator (Calibrator, optional): tells from the scores of a word whether it is grounded,
            fitted to the model. Default: none, but for the embedded model's own
    """

    score: Score
    product: str
    center: bool
    refinements: Callable[[], Compose]
    source: str
    name: str = "custom"
    taggers: tuple[str, ...] = (DEFAULT_TAGGER,)
    backward: str = "exact"
    layer: int | None = None
    reliability: Reliability | None = None
    calibrator: Calibrator | None = None

    def reading(
        self,
        *,
        score: Score | None = None,
        product: str | None = None,
        center: bool | None = None,
        step: int | None = None,
        tagger: str | None = None,
        backward: str | None = None,
    ) -> Reading:
        """How maps are read: as given, and otherwise as the preset says.

        Raises:
            MissingPackageError: a given tagger without its data; says how to get it.
        """
        if tagger is not None:
            check_tagger(tagger)
        return Reading(
            self.score if score is None else score,
            self.product if product is None else product,
            self.center if center is None else center,
            step,
            first_tagger(self.taggers) if tagger is None else tagger,
            self.backward if backward is None else backward,
        )


_PAPER = "Diffusion-CAM, ACL 2026: Eq. 2 read literally, Eq. 4, all four modules"
_BASE = "Diffusion-CAM, ACL 2026: Eq. 2 and 4 alone"
_OURS = "ours: chosen by measurement on the embedded model, docs/SCORES.md"
PRESETS: dict[str, Preset] = {
    one.name: one
    for one in (
        Preset(
            "commit",
            "positionwise",
            True,
            partial(Compose, (Affinity(),)),
            _OURS,
            "default",
            backward="constant_norms",
        ),
        Preset(
            "final",
            "pooled",
            False,
            paper_refinements,
            _PAPER,
            "paper",
            taggers=("nltk", DEFAULT_TAGGER),
        ),
        Preset("final", "pooled", False, partial(Compose, []), _BASE, "base"),
    )
}


def preset(name: str | Path | Preset) -> Preset:
    r"""A preset by its name, or by the path of a file that ``captum-dcam calibrate`` wrote; one
    that was found already is given back.

    Raises:
        UnknownNameError: neither a known name nor a path (``….json``), with near names.
        FileNotFoundError, PresetError: no such file, or one that is damaged.
    """
    if isinstance(name, Preset):
        return name
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if Path(str(name)).suffix != ".json":
        hint = near(str(name), PRESETS)
        raise UnknownNameError(f"unknown preset {name!r}{hint}; or a file that ends in .json")
    return read_preset(name)


# -- presets in files ------------------------------------------------------------------------------

FORMAT, VERSION = "captum-dcam preset", 4
_FIELDS = ("base", "score", "product", "center", "backward", "refinements", "fitted")
#: fields that may be there, by the version that they came with
_OPTIONAL = {"layer": 2, "reliability": 3, "calibrator": 4}
AGAIN = "make it again with captum-dcam calibrate"


def write_preset(
    file: str | Path,
    base: str,
    preset: Preset,
    refinements: Sequence[Refinement],
    fitted: Mapping[str, Any],
    layer: int | None = None,
    reliability: Reliability | None = None,
    calibrator: Calibrator | None = None,
) -> None:
    r"""Write a preset file, whole or not at all; the same content gives the same bytes.

    Args:
        file (path): ends in ``.json``; an earlier preset file is replaced, nothing else is.
        base (str): name of the preset that the fit started from.
        preset (Preset): that preset; its score, product and centring are kept.
        refinements (sequence of Refinement): in place of the preset's.
        fitted (dict): what they were fitted on and how, JSON-able.
        layer (int, optional): the block that was fitted. Default: none is named
        reliability (Reliability, optional): fitted to the model. Default: none
        calibrator (Calibrator, optional): fitted to the model. Default: none

    Raises:
        PresetError: see :func:`check_writable`.
        FileError: it cannot be written; what was there is still there.
    """
    file = Path(file)
    check_writable(file)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "base": base,
        "score": preset.score,
        "product": preset.product,
        "center": preset.center,
        "backward": preset.backward,
        "refinements": [stage.describe() for stage in refinements],
        "fitted": dict(fitted),
    }
    if layer is not None:
        record["layer"] = layer
    if reliability is not None:
        record["reliability"] = reliability.record()
    if calibrator is not None:
        record["calibrator"] = calibrator.record()
    record["digest"] = _digest(record)
    write_json(file, record)


def check_writable(file: Path) -> None:
    """PresetError unless a preset file may be written there: there is none yet, or one that is as
    it was written. FileError for a place that the system does not take."""
    if file.suffix != ".json":
        raise PresetError(f"{file}: expected a file that ends in .json")
    with reading(file):
        if file.is_dir():
            inside = file / "preset.json"
            raise PresetError(f"{file} is a folder: give a file in it, such as {inside}")
        if not file.exists():
            check_names(file, 0)
            return
    other = "give another name, or move it away"
    record = read_json(file, PresetError, f"it exists and is no preset file: {other}")
    if record.get("format") != FORMAT:
        raise PresetError(f"{file} exists and is no preset file: {other}")
    if not _as_written(record):
        raise PresetError(f"{file} was changed since it was written, and is yours: {other}")


def read_preset_file(file: str | Path) -> dict[str, Any]:
    r"""Everything that a preset file says, checked.

    Raises:
        FileError: no such file, or one that cannot be read.
        PresetError: no preset file, too new, damaged or changed, or a setting that is unknown.
    """
    file = Path(file)
    with reading(file):
        if not file.is_file():
            raise MissingFileError(
                f"no preset file {file}: captum-dcam calibrate -o {file} writes one"
            )
    record = read_json(file, PresetError, AGAIN)
    if record.get("format") != FORMAT:
        raise PresetError(f'{file} is no preset file: it has no "format": "{FORMAT}"')
    check_version(file, record, (1, VERSION), PresetError)
    version = record["version"]
    known = [f for f in _FIELDS if f != "backward" or version > 1]
    more = [name for name, since in _OPTIONAL.items() if version >= since]
    if missing := [name for name in known if name not in record]:
        raise PresetError(f"{file} is damaged: it has no {', '.join(missing)}; {AGAIN}")
    if unknown := record.keys() - {*known, *more, "format", "version", "digest"}:
        raise PresetError(
            f"{file} has {', '.join(sorted(unknown))}, which no preset has: it is damaged; {AGAIN}"
        )
    if "digest" in record and not _as_written(record):
        raise PresetError(
            f"{file} is not what was written: damaged or edited. {AGAIN.capitalize()}, or, if you "
            'changed it on purpose, take out its line "digest"'
        )
    record.setdefault("backward", "exact")  # version 1 knew no other way through norms
    _check(file, record)
    return record


def read_preset(file: str | Path) -> Preset:
    """The preset of a file; raises as :func:`read_preset_file`."""
    record = read_preset_file(file)
    mark = "" if "digest" in record else f", {WITHOUT}"
    return Preset(
        record["score"],
        record["product"],
        record["center"],
        partial(_built, record["refinements"]),
        f"{file}, fitted from {record['base']!r}{mark}",
        str(file),
        backward=record["backward"],
        layer=record.get("layer"),
        reliability=_fit(record, "reliability", Reliability),
        calibrator=_fit(record, "calibrator", Calibrator),
    )


def _fit(record: Mapping[str, Any], name: str, kind: type[L]) -> L | None:
    found = record.get(name)
    return None if found is None else kind.from_record(found)


def _check(file: Path, record: Mapping[str, Any]) -> None:
    try:
        check_score(record["score"])
    except ValueError as error:
        raise PresetError(f"{file}: {error}") from error
    known_values = ("product", PRODUCTS), ("backward", BACKWARDS)
    for name, known in (*known_values, ("center", (True, False))):
        if record[name] not in known or (name == "center" and type(record[name]) is not bool):
            listed = ", ".join(map(str, known))
            raise PresetError(f"{file}: {name} is {record[name]!r}: expected one of {listed}")
    for name, kind in (("base", str), ("refinements", list), ("fitted", dict)):
        if not isinstance(record[name], kind):
            raise PresetError(
                f"{file}: {name} is {str(record[name])[:80]}: expected a {kind.__name__}; {AGAIN}"
            )
    if "layer" in record and type(record["layer"]) is not int:
        raise PresetError(
            f"{file}: layer is {str(record['layer'])[:80]}: expected a block's number; {AGAIN}"
        )
    for name, made in (
        ("refinements", lambda: _built(record["refinements"])),
        ("reliability", lambda: _fit(record, "reliability", Reliability)),
        ("calibrator", lambda: _fit(record, "calibrator", Calibrator)),
    ):
        try:
            made()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PresetError(f"{file}: {name}: {error}; {AGAIN}") from error


def _built(records: Sequence[Mapping[str, Any]]) -> Compose:
    """The refinements; new objects at every call."""
    stages = []
    for record in records:
        settings = dict(record)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise SettingError(f"{dict(record)} has no name")
        stages.append(refinement(name, **settings))
    return Compose(stages)


def _digest(record: Mapping[str, Any]) -> str:
    return digest(canonical(record, ascii_only=True))


def _as_written(record: Mapping[str, Any]) -> bool:
    """Whether a file's digest is that of the rest."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    try:
        return bool(record.get("digest") == _digest(rest))
    except InputError:  # NaN, which is never written
        return False
