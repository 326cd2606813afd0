"""Fast-dVLM: Qwen2.5-VL turned into block diffusion on a causal context."""

from captum_dcam.packages import lazily

__all__ = ["FastDVLMAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
