"""Autoregressive multimodal LLMs native to transformers, as the rivals' own setting."""

from captum_dcam.adapters.autoregressive.adapter import AutoregressiveAdapter

__all__ = ["AutoregressiveAdapter"]
