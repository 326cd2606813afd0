"""The embedded model: with a prefix cache (as LaViDa) or without one (as LLaDA-V)."""

from captum_dcam.packages import lazily

__all__ = ["MiniAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
