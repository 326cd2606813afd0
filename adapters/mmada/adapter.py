r"""MMaDA: the image is 1024 VQ codes in the sequence, all of which runs at every step.

Upstream: ``Gen-Verse/MMaDA`` (packages ``models`` and ``training``), checkpoints
``Gen-Verse/MMaDA-8B-Base`` and ``-MixCoT``; codes from ``showlab/magvitv2``. One image per
example, in front of all text; every call is feasible.

**Pixels have no gradient.** ``request.pixels`` is a float tensor, the image in [-1, 1]; ``embed``
turns it into integer codes with the VQ encoder, as the model's authors do. Methods that read the
tapped block or perturb pixels work; a method that asks for the pixels' gradient gets an error that
says so, never a map of zeros, and no straight-through gradient is made up.

What surprises upstream: nothing ends an answer (``eot_token`` is ignored); 128 steps for whatever
``max_new_tokens``; a file *name* that holds ai2d, clevr, docvqa, geo or llava decides that a
image is squashed and not cropped (here: ``fit="squash"``); an ``attention_mask`` with a zero in
the model's forward silently makes attention causal (never passed here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.dialogue import told_apart
from captum_dcam.adapters.common.holes import started
from captum_dcam.adapters.common.loading import FamilyAdapter
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.settings import read_guided
from captum_dcam.adapters.common.text import (
    LLADA,
    SpecialIds,
    Words,
    check_prompt,
    special_ids,
    special_texts,
)
from captum_dcam.adapters.common.visuals import Visual, one_size, pixel_cells, visuals_of
from captum_dcam.adapters.mmada import decoding, packing
from captum_dcam.adapters.mmada.compat import callable_model, repaired
from captum_dcam.adapters.mmada.facts import MmadaFamily
from captum_dcam.adapters.mmada.loading import loaded
from captum_dcam.errors import InputError, ProcessorError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.prompts import Messages, messages_of, summary
from captum_dcam.model.trajectory import Given, Trajectory

#: an image longer than this is cropped to less than a hundredth of itself
LONGEST = 100


@register
class MmadaAdapter(MmadaFamily, FamilyAdapter):
    r"""Adapter of ``MMadaModelLM``.

    Args:
        model (nn.Module): from upstream's ``MMadaModelLM.from_pretrained``.
        processor (tuple): ``(tokenizer, vq_model)``: the checkpoint's tokenizer, as
            ``AutoTokenizer`` gives it, and upstream's ``MAGVITv2``.
        cache (str, optional): ``none``, the family's only one.
        resolution (int, optional): side of the square image in pixels, a multiple of 16: 512
            gives 32 × 32 tokens, 256 gives 16 × 16. Default: 512
        fit (str, optional): ``crop`` (the middle square; what is cropped away is in no box) or
            ``squash``. Default: ``"crop"``

    Raises:
        TypeError, ValueError: a processor that does not fit, a resolution that cannot be.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mmada",)
    unfillable: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ("MMadaModelLM",)
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    #: upstream's decoder has them by number, whatever the tokenizer says
    ids: SpecialIds = LLADA
    marks: tuple[int, int, int] = packing.MARKS

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        resolution: int = 512,
        fit: str = "crop",
    ) -> None:
        super().__init__(model, processor, cache)
        whole = isinstance(processor, tuple) and len(processor) == 2
        pair: tuple[Any, Any] = processor if whole else (None, None)
        self._tokenizer, self._vq = pair
        if not callable(self._tokenizer) or not hasattr(self._vq, "get_code"):
            raise ProcessorError(
                f"the processor is a {type(processor).__name__}: expected (tokenizer, vq_model), "
                "the checkpoint's AutoTokenizer and upstream's MAGVITv2"
            )
        if resolution < packing.STRIDE or resolution % packing.STRIDE:
            raise InputError(
                f"resolution is {resolution}: expected a positive multiple of {packing.STRIDE} "
                "pixels, 512 or 256 for the published checkpoints"
            )
        if fit not in packing.FITS:
            raise InputError(f"fit is {fit!r}: expected one of {packing.FITS}")
        self.resolution, self.fit = resolution, fit
        self._offset = len(self._tokenizer)
        codes = getattr(model.config, "codebook_size", 8192)
        if self._offset + codes > self.vocabulary:
            raise ProcessorError(
                f"the tokenizer has {self._offset} ids and the codebook {codes}, but the model "
                f"embeds {self.vocabulary}: an image token's id is its code + len(tokenizer); give "
                "the checkpoint's own tokenizer, without added tokens (UniversalPrompting adds "
                "some unless use_reserved_token=True)"
            )
        self._words = Words(self._tokenizer)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.transformer.blocks)

    def attention_module(self, block: nn.Module) -> nn.Module:
        return block.attn_out  # type: ignore[return-value]  # the block computes attention itself

    @property
    def stop_ids(self) -> frozenset[int]:
        return special_ids(self._tokenizer) | set(self.ids)

    @property
    def mask_id(self) -> int:
        return self.ids.mask

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token; an image's codes, should the model write some, by number."""
        text = iter(self._words.token_texts([i for i in ids if i < self._offset]))
        return [next(text) if i < self._offset else f" <|code {i - self._offset}|>" for i in ids]

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Images and prompts to a request.

        Args:
            images (sequence): for every example a list of one image.
            prompts (sequence): for every example a string, or a conversation: messages
                ``{"role": …, "content": …}`` that end with the user's.

        Raises:
            TypeError, ValueError: say what was given, what was expected and what to do. Examples
                of one batch need images of one size and prompts of as many tokens: positions
                cannot be padded away in this family.
        """
        self.check_request(images, prompts)
        visuals = [_one_picture(given) for given in images]
        one_size([[v.size] for v in visuals])
        rows, said = zip(
            *(self._text(p, v) for p, v in zip(prompts, visuals, strict=True)), strict=True
        )
        if len({len(r) for r in rows}) > 1:
            raise InputError(
                f"prompts of {[len(r) for r in rows]} tokens in one batch: MMaDA takes no "
                "positions, so that padding would move the answer; explain them one by one"
            )
        seen = [packing.fitted(v.frames[0], self.resolution, self.fit) for v in visuals]
        grid = seen[0][1]
        length = packing.BEFORE + grid.positions.numel() + 1 + len(rows[0])
        context = getattr(self.model.config, "max_sequence_length", None)
        if context is not None and length >= context:
            raise InputError(
                f"the prompt has {length} tokens, {grid.positions.numel()} of them of the image, "
                f"but the model's context is {context}: shorten the text, or give a resolution "
                f"below {self.resolution}"
            )
        dtype = next(self._vq.parameters()).dtype
        return Request(
            torch.stack([pixels for pixels, _ in seen]).to(self.device, dtype),
            (torch.tensor(rows, device=self.device),),
            Layout((grid,), length),
            tuple(summary(p) for p in prompts),
            tuple(v.frames for v in visuals),
            torch.tensor([[*[False] * (length - len(own)), *own] for own in said]),
        )

    def _text(self, prompt: Any, visual: Visual) -> tuple[list[int], list[bool]]:
        """Ids behind the image, and which are of the dialogue."""
        messages = messages_of(prompt, [visual])
        check_prompt(messages, special_texts(self._tokenizer, self.mask_id))
        return told_apart(messages, self._ids)

    def _ids(self, asked: Messages) -> list[int]:
        """The conversation in the chat template."""
        messages = []
        for m in asked:
            text = "".join(p["text"] for p in m["content"] if p["type"] == "text")
            messages.append({"role": m["role"], "content": text})
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = _published_format(messages, self._tokenizer.bos_token or "")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pixel_tokens(self, request: Request) -> Tensor:
        side = self.resolution // packing.STRIDE
        return pixel_cells(1, side, packing.STRIDE)[:, 0].expand(1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids = request.extras[0][example].cpu()
        text = (~torch.isin(ids, torch.tensor(sorted(self.stop_ids)))).nonzero()[:, 0]
        return text + request.layout.image_end + 1, ids[text]

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode with the family's own ``mmu_generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            given (Given, optional): tokens that stand in the canvas from the start.
            max_new_tokens (int, optional): tokens of the canvas; ``gen_length`` means the same.
                Default: 128
            block_length (int, optional), steps (int, optional): Default: ``max_new_tokens`` both;
                upstream's function has 128 each, its script a quarter and a half of the canvas
            temperature (float, optional), cfg_scale (float, optional): Default: 0 both. Guided,
                every step runs rows behind the batch in which the whole prompt is masked; maps
                explain the guided logit through the rows that see the image
            remasking (str, optional): ``low_confidence`` or ``random``.

        Returns:
            Trajectory: over the whole canvas; a position that the model filled with the mask token
            itself keeps it, and is never explained.

        Raises:
            TypeError, ValueError: settings that cannot work.
        """
        options = read_guided(decoding.SETTINGS, settings, generator, "max_new_tokens")
        scale = float(options["cfg_scale"])
        if scale > 0 and given is not None and bool(given.at.any()):
            raise InputError(
                f"cfg_scale is {scale:g}, beside an answer with holes: upstream takes given words "
                "for the prompt, and hides them in the rows that it guides by; leave it at 0"
            )
        prefix = request.layout.prefix_length
        codes = packing.codes_of(self._vq, request.pixels)
        ids = packing.prefix_ids(codes, request.extras[0], self._offset, self.marks)
        with (
            callable_model(self.model),
            decoding.logged(self.model, prefix, self.ids.mask, scale) as log,
            started(given, prefix, self.ids.mask, self.model.get_input_embeddings()),
            torch.no_grad(),
            seeded(generator, bits=31),
        ):
            result = self.model.mmu_generate(ids, mask_id=self.ids.mask, **options)
        tokens = result[:, prefix:]
        log.finish(tokens)
        states, final = [log.states], [tokens]
        lengths: tuple[int, ...] = ()
        if scale > 0:
            states.append(torch.full(log.states.shape[:2], scale, device=tokens.device))
            final.append(states[1][0])
            lengths = (result.shape[1],) * len(log.canvases)  # twice the rows of a replay
        return self.recorded(request, settings, log, states, final, lengths=lengths)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        """Embeddings (B, P, D) of the prompt; see above for the pixels' gradient."""
        codes = packing.codes_of(self._vq, pixels)
        ids = packing.prefix_ids(codes, extras[0], self._offset, self.marks)
        return Prefix(packing.without_gradient(pixels, self.model.get_input_embeddings()(ids)))

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        with callable_model(self.model):
            return decoding.step_logits(self.model, memory.embeds, self.ids.mask, *state)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(self.model.model.transformer.ln_f(hidden))


def _one_picture(given: Sequence[Any]) -> Visual:
    """The one image of an example; TypeError or ValueError for anything else."""
    (visual,) = visuals_of(given, without_video="mmada")
    height, width = visual.size
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(
            f"the image has {width} × {height} pixels: MMaDA would see less than a hundredth of "
            "it; cut it into pieces"
        )
    return visual


def _published_format(messages: Sequence[dict[str, str]], start: str) -> str:
    """The format of upstream's demo, for tokenizers without a chat template."""
    turns = [
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n{m['content'].strip()}<|eot_id|>"
        for m in messages
    ]
    return f"{start}{''.join(turns)}<|start_header_id|>assistant<|end_header_id|>\n"
