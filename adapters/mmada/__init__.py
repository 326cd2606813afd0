"""MMaDA: the image is 1024 VQ codes in the sequence, all of which runs at every step."""

from captum_dcam.packages import lazily

__all__ = ["MmadaAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
