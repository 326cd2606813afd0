"""MinerU-Diffusion: reads documents by block diffusion behind a prompt that is prefilled whole."""

from captum_dcam.packages import lazily

__all__ = ["MinerUDiffusionAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
