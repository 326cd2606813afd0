r"""What an evaluation is: a model, a data set, variants of methods and metrics, as plain JSON.

A :class:`Plan` holds every setting that a result depends on, written out in full, and nothing that
it does not depend on (where the files lie, how many processes share the work, on which GPU).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from captum_dcam import checks
from captum_dcam.errors import (
    InputError,
    InputTypeError,
    RemoteCodeError,
    SettingError,
    UnknownNameError,
    near,
)
from captum_dcam.evaluation.answers import answer_record
from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.measure import metric_record
from captum_dcam.evaluation.words import KINDS
from captum_dcam.files import Record, canonical, digest, plain
from captum_dcam.methods import METHODS, Method, method
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.trajectory import (
    CACHES,
    STORED_CACHES,
    Score,
    check_score,
    stored_cache,
)
from captum_dcam.refine import Refinement, refinement

DTYPES = ("float32", "bfloat16", "float16")
RefineLike = str | Mapping[str, Any] | Refinement


_LIST, _RECORD = "a list", 'a record {"…": …}'
_NAMED = "a name, or a record that holds one"
#: fields of a plan that hold more than a value, what each may be, and how that is called
_SHAPES = (
    ("variants", list | tuple, _LIST),
    ("metrics", list | tuple, _LIST),
    ("words", list | tuple, _LIST),
    ("dataset", str | Mapping, _NAMED),
    ("answer", str | Mapping, _NAMED),
    ("generation", Mapping, _RECORD),
    ("load", Mapping, _RECORD),
    ("model", str, "a name or a folder"),
    ("prompt", str | None, "a text"),
)


#: what only whoever runs a plan may decide, for a plan is data that others write
CODE = ("trust_remote_code", "custom_generate")
#: settings of loading that are none of a plan's ``load``, and where they are given instead
OWN_HINT = {
    "cache": "a plan has a field 'cache' of its own",
    "dtype": "a plan has a field 'dtype' of its own",
    "device": "where it runs is said by the run (--device, or evaluate(…, device=…))",
}
OWN = frozenset(OWN_HINT)
#: arguments of calls that are settings of nothing, and would take the place of the call's own
TAKEN = {
    "load": frozenset(("self", "source")),
    "generation": frozenset(("self", "request", "generator", "keep")),
    "dataset": frozenset(("self", "root")),
}


def check_taken(where: str, names: Iterable[str], said: str) -> None:
    """Refuse settings of ``load``, ``generation`` or ``dataset`` that are no settings."""
    if taken := sorted(TAKEN[where] & set(names)):
        raise SettingError(
            f"{said} holds {taken[0]!r}, which is no setting: the run gives it itself; leave it out"
        )


def _refuse_code(where: str, value: Any) -> None:
    """RemoteCodeError where a record, at whatever depth, lets code of others run."""
    if isinstance(value, Mapping):
        for name in CODE:
            if name in value:
                raise RemoteCodeError(
                    f"the plan's {where} holds {name!r}: a plan cannot let a checkpoint's code run "
                    "on this machine. Take it out, and allow it for this run alone: --load "
                    "trust_remote_code=true, or evaluate(…, trust_remote_code=True)"
                )
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            _refuse_code(where, one)


def _misfit(what: str, value: Any, expected: str) -> InputTypeError:
    return InputTypeError(f"{what} is {value!r}, a {type(value).__name__}: expected {expected}")


def _check_shapes(what: str, value: Any, shapes: Iterable[tuple[str, Any, str]]) -> None:
    """Refuse fields that are of another kind than said."""
    for name, kind, expected in shapes:
        if not isinstance(getattr(value, name), kind):
            raise _misfit(f"{what}{name}", getattr(value, name), expected)


def check_known(kind: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with near ones."""
    if not isinstance(value, str) or value not in known:
        raise UnknownNameError(f"{kind} {value!r}{near(value, known)}")


@dataclass(frozen=True)
class Variant:
    r"""One row of a table: a method with its settings, read at a block, and post-transforms.

    Settings that are left out are filled in with the method's defaults, so that a stored plan
    says everything and two ways of writing one variant are equal.

    Args:
        name (str): unique in a plan; how tables call it.
        method (str, optional): a registered method, or one of
            :data:`captum_dcam.evaluation.floors.FLOORS`. Default: the name
        settings (dict, optional): of the method. Default: the method's
        layer (int, optional): block. Default: the family's recommended one
        score (str or int, optional): ``commit``, ``final``, ``teacher``, or the number of a
            denoising step. Default: ``"commit"``
        refinements (tuple of dict, optional): post-transforms of the map's positive part, in
            order, as records ``{"name": "akd", …}``; names and objects become records.
            Default: none
        passes (int, optional): budget of forward passes per image. Default: none
        backward (str, optional): how gradients pass through norms: ``exact`` or
            ``constant_norms``, see :mod:`captum_dcam.model.norms`; no matter to a method that has
            rules or a preset of its own. Default: ``"exact"``

    Raises:
        UnknownNameError, ValueError, TypeError: a name or setting that is not known.
    """

    name: str
    method: str = ""
    settings: Record = field(default_factory=dict)
    layer: int | None = None
    score: Score = "commit"
    refinements: tuple[Record, ...] = ()
    passes: int | None = None
    backward: str = "exact"

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InputError(f"variant name is {self.name!r}: expected a text that tables show")
        check_known(f"variant {self.name!r}: unknown backward", self.backward, BACKWARDS)
        write = object.__setattr__
        write(self, "score", check_score(self.score, what=f"variant {self.name!r}: score"))
        layer, passes = _whole(self.layer, -MOST), _whole(self.passes, 1)
        if self.layer is not None and layer is None:
            raise InputError(f"variant {self.name!r}: layer is {self.layer!r}: expected an integer")
        if self.passes is not None and passes is None:
            raise InputError(
                f"variant {self.name!r}: passes is {self.passes!r}: expected an integer, at least 1"
            )
        stages = str | Mapping | Refinement | list | tuple
        shapes = ("settings", Mapping, _RECORD), ("refinements", stages, "a list of names")
        _check_shapes(f"variant {self.name!r}: ", self, shapes)
        found = _own_name(self.method or self.name)
        write(self, "layer", layer)
        write(self, "passes", passes)
        write(self, "method", found)
        write(self, "settings", plain(_settings(found, self.settings)))
        write(self, "refinements", tuple(refinement_records(self.refinements)))

    def __hash__(self) -> int:
        return hash(canonical(self.record()))

    @property
    def floor(self) -> bool:
        """Whether it looks at no model."""
        return self.method in FLOORS

    @property
    def run(self) -> Record:
        """What variants that differ in name and refinements alone have in common."""
        names = ("method", "settings", "layer", "score", "passes", "backward")
        return {name: value for name, value in self.record().items() if name in names}

    def build(self) -> Method:
        """The method with its settings."""
        return _method(self.method, self.settings)

    def stages(self) -> list[Refinement]:
        """The post-transforms."""
        return [_refinement(r) for r in self.refinements]

    def record(self) -> Record:
        """JSON-able; ``Variant(**record)`` equals it."""
        found = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        if self.backward == "exact":  # as before there was another: stores can be continued
            del found["backward"]
        return found


@dataclass(frozen=True)
class Plan:
    r"""Everything that decides the numbers of an evaluation.

    Args:
        variants (tuple of Variant): at least one; names of methods, methods with their settings
            and records become variants.
        dataset (dict, optional): name and settings of the data set; a name becomes a record.
            Default: ``{"name": "scenes"}``
        model (str, optional): a family or a folder. Default: ``"mini"``
        cache (str, optional): ``prefix`` or ``none``. Default: the family's
        dtype (str, optional): one of :data:`DTYPES`. Default: the family's, float32 for ``mini``
        prompt (str, optional): asked of every image. Default: the data set's own
        answer (dict, optional): ``generated``, or ``{"name": "caption", "wording": …}``, a text of
            the data set that is forced; a name becomes a record. Default: ``generated``
        metrics (tuple of dict, optional): records ``{"name": "plausibility", …}``; names become
            records. Default: ``localization``
        words (tuple of str, optional): which words are explained, of
            :data:`captum_dcam.evaluation.words.KINDS`. Default: words with a mask, other nouns
            and function words
        seed (int, optional): of everything that is drawn. Default: 0
        start (int, optional): first image, counted in the data set's order. Default: 0
        limit (int, optional): number of images from there. Default: all
        generation (dict, optional): the family's decoding settings. Default: the family's
        threads (int, optional): of torch on the CPU, because sums in another order round
            otherwise; 0 leaves the process's. Default: 1
        load (dict, optional): further settings of :func:`captum_dcam.load`; not
            ``trust_remote_code``, which only the call that runs a plan may give. Default: none

    Raises:
        RemoteCodeError: a plan that would let a checkpoint's code run.
        UnknownNameError, ValueError, TypeError: before any work, with what is known.
    """

    variants: tuple[Variant, ...]
    dataset: Record = field(default_factory=lambda: {"name": "scenes"})
    model: str = "mini"
    cache: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    answer: Record = field(default_factory=lambda: {"name": "generated"})
    metrics: tuple[Record, ...] = field(default_factory=lambda: (metric_record("localization"),))
    words: tuple[str, ...] = ("object", "noun", "function")
    seed: int = 0
    start: int = 0
    limit: int | None = None
    generation: Record = field(default_factory=dict)
    threads: int = 1
    load: Record = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes("the plan's ", self, _SHAPES)
        for name in ("load", "generation", "dataset"):
            _refuse_code(name, getattr(self, name))
            if isinstance(getattr(self, name), Mapping):
                check_taken(name, getattr(self, name), f"the plan's {name}")
        if own := sorted(OWN & self.load.keys()):
            raise InputError(
                f"the plan's load holds {own[0]!r}: {OWN_HINT[own[0]]}, so take it out of load"
            )
        write = object.__setattr__
        variants = tuple(as_variant(v) for v in self.variants)
        dataset = {"name": self.dataset} if isinstance(self.dataset, str) else plain(self.dataset)
        write(self, "variants", variants)
        write(self, "dataset", dataset)
        write(self, "answer", answer_record(self.answer))
        write(self, "metrics", tuple(metric_record(m) for m in self.metrics))
        for word in self.words:
            check_known("unknown kind of word", word, KINDS)
        if not self.words:
            raise InputError(f"no kinds of words: choose from {', '.join(KINDS)}")
        write(self, "words", tuple(k for k in KINDS if k in self.words))
        write(self, "generation", plain(self.generation))
        write(self, "load", plain(self.load))
        for name in ("prompt", "model"):
            checks.text(f"the plan's {name}", getattr(self, name) or "")
        _unique("variant", [v.name for v in variants])
        _unique("metric", [m["label"] or m["name"] for m in self.metrics])
        if not variants:
            raise InputError("no variants: give at least one method, or 'oracle'")
        if not isinstance(dataset.get("name"), str) or not dataset["name"]:
            raise InputError(f"dataset is {dataset}: expected a name, or a record with 'name'")
        if not self.model:
            raise InputError("the plan's model is '': expected a name or a folder")
        if self.cache is not None:
            check_known("unknown cache", self.cache, CACHES)
        if self.dtype is None and self.model == "mini":  # stores of before say it, and go on
            write(self, "dtype", "float32")
        if self.dtype is not None:
            check_known("unknown dtype", self.dtype, DTYPES)
        for name, low in (("start", 0), ("threads", 0), ("limit", 1), ("seed", 0)):
            value = getattr(self, name)
            found = _whole(value, low)
            if found is None and not (name == "limit" and value is None):
                raise InputError(f"{name} is {value!r}: expected an integer of at least {low}")
            write(self, name, found)

    def __hash__(self) -> int:
        return hash(self.json())

    def record(self) -> Record:
        """JSON-able; :meth:`from_record` gives an equal plan."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["variants"] = [v.record() for v in self.variants]
        out["regime"] = STORED_CACHES.get(out.pop("cache"))  # the files' spelling
        if not self.load:
            del out["load"]  # as in stores of before it was known
        return plain(out)

    def json(self) -> str:
        """Canonical JSON: equal plans give equal bytes."""
        return canonical(self.record())

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`json`."""
        return digest(self.json())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """A plan from JSON; what is left out keeps its default."""
        known = ["regime" if f.name == "cache" else f.name for f in fields(cls)]
        for key in record:
            check_known("a plan has no", key, known)
        if "variants" not in record:
            raise InputError("the plan has no 'variants': list what to evaluate")
        given = dict(record)
        stored = given.pop("regime", None)
        return cls(**given, cache=None if stored is None else stored_cache(stored))

    def check_packages(self) -> None:
        """Raise MissingPackageError for a package that a method of the plan lacks."""
        for _, variants in self.runs():
            variants[0].build().check_packages()

    def runs(self) -> list[tuple[Record, list[Variant]]]:
        """Runs of methods, each with the variants that share it; without the floors."""
        found: dict[str, tuple[Record, list[Variant]]] = {}
        for variant in self.variants:
            if not variant.floor:
                found.setdefault(canonical(variant.run), (variant.run, []))[1].append(variant)
        return list(found.values())


def as_variant(value: Variant | Method | Mapping[str, Any] | str) -> Variant:
    """A variant from a method's name, a method with its settings, or a record."""
    if isinstance(value, Variant):
        return value
    if isinstance(value, Method):
        settings = value.describe()
        name = settings.pop("name")
        return Variant(_named(name, settings), name, settings)
    if isinstance(value, str):
        return Variant(_own_name(value))
    if not isinstance(value, Mapping):
        raise _misfit("a variant", value, "a method's name, a method, or a record of one")
    known = [f.name for f in fields(Variant)]
    for key in value:
        check_known("a variant has no", key, known)
    if "name" not in value and "method" not in value:
        raise InputError(f"variant {dict(value)} has neither a name nor a method: give it one")
    return Variant(**{"name": value.get("method"), **value})


def _named(name: str, settings: Record) -> str:
    """A method's name and the settings that are not its defaults: ``"tam:eci=false"``."""
    usual = _settings(name, {})
    own = [f"{k}={canonical(v)}" for k, v in plain(settings).items() if v != plain(usual)[k]]
    return f"{name}:{','.join(own)}" if own else name


def refinement_records(values: RefineLike | Sequence[RefineLike]) -> list[Record]:
    """Complete records of post-transforms; sequences of them come flat."""
    if isinstance(values, str | Mapping | Refinement):
        values = [values]
    out: list[Record] = []
    for value in values:
        if not isinstance(value, str | Mapping | Refinement):
            raise _misfit("a refinement", value, _NAMED)
        record = {"name": value} if isinstance(value, str) else value
        record = record.describe() if isinstance(record, Refinement) else dict(record)
        if record.get("name") == "compose":
            stages = record.get("stages")
            if not isinstance(stages, list | tuple):
                raise _misfit("stages of a compose", stages, "a list of refinements")
            out += refinement_records(stages)
        elif "name" not in record:
            raise InputError(f"refinement {record} has no 'name'")
        else:
            out.append(plain(_refinement(record).describe()))
    return out


def _refinement(record: Mapping[str, Any]) -> Refinement:
    settings = dict(record)
    return refinement(settings.pop("name"), **settings)


def _method(name: str, settings: Mapping[str, Any]) -> Method:
    """Lists, as JSON gives them back, become the tuples that frozen settings hold."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return method(name, **given)


def _own_name(name: str) -> str:
    """The name that a method is registered under, for an alias too; of something else the same."""
    return METHODS.own(name) if name in METHODS else name


def _settings(name: str, given: Mapping[str, Any]) -> Record:
    """A method's or floor's settings, complete."""
    if "name" in given:
        raise InputError(f"{name!r} has no setting 'name': a variant's name stands beside settings")
    if name in FLOORS:
        record = FLOORS.record({**given, "name": name})
    else:
        record = _method(name, given).describe()
    del record["name"]
    return record


#: no count or seed is larger: torch takes 64 bits with a sign
MOST = 2**63 - 1


def _whole(value: Any, least: int) -> int | None:
    """The Python integer that a value in these bounds stands for; None if it stands for none."""
    found = checks.as_whole(value)
    return found if found is not None and least <= found <= MOST else None


def _unique(kind: str, names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"{kind} {twice[0]!r} is in the plan twice: give each its own name")
