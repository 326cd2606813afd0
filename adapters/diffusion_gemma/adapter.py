r"""DiffusionGemma: block diffusion from uniform noise, encoder and decoder with shared weights.

The encoder reads prompt and images once and every finished canvas after it; the decoder denoises
one canvas of C tokens behind the encoder's keys and values. So the encoder's prefill is the only
call that holds the image, and the blocks are the encoder's: gradients of every canvas reach their
image states through the cache, those of later canvases also by way of the canvases before.

There is no mask token. A canvas starts as random tokens, every step accepts those it is sure of
and draws the others anew, accepted ones may be dropped again, and the answer is the argmax of the
last step. A token commits at the first step from which its argmax stays what it is at the end.

A state is the answer as far as it is finished with the canvas behind it (T ids), the number of the
canvas, and the decoder's self-conditioning (C, D): the words that the step before expected. It is
part of what the step was given, and a constant as the canvas is. The ``teacher`` state has number
-1: every canvas is read with all its tokens visible and without self-conditioning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.conversations import ConversationAdapter
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.diffusion_gemma import decoding
from captum_dcam.adapters.diffusion_gemma.decoding import EVERY, Prompt, check_context, checked
from captum_dcam.adapters.diffusion_gemma.facts import DiffusionGemmaFamily
from captum_dcam.adapters.diffusion_gemma.loading import MODEL_TYPE, loaded
from captum_dcam.adapters.diffusion_gemma.packing import DiffusionGemma
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request, device_of, register
from captum_dcam.model.trajectory import Given, Trajectory
from captum_dcam.model.verification import check_once
from captum_dcam.model.wrappers import unwrapped


@register
class DiffusionGemmaAdapter(DiffusionGemmaFamily, ConversationAdapter):
    r"""Adapter of ``DiffusionGemmaForBlockDiffusion`` (transformers 5.23 and later).

    Args:
        model (nn.Module): as transformers loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    unfillable: ClassVar[str] = ""
    any_size: ClassVar[bool] = True
    loader = staticmethod(loaded)

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        if not self.owns(model):
            raise InputError(
                f"the model is a {type(model).__name__}: expected DiffusionGemmaForBlockDiffusion, "
                "with its output head"
            )
        super().__init__(model, processor, cache)

    def _family_of(self, parts: Parts) -> DiffusionGemma:
        return DiffusionGemma(self.model.config, parts.tokenizer, parts.image_processor)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The encoder's; the decoder's layer of the same number has its weights."""
        return list(self.model.model.encoder.language_model.layers)

    @property
    def step_blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.decoder.layers)

    @property
    def canvas(self) -> int:
        """C, tokens of a canvas."""
        return int(self.model.config.canvas_length)

    def _inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Tensor]:
        """The family's tensors besides the ids."""
        return self._family.inputs(pixels, extras[0], self._named(extras))

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode with the family's own ``generate``.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): of all randomness; there is no greedy mode.
            seed (int, optional): in place of a generator.
            given (Given, optional): tokens of whole canvases that stay. The family has no mask, its
                sampler starts from random tokens and draws those again that it does not accept; so
                given ones are made certain to it, see :func:`.decoding.certain`.
            **settings: ``max_new_tokens`` (or ``gen_length``; rounded up to whole canvases),
                ``max_denoising_steps`` (or ``steps``; at most this number per canvas), ``t_min``,
                ``t_max``, ``entropy_bound``, ``stability_threshold``, ``confidence_threshold``.
                Default: the checkpoint's, else the family's (256, 48, 0.4, 0.8, 0.1, 1, 0.005)

        Raises:
            ValueError: no source of randomness, or settings that ``generate`` would ignore.
        """
        options = checked(settings, self.canvas)
        if seed is not None and generator is None:
            generator = torch.Generator().manual_seed(seed)
            settings["seed"] = seed
        elif generator is None or seed is not None:
            raise InputError(
                "the family samples, it has no greedy mode: pass generator="
                "torch.Generator().manual_seed(0), or seed=0, one of them"
            )
        prefix = request.layout.prefix_length
        check_context(self.model.config, prefix, options)
        inputs = self._inputs(request.pixels, request.extras)
        with seeded(generator, bits=31), decoding.certain(self.model, given, self.canvas):
            recorder = decoding.sampled(self.model, request.extras[0], inputs, options)
        return self._trajectory(request, settings, recorder)

    def _trajectory(
        self, request: Request, settings: dict[str, Any], recorder: decoding.Recorder
    ) -> Trajectory:
        states = recorder.states(self._filler)
        return self.recorded(
            request,
            settings,
            recorder,
            states,
            self.visible_state(recorder.tokens),
            # a replay's steps read the canvases before anew
            lengths=recorder.lengths(request.layout.prefix_length),
            read_at=self._canvas_of(recorder.tokens) == states[1][..., None],
        )

    @contextmanager
    def recording(self, pipeline: Any, request: Request) -> Iterator[decoding.PipelineRecorder]:
        r"""Record a run of diffusers' ``DiffusionGemmaPipeline`` by its step callback.

        The trajectory is that of ``generate`` from the same random state: while it is recorded, the
        pipeline gives the encoder the family's masks, and ends a canvas by its last step's argmax.

        Args:
            pipeline (object): of this model, with an ``EntropyBoundScheduler``.
            request (Request): of one example, the image and prompt that the pipeline is given.

        Yields:
            PipelineRecorder: the callback; behind the context it has the ``trajectory``.

        Raises:
            InputError: another model or scheduler, several examples, a prompt with other ids, no
                callback, or a run that goes on behind the end of the answer.
            ReplayError: a step, computed again, is another.

        Examples::

            with adapter.recording(pipe, request) as steps:
                pipe("what is this?", image=image, callback_on_step_end=steps)
            forward.bind(request, steps.trajectory)
        """
        kind = type(pipeline.scheduler).__name__
        if kind != "EntropyBoundScheduler":
            raise InputError(
                f"the pipeline samples with a {kind}: recorded is EntropyBoundScheduler, the "
                "checkpoint's own sampler; set pipe.scheduler to one"
            )
        if unwrapped(pipeline.model) is not self.model:
            raise InputError(
                "the pipeline's model is not the adapter's: make the adapter with "
                "captum_dcam.wrap(pipe.model, pipe.processor)"
            )
        if request.batch != 1:
            raise InputError(
                f"the request has {request.batch} examples: a pipeline is recorded with one; run "
                "it once per example"
            )
        recorder = decoding.PipelineRecorder(self.model, input_ids=request.extras[0])
        with self.guard.held(self.model):
            with recorder.watching():
                yield recorder
            recorder.finish()
            recorder.trajectory = self._trajectory(request, {"pipeline": kind}, recorder)
            check_once(self, request, recorder.trajectory)

    def _canvas_of(self, tokens: Tensor) -> Tensor:
        """(T,) number of the canvas that each position of an answer (B, T) belongs to."""
        return torch.arange(tokens.shape[1], device=tokens.device) // self.canvas

    def rebuilt_states(
        self, request: Request, canvases: Sequence[Tensor], tokens: Tensor, **settings: Any
    ) -> tuple[Tensor, ...]:
        r"""States of a generation of one example that is known by its canvases' ids alone.

        Self-conditioning is computed again, step by step: it depends on nothing else.

        Args:
            request (Request): of one example.
            canvases (sequence of Tensor): (steps, 1, C) ids before every step, of every canvas.
            tokens (Tensor): (1, T) the answer.
            **settings: as in :meth:`generate`.

        Returns:
            tuple of Tensor: a :class:`~captum_dcam.model.trajectory.Trajectory`'s ``states``.
        """
        options = decoding.options_of(checked(settings, self.canvas))
        with torch.no_grad():
            memory = self.prefill(self.embed(request.pixels, *request.extras))
        found = [
            decoding.signals(self.model, memory, tokens[:, : n * self.canvas], steps, options)
            for n, steps in enumerate(canvases)
        ]
        return decoding.states_of(canvases, found, tokens, self._filler)

    def whole_answer(self, ids: Sequence[int]) -> list[int]:
        """An end of the answer and padding behind it, up to the end of its canvas."""
        missing = -len(ids) % self.canvas
        ends = sorted(self.stop_ids - {self._filler}) or [self._filler]
        return [*ids, *[ends[0], *[self._filler] * missing][:missing]]

    def visible_state(self, tokens: Tensor) -> tuple[Tensor, ...]:
        every = torch.full_like(tokens[:, 0], EVERY)
        return tokens, every, self._silence.expand(len(tokens), -1, -1)

    def forced_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Token t is hidden behind noise, see :func:`.decoding.forced`."""
        return decoding.forced(tokens, self._silence, self.vocabulary, self._filler)

    @property
    def _silence(self) -> Tensor:
        """(C, D) self-conditioning of no logits."""
        width = self.model.config.text_config.hidden_size
        return torch.zeros(self.canvas, width, dtype=self.dtype, device=self.device)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prompt:
        return decoding.embedded(self.model, extras[0], self._inputs(pixels, extras))

    def prefill(self, embedded: Prompt) -> Prompt:
        return decoding.prefilled(self.model, embedded)

    def denoise(self, memory: Prompt, *state: Tensor) -> Tensor:
        """Logits (R, T, V); zeros at positions of canvases that a row's state does not read."""
        ids, numbers, signal = state
        parts = []
        for number, canvas in enumerate(ids.split(self.canvas, 1)):
            read = (numbers == number) | (numbers == EVERY)
            before = ids[:, : number * self.canvas]
            parts.append(self._canvas(memory, read, before, canvas, signal))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _canvas(
        self, memory: Prompt, read: Tensor, before: Tensor, canvas: Tensor, signal: Tensor
    ) -> Tensor:
        """Logits (R, C, V) of a canvas, of the rows that read it."""
        if bool(read.all()):
            return decoding.denoised(self.model, memory, before, canvas, signal)
        shape, kind = (*canvas.shape, self.vocabulary), decoding.wider(signal.dtype)
        logits = torch.zeros(shape, dtype=kind, device=device_of(self.model.lm_head))
        if not bool(read.any()):
            return logits
        at = read.nonzero()[:, 0].cpu()  # indexes tensors of several devices
        own = decoding.denoised(self.model, memory.select(at), before[at], canvas[at], signal[at])
        return logits.index_copy(0, at.to(own.device), own)

    def unembed(self, hidden: Tensor) -> Tensor:
        return decoding.head(self.model, self.model.model.decoder.norm(hidden))
