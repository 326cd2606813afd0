"""DiffusionGemma: block diffusion from uniform noise, encoder and decoder with shared weights."""

from captum_dcam.adapters.diffusion_gemma.adapter import DiffusionGemmaAdapter

__all__ = ["DiffusionGemmaAdapter"]
