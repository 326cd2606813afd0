r"""LLaDA-V: the whole sequence at every step, pictures as a base view and a mosaic of tiles.

Upstream: ``ML-GSAI/LLaDA-V`` (package ``llava`` under ``train/``), checkpoint ``GSAI-ML/LLaDA-V``.
One example at a time; every call is feasible. What surprises in upstream's defaults:
``max_new_tokens`` is ignored (``gen_length`` counts), nothing stops the answer unless
``stopping_criteria`` says so, EOS cannot be generated, and on CUDA decoding runs in float16
whatever the weights' type. Of its caches Fast-dLLM can stay registered (its part-length steps are
infeasible, as the table of calls shows, and are explained through its cache); dLLM-Cache cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.packing import PackedAdapter
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.llada_v import decoding
from captum_dcam.adapters.llada_v.compat import INSTALL
from captum_dcam.adapters.llada_v.loading import CHECKPOINT, loaded
from captum_dcam.adapters.llada_v.packing import LladaVPacking
from captum_dcam.adapters.llada_v.settings import checked
from captum_dcam.errors import InputTypeError
from captum_dcam.model.adapter import Checkpoint, FamilyFacts, Request, register
from captum_dcam.model.trajectory import Trajectory


@register
class LladaVAdapter(PackedAdapter):
    r"""Adapter of ``LlavaLLaDAModelLM``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, as that function returns them.
        cache (str, optional): ``none``, the family's only one.
        system (str, optional): system prompt; None for the template's own. Default: that of the
            authors' conversation template ``llava_llada``
    """

    family: ClassVar[str] = "llada_v"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada",)
    architectures: ClassVar[tuple[str, ...]] = ("LlavaLLaDAModelLM",)
    caches: ClassVar[tuple[str, ...]] = ("none",)
    facts: ClassVar[FamilyFacts] = FamilyFacts(
        checkpoints=(Checkpoint(CHECKPOINT, blocks=32),),
        package="llava",
        install=INSTALL,
        transformers=">=4.40",
        notes=(
            "max_new_tokens is ignored: gen_length counts",
            "upstream's function stops at nothing unless stopping_criteria says so; here the "
            "default is the demo's <|eot_id|>",
            "EOS, BOS and header ids cannot be generated",
            "on CUDA decoding runs under autocast in float16, whatever the weights' type",
            "dLLM-Cache cannot be explained: switch it off; Fast-dLLM can stay",
        ),
    )

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        system: str | None = llava.SYSTEM,
    ) -> None:
        if not self.owns(model):
            raise InputTypeError(
                f"the model is a {type(model).__name__}: expected LlavaLLaDAModelLM, as upstream's "
                "load_pretrained_model(…, 'llava_llada') returns it"
            )
        super().__init__(model, processor, cache, system, LladaVPacking)

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        cache: str | None = None,
        system: str | None = llava.SYSTEM,
        **options: Any,
    ) -> LladaVAdapter:
        """Load a checkpoint through upstream's package; options: those of
        :func:`~captum_dcam.adapters.llada_v.loading.loaded`."""
        model, processor = loaded(source, **options)
        return cls(model, processor, cache, system=system)

    @staticmethod
    def owns(model: nn.Module) -> bool:
        # LaViDa's configuration has the same model_type: only the class tells them apart
        return any(c.__name__ == "LlavaLLaDAModelLM" for c in type(model).__mro__)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset((*decoding.FORBIDDEN, decoding.TURN_END, decoding.MASK))

    @property
    def mask_id(self) -> int:
        return decoding.MASK

    @property
    def fast(self) -> bool:
        """Whether Fast-dLLM is registered on the model."""
        return decoding.is_fast(self.blocks)

    @property
    def _markers(self) -> frozenset[int]:
        return super()._markers | self.stop_ids

    # -- decoding ---------------------------------------------------------------------------------

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            gen_length (int, optional): tokens of the canvas. Default: 128
            block_length (int, optional), steps (int, optional): Default: ``gen_length`` both
            temperature (float, optional), cfg_scale (float, optional): Default: 0 both
            remasking (str, optional): ``low_confidence`` or ``random``.
            stopping_criteria (list of str, optional): strings that end the answer. Default:
                ``["<|eot_id|>"]``, as in the authors' demo; upstream's function has none
            generation_suffix (str, optional): text at the canvas's end, seen at every step.
            prefix_refresh_interval (int, optional): of Fast-dLLM. Default: upstream's 32

        Returns:
            Trajectory: over the whole canvas. Positions behind the stop, and the suffix, which
            nobody generated, hold EOS in ``tokens`` and are never explained; the states hold what
            the model saw there. ``confidence`` counts the ids that the decoder rules out as such.

        Raises:
            MethodError: dLLM-Cache is registered.
            TypeError, ValueError: settings that cannot work.
        """
        decoding.refuse_feature_cache(self.blocks)
        fast = self.fast
        options = checked(settings, generator, fast)
        tokenizer = self.tokenizer
        text = options["generation_suffix"]
        suffix = tokenizer.encode(text, add_special_tokens=False) if text else []
        prefix = request.layout.prefix_length
        recorder = decoding.recorder_for(prefix, options, suffix, self.device)
        model = self.model
        parts = (model.model, model.lm_head, model.model.embed_tokens)
        views = self._packing.arguments(request.pixels, request.extras[1])
        with seeded(generator, self.device), recorder.watching(*parts):
            result = model.generate(request.extras[0], tokenizer=tokenizer, **views, **options)
        answer = result[:, : result.shape[1] - len(suffix)]
        recorder.finish(answer)
        final = recorder.canvas.clone()
        tokens = torch.full_like(final, decoding.EOS)
        tokens[:, : answer.shape[1]] = answer
        scale = options["cfg_scale"]
        states, final_state = decoding.states_of(recorder.steps, scale, fast, final)
        own_calls = fast or scale > 0  # the part behind a cache, or twice the rows
        return Trajectory(
            tokens=tokens,
            states=states,
            final_state=final_state,
            commit_step=recorder.commit_step,
            confidence=recorder.confidence.cpu(),
            cache="none",
            image_end=request.layout.image_end,
            settings=settings,
            own_calls=own_calls,
            lengths=tuple(s.length for s in recorder.steps) if own_calls else (),
            final_step=decoding.last_runs(recorder.steps) if fast else None,
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> Tensor:
        """Embeddings (B, P, D) of the prefix, packed by the family's own code."""
        return self._packed(pixels, extras)

    def prefill(self, embedded: Tensor) -> Tensor:
        return embedded

    def select(self, memory: Tensor, index: Tensor) -> Tensor:
        return memory[index]

    def denoise(self, memory: Tensor, *state: Tensor) -> Tensor:
        return decoding.step_logits(self.model, memory, *state)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
