r"""Every method on the same forward: ours, Captum's, pytorch-grad-cam's and the papers' rivals."""

# Importing a module registers its methods.
from captum_dcam.methods import (  # noqa: F401
    attention,
    captum_layers,
    captum_occlusion,
    captum_pixels,
    diffusion_cam,
    finer_cam,
    grad_cam,
    llava_cam,
    logit_lens,
    msea_arc,
    noise_tunnel,
    relevance,
    score_cam,
    surgery,
    tam,
    tam_over,
)
from captum_dcam.methods.base import (
    METHODS,
    Attribution,
    Facts,
    Method,
    PerToken,
    Problem,
    method,
    method_names,
    register_method,
)
from captum_dcam.methods.meter import Budget, Cost, metered
from captum_dcam.model.forward import single

__all__ = [
    "METHODS",
    "Attribution",
    "Budget",
    "Cost",
    "Facts",
    "Method",
    "PerToken",
    "Problem",
    "metered",
    "method",
    "method_names",
    "register_method",
    "single",
]
