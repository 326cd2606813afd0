"""Stores as ``evaluate`` leaves them, with drawn scores: tables are tested without a model."""

import functools

import numpy as np

from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.suites import Setting, suite
from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.refine import DACG_BRANCHES

KINDS = ("object", "object", "function", "noun", "function")
LENGTHS = {"prefix": [[20, 1], [4, 4]], "none": [[24, 4]]}
#: metric → (columns, kinds of words); every score lies in 0 … 1
COLUMNS = {
    "localization": (("obj_iou", "contrast", "concentration", "f3"), ("object",)),
    "pointing": (("pointing", "energy_pointing"), ("object",)),
    "sparseness": (("gini", "entropy", "hoyer"), KINDS),
    "statistics": (("peak", "map_mean", "map_std", "map_skewness"), KINDS),
    "placebo": (("placebo_obj_iou", "placebo_f3"), ("object",)),
    "faithfulness": (("deletion", "insertion"), ("object",)),
    "infidelity": (("infidelity",), ("object",)),
    "sensitivity": (("sensitivity",), ("object",)),
    "answer_shuffle": (("answer_shuffle",), ("object",)),
}


class Six:
    """What a setting asks of an adapter: as the embedded model's."""

    blocks, deepest_block, recommended_block = range(6), 4, 2
    caches = ("prefix", "none")


def setting(**changes):
    return Setting(Six(), "mini", {"name": "scenes", "count": 9}, **{"limit": 8, **changes})


def column(generator, kinds, wanted, low=0.0, size=None):
    draw = generator.random if size is None else (lambda: generator.random(size).tolist())
    return [low + draw() if size is None and k in wanted else draw() if k in wanted else None
            for k in kinds]  # fmt: skip


def scores_of(generator, plan, kinds, variant):
    out = {}
    for metric in plan.metrics:
        label = f"{metric['label']}_" if metric["label"] else ""
        if metric["name"] in COLUMNS:
            names, wanted = COLUMNS[metric["name"]]
            out |= {label + name: column(generator, kinds, wanted) for name in names}
        elif metric["name"] == "plausibility":
            out["phrase_iou"] = column(generator, kinds, ("object",))
            for scale in ("image", "map"):
                out[f"func_iou_{scale}"] = column(generator, kinds, ("function",))
        elif metric["name"] == "features":
            shift = [1.0 if k == "object" else 0.0 for k in kinds]
            drawn = column(generator, kinds, KINDS, size=6)
            out["features"] = [[v + s for v in row] for row, s in zip(drawn, shift, strict=True)]
        elif metric["name"] == "randomization":
            stages = len(metric["stages"])
            drawn = column(generator, kinds, ("object",), size=stages)
            out["randomization_spearman"] = drawn
    if any(r["name"] == "dacg" for r in variant.refinements):
        out["dacg_route"] = [str(generator.choice(DACG_BRANCHES)) for _ in kinds]
    return out


def fill(folder, part, count=8, seed=0, fails=()):
    """A store of a part; variants in ``fails`` fail on every image."""
    generator, plan = np.random.default_rng(seed), part.plan
    cache = plan.cache or "prefix"
    facts = {
        "versions": {"torch": "0.0"},
        "regime": STORED_CACHES[cache],
        "dtype": "float32",
        "device": "cpu",
        "blocks": 6,
        "layers": {v.name: 2 if v.layer is None else v.layer for v in plan.variants if not v.floor},
    }
    ids = [repr(i) for i in range(count)]
    store = Store.open(folder / part.name, plan.record(), facts, ids, start=plan.start)
    with store.shard(0) as shard:
        for index in range(count):
            kinds = [k for k in KINDS if k in plan.words][: 2 + index % 4]
            record, cost = made(generator, plan, kinds, cache, fails)
            key = {"index": index, "id": index}
            shard.append({**key, **record}, {**key, **cost})
    return store


def made(generator, plan, kinds, cache, fails):
    variants, costs = {}, {}
    for variant in plan.variants:
        if variant.name in fails:
            variants[variant.name] = {"status": "failed", "note": "MethodError: cannot"}
            continue
        scores = scores_of(generator, plan, kinds, variant)
        variants[variant.name] = {"status": "done", "scores": scores, "image": {}}
        stages = [[r["name"], float(generator.random())] for r in variant.refinements]
        costs[variant.name] = {"stages": stages, "metrics": 0.1}
    runs = [
        {
            "variants": [v.name for v in own],
            "seconds": float(generator.random()),
            "forwards": 1,
            "backwards": 1,
            "peak_bytes": 1000,
        }
        for _, own in plan.runs()
    ]
    record = {
        "words": [{"text": f"w{n}", "kind": k} for n, k in enumerate(kinds)],
        "lengths": LENGTHS[cache],
        "image_end": 18,
        "steps": 4,
        "calls": sum(n for _, n in LENGTHS[cache]),
        "variants": variants,
    }
    return record, {"generation": float(generator.random()), "runs": runs, "variants": costs}


@functools.cache
def parts(name):
    """Those of a suite, made once."""
    return tuple(suite(name, setting()))


def results(folder, name="all", **options):
    """All parts of a suite."""
    for number, part in enumerate(parts(name)):
        fill(folder, part, seed=number, **options)
    return folder
