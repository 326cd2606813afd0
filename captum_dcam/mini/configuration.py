"""Configuration of the embedded model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig  # the spelling that every version has


class MiniConfig(PretrainedConfig):
    r"""Shapes and ids of :class:`MiniForMaskedDiffusion`.

    Args:
        vocab_size (int): words in the tokenizer.
        hidden_size (int): width D of the transformer and of the vision tower.
        num_hidden_layers (int): transformer blocks.
        num_attention_heads (int): heads of both transformers.
        intermediate_size (int): SwiGLU width.
        vision_layers (int): blocks of the vision transformer.
        vision_intermediate_size (int): width of its MLP.
        stem_channels (tuple): channels of the three stride-2 convolutions of the stem.
        image_size (int): side of the square input in pixels.
        patch_size (int): pixels per token, the product of the stem's strides. Default: 8
        mask_token_id, eos_token_id, pad_token_id, image_token_id, answer_token_id (int): ids.
    """

    model_type = "captum_dcam_mini"

    def __init__(
        self,
        vocab_size: int = 71,
        hidden_size: int = 192,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 3,
        intermediate_size: int = 512,
        vision_layers: int = 3,
        vision_intermediate_size: int = 576,
        stem_channels: tuple[int, int, int] = (32, 64, 96),
        image_size: int = 192,
        patch_size: int = 8,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        mask_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        image_token_id: int = 3,
        answer_token_id: int = 4,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.vision_layers = vision_layers
        self.vision_intermediate_size = vision_intermediate_size
        self.stem_channels = tuple(stem_channels)
        self.image_size = image_size
        self.patch_size = patch_size
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.mask_token_id = mask_token_id
        self.image_token_id = image_token_id
        self.answer_token_id = answer_token_id
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)

    @property
    def grid(self) -> int:
        """Side of the grid of image tokens."""
        return self.image_size // self.patch_size
