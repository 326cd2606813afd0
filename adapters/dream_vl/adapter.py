r"""Dream-VL: the whole sequence at every step, logits shifted by one, pictures of any size.

Upstream: ``DreamLM/Dream-VLX`` (package ``dreamvl``), checkpoint ``Dream-org/Dream-VL-7B``, loaded
as the hub's remote code. Every call is feasible: the prompt cache is broken upstream and stays off.

What surprises in upstream's defaults: temperature 1.0 and top_k 50 (transformers 4 derives them
from the model's configuration), 512 steps whatever ``max_new_tokens``, and ``alg="origin"``, which
draws the positions it fills. Here: greedy ``maskgit_plus`` with a step a token. A step fills
int(m (1 - s/t)) of m masks, so that the first step may fill none; nothing ends an answer early.
With several examples upstream ranks the positions of all of them together, so that an answer
depends on its batch; here examples of a batch are decoded one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.autoregressive.decoding import seeded
from captum_dcam.adapters.autoregressive.loading import parts_of
from captum_dcam.adapters.autoregressive.preparing import Conversations, prepared
from captum_dcam.adapters.common.text import Words, special_ids, stop_ids
from captum_dcam.adapters.dream_vl import decoding as _dream_vl
from captum_dcam.adapters.dream_vl.loading import loaded
from captum_dcam.errors import WeightsError
from captum_dcam.model.adapter import Adapter, Checkpoint, Facts, Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory


@register
class DreamVLAdapter(Adapter):
    r"""Adapter of ``DreamVLModel``.

    Args:
        model (nn.Module): as ``AutoModel`` loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.autoregressive.loading.Parts`.
        regime (str, optional): ``full``, the family's only one.

    Raises:
        TypeError, ValueError: a processor that does not fit the model.
    """

    family: ClassVar[str] = "dream_vl"
    model_types: ClassVar[tuple[str, ...]] = ("dream-vl",)
    regimes: ClassVar[tuple[str, ...]] = ("full",)
    any_size: ClassVar[bool] = True
    takes_video: ClassVar[bool] = True
    default_checkpoint: ClassVar[str] = "Dream-org/Dream-VL-7B"
    facts: ClassVar[Facts | None] = Facts(
        checkpoints=(Checkpoint("Dream-org/Dream-VL-7B", blocks=28),),
        remote_code=True,
        notes=(
            "its code comes with the checkpoint: load needs trust_remote_code=True",
            "upstream decodes with temperature 1.0, top_k 50, 512 steps and alg origin unless told "
            "otherwise; here greedy maskgit_plus with a step a token",
            "the prompt cache fails upstream: use_cache=True is refused",
            "the first steps can fill no token: a step fills int(m (1 - s/t)) of m masks",
            "examples of a batch are decoded one by one: upstream ranks them together",
        ),
    )
    model: Any

    def __init__(self, model: nn.Module, processor: Any, regime: str | None = None) -> None:
        super().__init__(model, processor, regime)
        parts = parts_of(processor)
        self._template, self._tokenizer = parts.chat_template, parts.tokenizer
        self._family = _dream_vl.DreamVL(model.config, parts.tokenizer, parts.image_processor)
        self._words = Words(parts.tokenizer)

    @classmethod
    def load(
        cls, source: str | None = None, *, regime: str | None = None, **options: Any
    ) -> DreamVLAdapter:
        """Load a checkpoint; options: those of ``loaded`` in ``_dream_vl_loading.py``."""
        if source is None:
            raise WeightsError(
                f"{cls.family} has no weights of its own: name a checkpoint or a folder, such as "
                f"{cls.default_checkpoint}"
            )
        model, processor = loaded(source, **options)
        return cls(model, processor, regime)

    @staticmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model is a ``DreamVLModel``."""
        return any(c.__name__ == "DreamVLModel" for c in type(model).__mro__)

    # -- what the family declares -----------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        own = stop_ids(self.model, self._tokenizer)
        return own | special_ids(self._tokenizer) | {self.mask_id}

    @property
    def mask_id(self) -> int:
        return int(self.model.config.mask_token_id)

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self._words.pieces(ids)

    def query_position(self, layout: Layout, position: int) -> int:
        return layout.prefix_length + position - 1

    # -- requests ---------------------------------------------------------------------------------

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompts to a request.

        Args:
            images (sequence): for every example its pictures; a list of pictures among them is a
                video, given as frames, and gets a grid a pair of frames.
            prompts (sequence): for every example a string, or a conversation: messages
                ``{"role": …, "content": …}`` that end with the user's.

        Raises:
            TypeError, ValueError: say what was given, what was expected and what to do.
        """
        self.check_request(images, prompts)
        request = prepared(self._family, self._template, images, prompts)
        return replace(
            request,
            pixels=request.pixels.to(self.device, self.dtype),
            extras=tuple(e.to(self.device) for e in request.extras),
        )

    def prepare_again(self, request: Request, pictures: Sequence[Image.Image]) -> Request:
        assert isinstance(request, Conversations)
        left, given = list(pictures), []
        for count in request.frames:
            given.append(left[:count] if count else left[0])
            left = left[max(count, 1) :]
        return self.prepare([given] * request.batch, list(request.asked))

    def pixel_tokens(self, request: Request) -> Tensor:
        assert isinstance(request, Conversations) and request.owners is not None
        return request.owners

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, mask = (e[example].cpu() for e in request.extras[:2])
        markers = torch.tensor(sorted({*special_ids(self._tokenizer), *self._family.image_ids}))
        positions = (mask.bool() & ~torch.isin(ids, markers)).nonzero()[:, 0]
        return positions, ids[positions]

    # -- decoding ---------------------------------------------------------------------------------

    def _named(self, extras: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._family.extra_names, extras, strict=True))

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``diffusion_generate``, example by example, and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            max_new_tokens (int, optional): tokens of the canvas; ``gen_length`` means the same.
                Default: 128
            steps (int, optional): Default: ``max_new_tokens``; upstream's own: 512
            alg (str, optional): ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``origin``.
                Default: ``maskgit_plus``, as in the authors' example; upstream's own: ``origin``
            temperature (float, optional): Default: 0, greedy; the authors' example has 0.1
            alg_temp, top_p, top_k, eps, eos_penalty (optional): upstream's, at its class's
                defaults: None, None, None, 0.001, 0.

        Returns:
            Trajectory: over the whole canvas.

        Raises:
            TypeError, ValueError: settings that cannot work, ``use_cache=True`` among them.
        """
        options = _dream_vl.checked(settings, generator)
        config = _dream_vl.generation_config(self.model, options)
        logs = []
        with nullcontext() if generator is None else seeded(generator):
            for b in range(request.batch):
                one = slice(b, b + 1)
                ids, mask, *rest = (e[one] for e in request.extras)
                parts = self._family.inputs(request.pixels[one], ids, self._named(rest))
                inputs = {**parts, "attention_mask": mask}
                logs.append(_dream_vl.generated(self.model, ids, config, inputs))
        tokens = torch.cat([log.tokens for log in logs])
        length = request.layout.prefix_length + tokens.shape[1]
        # several examples: other calls than a replay's, so that none are kept
        lengths = (length,) * options["steps"] if request.batch > 1 else ()
        return Trajectory(
            tokens=tokens,
            states=(torch.cat([log.states for log in logs], dim=1),),
            final_state=(tokens,),
            commit_step=torch.cat([log.commit_step for log in logs]),
            confidence=torch.cat([log.confidence for log in logs]),
            regime=self.regime,
            lengths=lengths,
            image_end=request.layout.image_end,
            settings=settings,
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> _dream_vl.Prompt:
        """Prompts with their pictures; example by example, as they are decoded."""
        prompts = []
        for b in range(len(pixels)):
            one = slice(b, b + 1)
            ids, mask, *rest = (e[one] for e in extras)
            named = self._named(rest)
            parts = self._family.inputs(pixels[one], ids, named)
            prompts.append(_dream_vl.embedded(self.model, ids, mask, named, parts))
        return _dream_vl.joined(prompts)

    def prefill(self, embedded: _dream_vl.Prompt) -> _dream_vl.Prompt:
        return embedded

    def rows(self, memory: _dream_vl.Prompt, index: Tensor) -> _dream_vl.Prompt:
        return memory.rows(index)

    def denoise(self, memory: _dream_vl.Prompt, *state: Tensor) -> Tensor:
        return _dream_vl.step_logits(self.model, memory, state[0])

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
