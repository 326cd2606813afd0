"""Autoregressive multimodal LLMs of transformers: pictures, text, language model, decoding.

One small file for each family's pictures (``qwen``, ``llava``, ``internvl``); the rest is shared.
"""
