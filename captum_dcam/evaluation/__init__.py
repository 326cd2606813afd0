r"""Evaluation: a plan, a harness that survives being killed, and a store that shards merge into.

>>> plan = Plan(("diffusion_cam", "tam", "oracle"), metrics=("localization", "pointing"))
>>> [variant.name for variant in plan.variants]
['diffusion_cam', 'tam', 'oracle']

``evaluate(plan, "runs/first")`` measures it, ``Store.read("runs/first").records()`` gives what it
stored.

- what is evaluated: :class:`Plan`, :class:`Variant`
- doing it: :func:`evaluate`, :class:`Summary`, :class:`Live`, :func:`stop_on_signals`
- what is stored: :class:`Store`, :func:`rows`
- metrics by name: :func:`register_metric`, :class:`VariantMaps`, :class:`Scores`
"""

from captum_dcam.errors import EvaluationError, StoreError
from captum_dcam.evaluation import grounding, probes  # noqa: F401  enter their metrics
from captum_dcam.evaluation.frame import rows
from captum_dcam.evaluation.harness import Summary, evaluate
from captum_dcam.evaluation.launch import launched_shard, parse_shard, stop_on_signals
from captum_dcam.evaluation.measure import METRICS, Scores, VariantMaps, register_metric
from captum_dcam.evaluation.plan import FLOORS, Plan, Variant
from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.words import KINDS, Word
from captum_dcam.model.progress import Live, Progress, Silent

__all__ = [
    "FLOORS",
    "KINDS",
    "METRICS",
    "EvaluationError",
    "Live",
    "Plan",
    "Progress",
    "Scores",
    "Silent",
    "Store",
    "StoreError",
    "Summary",
    "Variant",
    "VariantMaps",
    "Word",
    "evaluate",
    "launched_shard",
    "parse_shard",
    "register_metric",
    "rows",
    "stop_on_signals",
]
