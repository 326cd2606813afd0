r"""The evaluations behind the papers' tables, as parts of suites: each part is one plan.

A part is written for any model and data set; what it needs to know of them is in :class:`Setting`.
``captum-dcam evaluate --suite papers`` runs parts into folders of their names, and
``captum-dcam table`` reads them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from captum_dcam.evaluation.plan import Plan, RefineLike, Variant, refinement_records
from captum_dcam.evaluation.published import read_toml
from captum_dcam.files import Record
from captum_dcam.methods import METHODS, method_names
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.refine import paper_refinements
from captum_dcam.registry import Registry

#: what is tried, by suite
DATA = read_toml(Path(__file__).with_suffix(".toml"))


def _stages(*stages: RefineLike) -> tuple[Record, ...]:
    """Complete records of post-transforms."""
    return tuple(refinement_records(stages))


FLOOR_VARIANTS = tuple(map(Variant, ("oracle", "random", "center_blob")))
#: the modules one by one, each after the normalisation that it wants, and all four (Table 2); and
#: affinity, with which our base map is the default preset
MODULES: Mapping[str, tuple[Record, ...]] = {
    "base": (),
    "+akd": _stages("min_max", "akd"),
    "+dacg": _stages("min_max", "dacg"),
    "+cba": _stages("min_max", "cba"),
    "+sicd": _stages("min_max", "sicd"),
    "full": tuple(refinement_records(list(paper_refinements()))),
    "affinity": _stages("affinity"),
}
#: what is said of rows whose maps are refined by affinity, as every row has a twin that is
AFFINITY = " + affinity"
#: DACG's bounds and percentiles as the paper changes them (Tables 6 to 9); see the file
SWEEPS: Mapping[str, Sequence[float]] = DATA["sweeps"]
PERCENTILES: Mapping[str, Sequence[float]] = DATA["percentiles"]
#: shares of the steps at which Table 5 reads the image states
SHARES = (0.0, 0.25, 0.5, 0.75)
#: blocks of Table 3, of a model with 32
PAPER_LAYERS, PAPER_BLOCKS = (10, 20, 25, 29), 32
WORDINGS = ("concise", "original", "verbose", "repeated")
#: the two base maps that the modules are tried on: the paper's, and the default preset's
BASES = {"paper": "diffusion_cam_base", "ours": "diffusion_cam"}
#: below this share of its maximum the paper's comparison sets LLaVA-CAM's map to 0
LLAVA_CAM: Record = {"threshold": 0.4}


def with_twins(variants: Sequence[Variant]) -> list[Variant]:
    """Every variant that has no refinement, bare and with affinity: a table that refines one method
    and leaves others bare says nothing about methods. Presets refine by themselves."""
    out = []
    for one in variants:
        out.append(one)
        if not (one.floor or one.refinements or one.build().refines):
            name, at, block = one.name.partition("@")
            name = f"{name}{AFFINITY}{at}{block}"
            out.append(replace(one, name=name, refinements=_stages("affinity")))
    return out


@dataclass(frozen=True)
class Setting:
    r"""What a suite is run on.

    Args:
        adapter (Adapter): the model; caches and blocks are asked of it.
        model (str): its name or folder, for the plan.
        dataset (dict): name and settings.
        start, limit (int, optional): images, in the data set's order. Default: all
        cache, dtype, prompt, seed, generation, threads, load: as in :class:`Plan`.
    """

    adapter: Adapter = field(repr=False)
    model: str
    dataset: Record
    start: int = 0
    limit: int | None = None
    cache: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    seed: int = 0
    generation: Record = field(default_factory=dict)
    threads: int = 1
    load: Record = field(default_factory=dict)

    def plan(self, variants: Sequence[Any], **changes: Any) -> Plan:
        """A plan on this model and data; images that a part wants fewer of are the first ones."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adapter"}
        return Plan(tuple(variants), **{**own, **changes})

    def first(self, most: int) -> int:
        """The limit of a part that makes many passes: ``most`` images or fewer."""
        return most if self.limit is None else min(most, self.limit)

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks of Table 3: at the paper's depths in a deep model, all usable ones in another."""
        count, deepest = len(self.adapter.blocks), self.adapter.deepest_block
        if count < PAPER_BLOCKS // 2:
            return tuple(range(deepest + 1))
        found = (min(deepest, round(count * at / PAPER_BLOCKS)) for at in PAPER_LAYERS)
        return tuple(sorted(set(found)))


@dataclass(frozen=True)
class Part:
    r"""One plan of a suite.

    Args:
        name (str): its folder.
        plan (Plan): what is measured.
        skips (bool): whether variants are expected to fail on some images: these failures are
            results ("0 of 500 steps valid"), not errors. Default: False
    """

    name: str
    plan: Plan
    skips: bool = False


#: name → the function that makes its parts for a setting
SUITES: Registry[Callable[[Setting], list[Part]]] = Registry("suite", given=1)


# -- objects: Diffusion-CAM's tables 1 to 3 and 6 to 11 --------------------------------------------


def module_variants() -> list[Variant]:
    """Every module alone and all together, on the paper's base map and on ours."""
    return [
        Variant(f"{base}/{name}", method, _raw(method), refinements=stages)
        for base, method in BASES.items()
        for name, stages in MODULES.items()
    ]


def _raw(method: str) -> Record:
    return {"refined": False} if method == "diffusion_cam" else {}


def sweep_variants() -> list[Variant]:
    """DACG alone on the paper's base map, its bounds and percentiles changed one at a time."""
    changes: dict[str, Record] = {}
    for name, values in SWEEPS.items():
        changes |= {f"dacg:{name}={v:g}": {name: v} for v in values if v != values[2]}
    for label, percentiles in PERCENTILES.items():
        if label != "dynamic":
            changes[f"dacg:percentiles={label}"] = {"percentiles": percentiles}
    return [
        Variant(
            f"paper/{name}", BASES["paper"], refinements=_stages("min_max", {"name": "dacg", **own})
        )
        for name, own in changes.items()
    ]


def layer_variants(setting: Setting) -> list[Variant]:
    """All modules at every block of Table 3; LLaVA-CAM, whose passes cost most, at three."""
    recommended = setting.adapter.recommended_block
    layers = setting.layers
    out = [
        Variant(f"{base}/{name}@{n}", method, _raw(method), n, refinements=MODULES[name])
        for name in ("full", "base")
        for base, method in BASES.items()
        for n in layers
        if n != recommended
    ]
    others = sorted({recommended, layers[-1]})
    return out + with_twins(
        [Variant(f"llava_cam@{n}", "llava_cam", LLAVA_CAM, n, "final") for n in others]
    )


@SUITES.register("objects")
def objects(setting: Setting) -> list[Part]:
    """Words with a mask, on their masks."""
    variants = [
        *FLOOR_VARIANTS,
        *module_variants(),
        *with_twins(
            [Variant("grad_cam:commit", "diffusion_cam_base", {"score": "commit"}), Variant("tam")]
        ),
        *layer_variants(setting),
        *sweep_variants(),
    ]
    metrics = ("localization", "pointing", "sparseness", "statistics")
    return [Part("objects", setting.plan(variants, words=("object",), metrics=metrics))]


# -- feasibility: tables 4 and 5 -------------------------------------------------------------------


@SUITES.register("feasibility")
def feasibility(setting: Setting) -> list[Part]:
    """The paper preset at four shares of the steps, with every cache of the family."""
    variants = [Variant(f"at {share:g}", "diffusion_cam_paper", {"at": share}) for share in SHARES]
    return [
        Part(
            f"feasibility-{STORED_CACHES[cache]}",
            setting.plan(variants, words=("object",), cache=cache),
            skips=True,
        )
        for cache in setting.adapter.caches
    ]


# -- economy: table 12 -----------------------------------------------------------------------------


@SUITES.register("economy")
def economy(setting: Setting) -> list[Part]:
    """The same content in four wordings, forced; the visible answer is read, as the paper does."""
    variants = [
        Variant(f"paper/{name}", BASES["paper"], {"score": "teacher"}, refinements=MODULES[name])
        for name in ("base", "full")
    ]
    return [
        Part(
            f"economy-{wording}",
            setting.plan(
                variants,
                words=("object",),
                metrics=("localization", "sparseness"),
                answer={"name": "caption", "wording": wording},
            ),
        )
        for wording in WORDINGS
    ]


# -- plausibility: TAM's tables 1 to 3, the ablation of MSEA and ARC -------------------------------


@SUITES.register("plausibility")
def plausibility(setting: Setting) -> list[Part]:
    """Object words on their masks, function words on nothing (TAM Eq. 8 to 10)."""
    tried = [Variant(**record) for record in DATA["plausibility"]["variants"]]
    plan = setting.plan(
        [*FLOOR_VARIANTS, *with_twins(tried)],
        words=("object", "noun", "function"),
        metrics=("plausibility", "localization", "placebo", "features"),
    )
    return [Part("plausibility", plan, skips=True)]


# -- faithfulness and sanity of every method -------------------------------------------------------


#: passes per word of methods that suites leave out, for they take longer than all others together:
#: a plan names them itself
TOO_MANY = 100


def _passes(name: str) -> int:
    return int(METHODS[name].facts.passes.split()[0])


def is_long(name: str) -> bool:
    """Whether a method makes many passes per word: it is measured on fewer images."""
    return METHODS[name].facts.expensive or _passes(name) >= 8


def _every(long: bool) -> list[Variant]:
    """Methods that make many passes, or those that make few; each in the state that suits it, bare
    and with affinity. The bare map of the paper's preset is that of the base preset."""
    found = [
        Variant(name, score="final" if name in FINAL_STATE else "commit")
        for name in method_names()
        if is_long(name) == long and name != "tam_over" and _passes(name) < TOO_MANY
    ]
    bare = [] if long else [Variant("diffusion_cam, bare", "diffusion_cam", {"refined": False})]
    return [*bare, *with_twins(found)]


#: methods whose weights are averaged over positions
FINAL_STATE = frozenset(DATA["faithfulness"]["final_state"])


def _curves(baseline: str, label: str = "") -> Record:
    return {
        "name": "faithfulness",
        "baseline": baseline,
        "controls": 0,  # the variant "random" is the control, the same for all
        "fractions": DATA["faithfulness"]["fractions"],
        "label": label,
    }


def _part(setting: Setting, name: str, variants: Sequence[Variant], metrics: tuple) -> Part:
    """A part on the first images."""
    limit = setting.first(DATA["images"][name])
    plan = setting.plan(variants, words=("object",), metrics=metrics, limit=limit)
    return Part(name, plan, skips=True)


@SUITES.register("faithfulness")
def faithfulness(setting: Setting) -> list[Part]:
    """Deletion and insertion of every method; other baselines and infidelity for a few."""
    metrics = ("localization", "pointing", _curves("mean"))
    other = (_curves("blur", "blur"), _curves("inpaint", "inpaint"))
    few = [*FLOOR_VARIANTS, *with_twins(list(map(Variant, DATA["faithfulness"]["few"])))]
    long = [*FLOOR_VARIANTS, Variant("diffusion_cam"), *_every(True)]
    return [
        _part(setting, "faithfulness", [*FLOOR_VARIANTS, *_every(False)], metrics),
        _part(setting, "faithfulness-long", long, metrics),
        _part(setting, "baselines", few, other),
        _part(setting, "infidelity", few, ("infidelity",)),
    ]


@SUITES.register("sanity")
def sanity(setting: Setting) -> list[Part]:
    """Weights drawn anew, answers shuffled, small noise, and another word's map, for every method.

    Maps are compared after the last block and after all weights were drawn anew; methods of many
    passes on fewer images, without the first of these and without noise.
    """
    metrics = ("localization", "placebo", "answer_shuffle")
    both, last = ({"name": "randomization", "stages": stages} for stages in ((1, -1), (-1,)))
    noise = {"name": "sensitivity", "samples": 2}
    return [
        _part(setting, "sanity", _every(False), (*metrics, both, noise)),
        _part(setting, "sanity-long", _every(True), (*metrics, last)),
    ]


# -- is the word true? -----------------------------------------------------------------------------


def damaged(setting: Setting) -> dict[str, Record]:
    """Name of a part → its data: the scenes of the setting under every damage that is tried."""
    own = {k: v for k, v in setting.dataset.items() if k in ("count", "start", "seed", "prompt")}
    found = {}
    for damage, strengths in DATA["inventions"]["damages"].items():
        for strength in strengths:
            name = f"{damage}-{strength:g}" if strength else damage
            asked = {k: v for k, v in own.items() if damage != "premise" or k != "prompt"}
            found[name] = {"name": "degraded", "damage": damage, "strength": strength, **asked}
    return found


@SUITES.register("inventions")
def inventions(setting: Setting) -> list[Part]:
    """Words of which it is known whether they are true: signals from the steps, rivals, maps.

    Scenes are damaged so that the model invents; on other data sets (coco, repope, halloc, spans)
    their own labels are read, and texts that are the data set's are given to the model.
    """
    own = DATA["inventions"]
    every = damaged(setting) if setting.dataset["name"] == "scenes" else {"": setting.dataset}
    given = setting.dataset["name"] in own["texts"]
    answer = {"name": "own_text" if given else "generated"}
    return [
        Part(
            f"inventions-{name}" if name else "inventions",
            setting.plan(
                [Variant(**record) for record in own["variants"]],
                words=("labelled",),
                metrics=tuple(own["metrics"]),
                dataset=data,
                answer=answer,
            ),
            skips=True,
        )
        for name, data in every.items()
    ]


@SUITES.register("papers")
def papers(setting: Setting) -> list[Part]:
    """What the papers' tables show."""
    return [p for make in (objects, economy, feasibility, plausibility) for p in make(setting)]


@SUITES.register("all")
def everything(setting: Setting) -> list[Part]:
    """The papers' suites, and faithfulness and sanity of every method."""
    return [p for make in (papers, faithfulness, sanity) for p in make(setting)]


def suite(name: str, setting: Setting) -> list[Part]:
    """The parts of a suite; UnknownNameError with near names otherwise."""
    return SUITES[name](setting)
