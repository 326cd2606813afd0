"""DiffusionGemma: block diffusion from uniform noise, encoder and decoder with shared weights."""

from captum_dcam.packages import lazily

__all__ = ["DiffusionGemmaAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
