r"""Images of SDAR-VL: LLaVA-OneVision's."""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.onevision import OneVision

#: the mask token's name
MASK = "<|MASK|>"


class Pictures(OneVision):
    """How SDAR-VL prepares images."""

    model_types: ClassVar[tuple[str, ...]] = ("sdar_vl",)

    def check(self) -> None:
        found = self.tokenizer.convert_tokens_to_ids(MASK)
        if found in (None, self.tokenizer.unk_token_id):
            raise misfit(f"the tokenizer has no {MASK}", "the model fills such tokens")
        super().check()
