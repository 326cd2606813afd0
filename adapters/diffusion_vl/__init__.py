"""DiffusionVL: Qwen2.5-VL turned into block diffusion behind a causal prefix."""

from captum_dcam.packages import lazily

__all__ = ["DiffusionVLAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
