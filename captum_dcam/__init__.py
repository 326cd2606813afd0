"""Visual explanations of diffusion multimodal LLMs, in Captum's habits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_dcam.packages import lazily
from captum_dcam.results.display import enter_viewer

__version__ = "0.1.0"

if TYPE_CHECKING:
    from captum_dcam.attribution import DiffusionCAM
    from captum_dcam.comparing import compare, compare_generation, compare_models
    from captum_dcam.errors import DcamError
    from captum_dcam.explaining import exchange_word, explain, explain_generation, explain_steps
    from captum_dcam.model.forward import DenoisingForward
    from captum_dcam.model.hub import families, load, repair, wrap
    from captum_dcam.model.prompts import Video
    from captum_dcam.results.comparison import Comparison
    from captum_dcam.results.explanation import Explanation
    from captum_dcam.truth.commit import commit_record
    from captum_dcam.truth.scores import word_scores
    from captum_dcam.truth.signs import sign_check

__all__ = [
    "Comparison",
    "DcamError",
    "DenoisingForward",
    "DiffusionCAM",
    "Explanation",
    "Video",
    "commit_record",
    "compare",
    "compare_generation",
    "compare_models",
    "exchange_word",
    "explain",
    "explain_generation",
    "explain_steps",
    "families",
    "load",
    "repair",
    "sign_check",
    "word_scores",
    "wrap",
]

#: public names, imported when first used, so that ``--help`` is quick
_public = lazily(
    __name__,
    {
        "attribution": ("DiffusionCAM",),
        "comparing": ("compare", "compare_generation", "compare_models"),
        "errors": ("DcamError",),
        "explaining": ("exchange_word", "explain", "explain_generation", "explain_steps"),
        "model.forward": ("DenoisingForward",),
        "model.hub": ("families", "load", "repair", "wrap"),
        "model.prompts": ("Video",),
        "results.comparison": ("Comparison",),
        "results.explanation": ("Explanation",),
        "truth.commit": ("commit_record",),
        "truth.scores": ("word_scores",),
        "truth.signs": ("sign_check",),
    },
)

enter_viewer(lambda: import_module("captum_dcam.viewer.display"))


def __getattr__(name: str) -> Any:
    """Public names, and rooms such as ``captum_dcam.refine``, imported when first used."""
    if name in __all__:
        return _public(name)
    if not name.startswith("_"):
        try:
            return import_module(f"captum_dcam.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"captum_dcam.{name}":
                raise
    raise AttributeError(f"module 'captum_dcam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
