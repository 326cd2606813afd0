r"""Loading of DiffusionGemma, which transformers has, and what is known of it without a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from captum_dcam.adapters.common.loading import image_text_model, named
from captum_dcam.model.adapter import Checkpoint, FamilyFacts

CHECKPOINT = "google/diffusiongemma-26B-A4B-it"
MODEL_TYPE = "diffusion_gemma"
FACTS = FamilyFacts(
    checkpoints=(Checkpoint(CHECKPOINT, blocks=30),),
    transformers=">=5.23",
    notes=(
        "there is no greedy mode: every generation needs a generator or a seed",
        "max_new_tokens is rounded up to whole canvases (256 tokens)",
        "generate ignores settings that it does not know (use_cache, do_sample, top_k, …) without "
        "a word; the adapter refuses them",
        "a forward with a two-dimensional mask, or none, lets image tokens see earlier ones only; "
        "generate and the adapter give the family's own masks",
        "routing to experts flips between types: replay in the type of the generation",
    ),
)


def owned(model: nn.Module) -> bool:
    """Whether a loaded model is of this family, with its head."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind == MODEL_TYPE and hasattr(model, "lm_head")


def loaded(source: str | None, **options: Any) -> tuple[nn.Module, Any]:
    r"""Model and processor of a checkpoint.

    Args:
        source (str): folder or hub name.
        **options: those of :func:`~captum_dcam.adapters.common.loading.image_text_model`.

    Raises:
        WeightsError: files are missing, damaged, or of another kind of model.
    """
    return image_text_model(named("diffusion_gemma", source, CHECKPOINT), (MODEL_TYPE,), **options)
