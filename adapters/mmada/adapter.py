r"""MMaDA: the picture is 1024 VQ codes in the sequence, all of which runs at every step.

Upstream: ``Gen-Verse/MMaDA`` (packages ``models`` and ``training``), checkpoints
``Gen-Verse/MMaDA-8B-Base`` and ``-MixCoT``; codes from ``showlab/magvitv2``. One picture per
example, in front of all text; every call is feasible.

**Pixels have no gradient.** ``request.pixels`` is a float tensor, the picture in [-1, 1]; ``embed``
turns it into integer codes with the VQ encoder, as the model's authors do. Methods that read the
tapped block or perturb pixels work; a method that asks for the pixels' gradient gets an error that
says so, never a map of zeros, and no straight-through gradient is made up.

What surprises upstream: nothing ends an answer (``eot_token`` is ignored); 128 steps for whatever
``max_new_tokens``; a file *name* that holds ai2d, clevr, docvqa, geo or llava decides that a
picture is squashed and not cropped (here: ``fit="squash"``); an ``attention_mask`` with a zero in
the model's forward silently makes attention causal (never passed here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.text import Words, special_ids
from captum_dcam.adapters.common.visuals import Visual, visuals_of
from captum_dcam.adapters.mmada import decoding, packing
from captum_dcam.adapters.mmada.compat import INSTALL, callable_model
from captum_dcam.adapters.mmada.loading import CHECKPOINT, loaded
from captum_dcam.adapters.mmada.settings import checked
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.adapter import Adapter, Checkpoint, FamilyFacts, Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.prompts import messages_of, summary
from captum_dcam.model.trajectory import Trajectory

#: a picture longer than this is cropped to less than a hundredth of itself
LONGEST = 100


@register
class MmadaAdapter(Adapter):
    r"""Adapter of ``MMadaModelLM``.

    Args:
        model (nn.Module): from upstream's ``MMadaModelLM.from_pretrained``.
        processor (tuple): ``(tokenizer, vq_model)``: the checkpoint's tokenizer, as
            ``AutoTokenizer`` gives it, and upstream's ``MAGVITv2``.
        cache (str, optional): ``none``, the family's only one.
        resolution (int, optional): side of the square picture in pixels, a multiple of 16: 512
            gives 32 × 32 tokens, 256 gives 16 × 16. Default: 512
        fit (str, optional): ``crop`` (the middle square; what is cropped away is in no box) or
            ``squash``. Default: ``"crop"``

    Raises:
        TypeError, ValueError: a processor that does not fit, a resolution that cannot be.
    """

    family: ClassVar[str] = "mmada"
    model_types: ClassVar[tuple[str, ...]] = ("mmada",)
    caches: ClassVar[tuple[str, ...]] = ("none",)
    several_images: ClassVar[bool] = False
    facts: ClassVar[FamilyFacts | None] = FamilyFacts(
        checkpoints=(
            Checkpoint("Gen-Verse/MMaDA-8B-Base", blocks=32),
            Checkpoint(CHECKPOINT, blocks=32),
        ),
        package="models",
        install=INSTALL,
        notes=(
            "no gradient reaches pixels: the picture is integer codes; methods that ask for it get "
            "an error, those on the tapped block work",
            "nothing ends an answer: eot_token is accepted and ignored upstream",
            "upstream's steps are 128 whatever max_new_tokens; here a step a token",
            "upstream squashes pictures whose file name holds ai2d, clevr, docvqa, geo or llava, "
            'and crops all others; here fit="crop" or "squash" says so',
            "an attention_mask with a zero would make the model causal: none is passed, so that "
            "prompts of one batch need as many tokens",
        ),
    )
    model: Any

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
        pair: tuple[Any, Any] = (None, None)
        if isinstance(processor, tuple) and len(processor) == 2:
            pair = processor
        self._tokenizer, self._vq = pair
        if not callable(self._tokenizer) or not hasattr(self._vq, "get_code"):
            raise InputTypeError(
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
            raise InputError(
                f"the tokenizer has {self._offset} ids and the codebook {codes}, but the model "
                f"embeds {self.vocabulary}: an image token's id is its code + len(tokenizer); give "
                "the checkpoint's own tokenizer, without added tokens (UniversalPrompting adds "
                "some unless use_reserved_token=True)"
            )
        self._words = Words(self._tokenizer)

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        cache: str | None = None,
        resolution: int = 512,
        fit: str = "crop",
        **options: Any,
    ) -> MmadaAdapter:
        """Load a checkpoint; options: those of
        :func:`~captum_dcam.adapters.mmada.loading.loaded`."""
        model, processor = loaded(source, **options)
        return cls(model, processor, cache, resolution=resolution, fit=fit)

    @staticmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model is an ``MMadaModelLM``."""
        return any(c.__name__ == "MMadaModelLM" for c in type(model).__mro__)

    # -- what the family declares -----------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.transformer.blocks)

    def attention_module(self, block: nn.Module) -> nn.Module:
        return block.attn_out  # type: ignore[return-value]  # the block computes attention itself

    @property
    def stop_ids(self) -> frozenset[int]:
        own = (decoding.EOS, decoding.TURN_END, decoding.HEADER, decoding.HEADER_END, decoding.MASK)
        return frozenset((*own, *special_ids(self._tokenizer)))

    @property
    def mask_id(self) -> int:
        return decoding.MASK

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token; a picture's codes, should the model write some, by number."""
        text = iter(self._words.token_texts([i for i in ids if i < self._offset]))
        return [next(text) if i < self._offset else f" <|code {i - self._offset}|>" for i in ids]

    # -- requests ---------------------------------------------------------------------------------

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompts to a request.

        Args:
            images (sequence): for every example a list of one picture.
            prompts (sequence): for every example a string, or a conversation: messages
                ``{"role": …, "content": …}`` that end with the user's.

        Raises:
            TypeError, ValueError: say what was given, what was expected and what to do. Examples
                of one batch need pictures of one size and prompts of as many tokens: positions
                cannot be padded away in this family.
        """
        self.check_request(images, prompts)
        visuals = [_one_picture(given) for given in images]
        sizes = sorted({v.size for v in visuals})
        if len(sizes) > 1:
            raise InputError(
                f"pictures of different sizes in one batch ({sizes}, height × width): their "
                "layouts differ; explain them one by one, or resize them to one size"
            )
        rows = [self._text(p, v) for p, v in zip(prompts, visuals, strict=True)]
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
                f"the prompt has {length} tokens, {grid.positions.numel()} of them of the picture, "
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
        )

    def _text(self, prompt: Any, visual: Visual) -> list[int]:
        """Ids behind the picture: the conversation in the chat template."""
        messages = []
        for m in messages_of(prompt, [visual]):
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
        cells = torch.arange(side * side).view(1, 1, side, side)
        cells = cells.repeat_interleave(packing.STRIDE, 2).repeat_interleave(packing.STRIDE, 3)
        return cells.expand(1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids = request.extras[0][example].cpu()
        text = (~torch.isin(ids, torch.tensor(sorted(self.stop_ids)))).nonzero()[:, 0]
        return text + request.layout.image_end + 1, ids[text]

    # -- decoding ---------------------------------------------------------------------------------

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``mmu_generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            max_new_tokens (int, optional): tokens of the canvas; ``gen_length`` means the same.
                Default: 128
            block_length (int, optional), steps (int, optional): Default: ``max_new_tokens`` both;
                upstream's function has 128 each, its script a quarter and a half of the canvas
            temperature (float, optional), cfg_scale (float, optional): Default: 0 both. Guided,
                every step runs rows behind the batch in which the whole prompt is masked; maps
                explain the guided logit through the rows that see the picture
            remasking (str, optional): ``low_confidence`` or ``random``.

        Returns:
            Trajectory: over the whole canvas; a position that the model filled with the mask token
            itself keeps it, and is never explained.

        Raises:
            TypeError, ValueError: settings that cannot work.
        """
        options = checked(settings, generator)
        scale = float(options["cfg_scale"])
        prefix = request.layout.prefix_length
        codes = packing.codes_of(self._vq, request.pixels)
        ids = packing.prefix_ids(codes, request.extras[0], self._offset)
        with (
            callable_model(self.model),
            decoding.logged(self.model, prefix, scale) as log,
            torch.no_grad(),
            seeded(generator, bits=31),
        ):
            result = self.model.mmu_generate(ids, mask_id=decoding.MASK, **options)
        tokens = result[:, prefix:]
        log.finish(tokens)
        states: tuple[Tensor, ...] = (log.states,)
        final: tuple[Tensor, ...] = (tokens,)
        if scale > 0:
            scales = torch.full(log.states.shape[:2], scale, device=tokens.device)
            states, final = (*states, scales), (*final, scales[0])
        return Trajectory(
            tokens=tokens,
            states=states,
            final_state=final,
            commit_step=log.commit_step,
            confidence=log.confidence,
            cache=self.cache,
            image_end=request.layout.image_end,
            settings=settings,
            own_calls=scale > 0,  # twice the rows of a replay
            lengths=(result.shape[1],) * len(log.canvases) if scale > 0 else (),
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> Tensor:
        """Embeddings (B, P, D) of the prompt; see above for the pixels' gradient."""
        ids = packing.prefix_ids(packing.codes_of(self._vq, pixels), extras[0], self._offset)
        return packing.without_gradient(pixels, self.model.get_input_embeddings()(ids))

    def prefill(self, embedded: Tensor) -> Tensor:
        return embedded

    def select(self, memory: Tensor, index: Tensor) -> Tensor:
        return memory[index]

    def denoise(self, memory: Tensor, *state: Tensor) -> Tensor:
        canvas, *scale = state
        with callable_model(self.model):
            return decoding.step_logits(self.model, memory, canvas, scale[0] if scale else None)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(self.model.model.transformer.ln_f(hidden))


def _one_picture(given: Sequence[Any]) -> Visual:
    """The one picture of an example; TypeError or ValueError for anything else."""
    visuals = visuals_of(given)
    if any(v.video for v in visuals):
        raise InputError("mmada takes no video: give a single frame as the picture")
    height, width = visuals[0].size
    if max(height, width) > LONGEST * min(height, width):
        raise InputError(
            f"the picture has {width} × {height} pixels: MMaDA would see less than a hundredth of "
            "it; cut it into pieces"
        )
    return visuals[0]


def _published_format(messages: Sequence[dict[str, str]], start: str) -> str:
    """The format of upstream's demo, for tokenizers without a chat template."""
    turns = [
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n{m['content'].strip()}<|eot_id|>"
        for m in messages
    ]
    return f"{start}{''.join(turns)}<|start_header_id|>assistant<|end_header_id|>\n"
