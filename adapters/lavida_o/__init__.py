"""LaViDa-O: the understanding path, an image and a question in, text out."""

from captum_dcam.packages import lazily

__all__ = ["LavidaOAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
