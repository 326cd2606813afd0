r"""Images and the prompt format of DiffusionGemma: Gemma 4's, with image tokens that see each
other."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.adapters.common.gemma import Gemma
from captum_dcam.errors import InputError


class DiffusionGemma(Gemma):
    """How DiffusionGemma prepares images."""

    model_types: ClassVar[tuple[str, ...]] = ("diffusion_gemma",)
    one_length: ClassVar[str | None] = "the family counts positions without regard to padding"

    def check(self) -> None:
        seen = self.config.text_config.use_bidirectional_attention
        if seen != "vision":
            raise InputError(
                f"use_bidirectional_attention is {seen!r} in the model's text_config: expected "
                '"vision", the family\'s image tokens see each other'
            )
        super().check()
