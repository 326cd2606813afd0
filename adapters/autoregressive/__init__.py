"""Autoregressive multimodal LLMs native to transformers, as the rivals' own setting."""

from captum_dcam.packages import lazily

__all__ = ["AutoregressiveAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
