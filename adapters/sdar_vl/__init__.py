"""SDAR-VL: block diffusion behind a causal prefix, images in tiles of any resolution."""

from captum_dcam.packages import lazily

__all__ = ["SDARVLAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
