"""Visual explanations of diffusion multimodal LLMs, in Captum's habits."""

from __future__ import annotations

__version__ = "0.1.0"

from captum_dcam.attribution import DiffusionCAM
from captum_dcam.denoising import DenoisingForward
from captum_dcam.explain import explain, explain_bound, sign_check
from captum_dcam.explanation import Explanation
from captum_dcam.hub import families, load, wrap

__all__ = [
    "DenoisingForward",
    "DiffusionCAM",
    "Explanation",
    "explain",
    "explain_bound",
    "families",
    "load",
    "sign_check",
    "wrap",
]
