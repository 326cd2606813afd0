"""The embedded model's autoregressive twin: the same eyes, one word after another."""

from captum_dcam.packages import lazily

__all__ = ["MiniTwinAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
