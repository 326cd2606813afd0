r"""What is known of LaViDa without a model of it, and which of its two a model is."""

from __future__ import annotations

from torch import nn

from captum_dcam.adapters.common.compat import LAVIDA_INSTALL
from captum_dcam.errors import InputTypeError
from captum_dcam.model.adapter import Checkpoint, Facts

#: class name → language model
VARIANTS = {"LlavaLladaForMaskedDiffusion": "llada", "LlavaDreamForMaskedDiffusion": "dream"}
#: mask, end and padding ids of the published checkpoints
MASK = {"llada": 126336, "dream": 151666}
STOP = {"llada": (126081, 126348), "dream": (151643, 151645)}
FACTS = Facts(
    checkpoints=(
        Checkpoint("jacklishufan/lavida-llada-v1.0-instruct", blocks=32),
        Checkpoint("jacklishufan/lavida-dream-v1.0-instruct", blocks=28),
        Checkpoint("jacklishufan/lavida-llada-1.0-lowres", blocks=32),
        Checkpoint("jacklishufan/lavida-llada-1.0-fim", blocks=32),
        Checkpoint("hbXNov/lavida-llada-reason", blocks=32),
    ),
    package="llava",
    install=LAVIDA_INSTALL,
    notes=(
        "schedule='shift' has shift=3 by default and commits late; the authors evaluate with 0.33",
        "LLaDA's own generate ignores steps (here they are passed on) and do_sample",
        "Dream's own generate samples (temperature 0.2); here the default is greedy",
        "a low-resolution checkpoint wants NOT_ALWASY_DO_2DPOOL=1 before its package is imported",
    ),
)


def variant_of(model: nn.Module) -> str:
    """``llada`` or ``dream``; TypeError for other models."""
    for cls in type(model).__mro__:
        if cls.__name__ in VARIANTS:
            return VARIANTS[cls.__name__]
    raise InputTypeError(
        f"the model is a {type(model).__name__}: LaViDa's are {' and '.join(VARIANTS)}, from "
        "upstream's load_pretrained_model"
    )
