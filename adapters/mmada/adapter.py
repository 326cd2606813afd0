r"""MMaDA and Lumina-DiMOO: the image is VQ codes in the sequence, all of which runs at every step.

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

``Alpha-VLLM/Lumina-DiMOO`` is the same language model with other packing, codes of diffusers'
``VQModel``, and a decoding loop that is a script's, see :mod:`captum_dcam.adapters.mmada.packing`
and :mod:`captum_dcam.adapters.mmada.decoding`; which it is, the model's class says.
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
from captum_dcam.adapters.common.visuals import Visual, one_size, visuals_of
from captum_dcam.adapters.mmada import decoding, packing
from captum_dcam.adapters.mmada.compat import callable_model, repaired
from captum_dcam.adapters.mmada.facts import LUMINA, MmadaFamily
from captum_dcam.adapters.mmada.loading import loaded
from captum_dcam.errors import InputError, ProcessorError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import Messages, messages_of, summary
from captum_dcam.model.trajectory import Given, Trajectory

#: Lumina-DiMOO's system prompt
LUMINA_SYSTEM = (
    "You are a multimodal model that can process both text and images. Answer the following "
    "question based on the provided images. Analyze each image and combine relevant details to "
    "answer."
)
#: an image longer than this is cropped to less than a hundredth of itself
LONGEST = 100


@register
class MmadaAdapter(MmadaFamily, FamilyAdapter):
    r"""Adapter of ``MMadaModelLM``, and of Lumina-DiMOO's ``LLaDAForMultiModalGeneration``.

    Args:
        model (nn.Module): from upstream's ``from_pretrained``.
        processor (tuple): ``(tokenizer, vq_model)``: the checkpoint's tokenizer, as
            ``AutoTokenizer`` gives it, and upstream's ``MAGVITv2``; Lumina-DiMOO: diffusers'
            ``VQModel``.
        cache (str, optional): ``none``, the family's only one.
        resolution (int, optional): side of the square image in pixels, a multiple of 16: 512
            gives 32 × 32 tokens, 256 gives 16 × 16. Lumina-DiMOO: of a square of as many pixels as
            the image is given, a multiple of 32. Default: 512; 1024
        fit (str, optional): ``crop`` (the middle; what is cropped away is in no box) or
            ``squash``, which Lumina-DiMOO does not. Default: ``"crop"``

    Raises:
        TypeError, ValueError: a processor that does not fit, a resolution that cannot be.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mmada",)
    unfillable: ClassVar[str] = ""
    #: LLaDA's configuration, which Lumina-DiMOO has, is also that of a language model
    architectures: ClassVar[tuple[str, ...]] = ("MMadaModelLM", LUMINA)
    classes: ClassVar[tuple[str, ...]] = architectures
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    #: upstream's decoder has them by number, whatever the tokenizer says
    ids: SpecialIds = LLADA
    marks: tuple[int, ...] = packing.MARKS
    row_marks: tuple[int, ...] = packing.ROW_MARKS
    first_code: int = packing.FIRST_CODE

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        resolution: int | None = None,
        fit: str = "crop",
    ) -> None:
        super().__init__(model, processor, cache)
        self.rows = any(c.__name__ == LUMINA for c in type(model).__mro__)
        kind = packing.Rows if self.rows else packing.Square
        stride, usual = (packing.Rows.step, 1024) if self.rows else (packing.STRIDE, 512)
        resolution = usual if resolution is None else resolution
        whole = isinstance(processor, tuple) and len(processor) == 2
        pair: tuple[Any, Any] = processor if whole else (None, None)
        self._tokenizer, self._vq = pair
        if not callable(self._tokenizer) or not hasattr(self._vq, kind.encoder[1]):
            raise ProcessorError(
                f"the processor is a {type(processor).__name__}: expected (tokenizer, vq_model), "
                f"the checkpoint's AutoTokenizer and upstream's {kind.encoder[0]}"
            )
        if resolution < stride or resolution % stride:
            raise InputError(
                f"resolution is {resolution}: expected a positive multiple of {stride} "
                f"pixels, {'1024' if self.rows else '512 or 256'} for the published checkpoints"
            )
        if fit not in packing.FITS[: 1 if self.rows else None]:
            raise InputError(
                f"fit is {fit!r}: expected one of {packing.FITS}; Lumina-DiMOO has crop alone"
            )
        self.resolution, self.fit = resolution, fit
        self._offset = self.first_code if self.rows else len(self._tokenizer)
        codes = kind.count(model.config, self._vq)
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
        marks = self.row_marks if self.rows else ()
        return special_ids(self._tokenizer) | {*self.ids, *marks}

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
        own = self._packing
        seen = [own.prepared(v.frames[0]) for v in visuals]
        _, shape, (x, y) = seen[0]
        positions, words, length = own.placed(shape, len(rows[0]))
        grid = Grid(positions, x, y, visuals[0].size)
        told = torch.zeros(len(said), length, dtype=torch.bool)
        told[:, words] = torch.tensor(said)
        context = getattr(self.model.config, "max_sequence_length", None)
        if context is not None and length >= context:
            raise InputError(
                f"the prompt has {length} tokens, {grid.positions.numel()} of them of the image, "
                f"but the model's context is {context}: shorten the text, or give a resolution "
                f"below {self.resolution}"
            )
        dtype = next(self._vq.parameters()).dtype
        return Request(
            torch.stack([pixels for pixels, *_ in seen]).to(self.device, dtype),
            (torch.tensor(rows, device=self.device),),
            Layout((grid,), length),
            tuple(summary(p) for p in prompts),
            tuple(v.frames for v in visuals),
            told,
        )

    @property
    def _packing(self) -> packing.Packing:
        """How prompts are put together."""
        kind = packing.Rows if self.rows else packing.Square
        marks = self.row_marks if self.rows else self.marks
        return kind(self._vq, self.resolution, self.fit, self._offset, marks)

    def _text(self, prompt: Any, visual: Visual) -> tuple[list[int], list[bool]]:
        """Ids behind the image, and which are of the dialogue."""
        messages = messages_of(prompt, [visual])
        check_prompt(messages, special_texts(self._tokenizer, self.mask_id))
        return told_apart(messages, self._ids)

    def _ids(self, asked: Messages) -> list[int]:
        """The conversation in the chat template; Lumina-DiMOO's has none."""
        messages = []
        for m in asked:
            text = "".join(p["text"] for p in m["content"] if p["type"] == "text")
            messages.append({"role": m["role"], "content": text})
        if self.rows:
            return list(self._tokenizer(_tagged(messages))["input_ids"])
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        else:
            text = _published_format(messages, self._tokenizer.bos_token or "")
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pixel_tokens(self, request: Request) -> Tensor:
        high, wide = request.layout.shapes[0]
        cells = torch.arange(high * wide).view(1, 1, high, wide)
        for axis in (2, 3):
            cells = cells.repeat_interleave(packing.STRIDE, axis)
        return cells.expand(1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids = request.extras[0][example].cpu()
        text = (~torch.isin(ids, torch.tensor(sorted(self.stop_ids)))).nonzero()[:, 0]
        _, words, _ = self._packing.placed(request.layout.shapes[0], len(ids))
        return words[text], ids[text]

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode with the family's own ``mmu_generate`` and record it; Lumina-DiMOO's loop, which
        is its script's, is in :func:`~captum_dcam.adapters.mmada.decoding.written`.

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
            itself keeps it, and is never explained. Lumina-DiMOO: one more token, the last, closes
            the answer in every state; blocks behind the one in which all answers have their end
            are not written, and hold EOS in ``tokens``.

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
        ids = self._packing.ids(request.pixels, request.extras[0])
        with (
            callable_model(self.model),
            decoding.logged(self.model, prefix, self.ids.mask, scale) as log,
            started(given, prefix, self.ids.mask, self.model.get_input_embeddings()),
            torch.no_grad(),
            seeded(generator, bits=31),
        ):
            if self.rows:
                result = decoding.written(self.model, ids, self._packing.tail, self.ids, options)
            else:
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
        ids = self._packing.ids(pixels, extras[0])
        return Prefix(packing.without_gradient(pixels, self.model.get_input_embeddings()(ids)))

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        with callable_model(self.model):
            given = self.model, memory.embeds, self.ids.mask, len(self._packing.tail)
            return decoding.step_logits(*given, *state)

    def whole_answer(self, ids: Sequence[int]) -> list[int]:
        """With the token that closes it, where the canvas has one."""
        return [*ids, *self._packing.tail]

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


def _tagged(messages: Sequence[dict[str, str]]) -> str:
    """Lumina-DiMOO's format; its authors have one turn, and tags that close an answer."""
    asked = [m for m in messages if m["role"] != "system"]
    system = [m["content"] for m in messages if m["role"] == "system"] or [LUMINA_SYSTEM]
    names = {"assistant": "answer"}
    turns = [(names.get(m["role"], m["role"]), m["content"]) for m in asked]
    return "".join(f"<{n}>{text}</{n}>" for n, text in [("system", system[0]), *turns])


def _published_format(messages: Sequence[dict[str, str]], start: str) -> str:
    """The format of upstream's demo, for tokenizers without a chat template."""
    turns = [
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n{m['content'].strip()}<|eot_id|>"
        for m in messages
    ]
    return f"{start}{''.join(turns)}<|start_header_id|>assistant<|end_header_id|>\n"
