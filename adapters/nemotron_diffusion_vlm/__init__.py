"""Nemotron-Labs-Diffusion-VLM: Ministral turned into block diffusion on a causal context."""

from captum_dcam.packages import lazily

__all__ = ["NemotronDiffusionVLMAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
