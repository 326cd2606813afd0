r"""Fast-dVLM: Qwen2.5-VL turned into block diffusion on a causal context.

The checkpoint brings its code, which could not be read here. What this adapter knows is in the
paper (arXiv 2604.06832: causal context attention, whose noisy tokens see their own block and the
clean ones before it), in the model card (``Efficient-Large-Model/Fast_dVLM_3B``), and in code that
others have published to run and to serve it: ``generate`` and its arguments, M-RoPE, logits that
predict the next position, blocks behind the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from captum_dcam.adapters.common.block import length_of
from captum_dcam.adapters.common.causal_block import CausalBlockAdapter
from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.qwen import Stills
from captum_dcam.adapters.common.settings import Setting, Settings, length, share
from captum_dcam.adapters.fast_dvlm.facts import FastDVLMFamily
from captum_dcam.adapters.fast_dvlm.loading import CLASSES, loaded, repaired
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import register

#: text of the mask token
MASK = "|<MASK>|"


class FastDVLMPictures(Stills):
    """Qwen2.5-VL's images, placed by the checkpoint's chat template."""

    model_types: ClassVar[tuple[str, ...]] = ("fast_dvlm",)

    @property
    def image_id(self) -> int:
        return int(self.config.image_token_id)

    def check(self) -> None:
        super().check()
        if self.tokenizer.convert_tokens_to_ids(MASK) in (None, self.tokenizer.unk_token_id):
            raise misfit(f"the tokenizer has no {MASK}", "the model fills such tokens")


@dataclass(frozen=True, kw_only=True)
class Placed(Prefix):
    r"""A prefix with its places.

    Args:
        embeds, cache, last: as in :class:`~captum_dcam.adapters.common.prefix.Prefix`.
        spots (Tensor): (B, 3, P) int64, M-RoPE's position ids.
    """

    spots: Tensor


@register
class FastDVLMAdapter(FastDVLMFamily, CausalBlockAdapter):
    r"""Adapter of ``Fast_dVLMForConditionalGeneration`` in its diffusion mode.

    Args:
        model (nn.Module): as ``AutoModelForCausalLM`` loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``
        block_length (int, optional): L, positions of a block. Default: 32

    Its settings: ``gen_length`` (or ``max_new_tokens``; 128) and ``threshold``, above which a step
    commits all tokens (the checkpoint's own).

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    classes: ClassVar[tuple[str, ...]] = CLASSES
    architectures: ClassVar[tuple[str, ...]] = CLASSES
    any_size: ClassVar[bool] = True
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    parts = ("model.language_model", "lm_head", "")
    shifted = True
    pictures = FastDVLMPictures
    settings = Settings(
        "Fast-dVLM",
        {
            "gen_length": Setting(128, length, also="max_new_tokens"),
            "threshold": Setting(None, share),
        },
        refused={"temperature": "greedy decoding alone is known of its generate"},
    )

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        block_length: int = 32,
    ) -> None:
        self._length = length_of(block_length)
        super().__init__(model, processor, cache)

    @property
    def block_length(self) -> int:
        return self._length

    @property
    def mask_id(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(MASK))

    def drawn(self, made: Mapping[str, Any]) -> bool:
        return False

    def options(self, made: Mapping[str, Any]) -> dict[str, Any]:
        own = {} if made["threshold"] is None else {"threshold": made["threshold"]}
        return {
            "tokenizer": self._tokenizer,
            "block_size": self.block_length,
            "max_tokens": made["gen_length"],
            "mask_id": self.mask_id,
            **own,
        }

    def stores(self, ids: Tensor, options: Mapping[str, Any]) -> bool:
        return not bool((ids == self.mask_id).any())

    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        own = self._family.inputs(pixels, extras[0], self._named(extras))
        return {"input_ids": extras[0], **own}

    def embed(self, pixels: Tensor, *extras: Tensor) -> Placed:
        handed = self.handed(pixels, extras)
        spots = handed.get("position_ids")
        if spots is None or spots.ndim != 3:
            raise InputError(
                f"the {type(self.model).__name__} hands position ids {spots!r} to its language "
                "model: expected M-RoPE's (3, B, n), as Qwen2.5-VL has them"
            )
        return Placed(handed["inputs_embeds"], spots=spots.transpose(0, 1))

    def prompt_places(self, embedded: Prefix) -> Tensor:
        assert isinstance(embedded, Placed)
        return embedded.spots.transpose(0, 1)

    def places(self, memory: Prefix, at: Tensor) -> Tensor:
        spots = self.prompt_places(memory)
        behind = spots.amax((0, 2))[:, None] + 1 + at
        return behind.expand(len(spots), *behind.shape)
