"""LLaDA-V: the whole sequence at every step, images as a base view and a mosaic of tiles."""

from captum_dcam.packages import lazily

__all__ = ["LladaVAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
