"""LaViDa-LLaDA and LaViDa-Dream, the family on which the paper was validated."""

from captum_dcam.packages import lazily

__all__ = ["LavidaAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
