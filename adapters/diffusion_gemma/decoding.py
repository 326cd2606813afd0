r"""Sampling by the family's own ``generate``, recorded step by step.

``generate`` shows its drafts to a streamer, and nothing else: canvases and self-conditioning are
caught where the decoder is given them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from captum_dcam.adapters.diffusion_gemma.language import capped
from captum_dcam.adapters.diffusion_gemma.states import states_of
from captum_dcam.errors import InputError

#: the library's words for settings of ``generate``
SAME = {"gen_length": "max_new_tokens", "steps": "max_denoising_steps"}
#: settings that ``generate`` acts on; it ignores others without a word
KNOWN = (
    "max_new_tokens",
    "max_denoising_steps",
    "t_min",
    "t_max",
    "entropy_bound",
    "stability_threshold",
    "confidence_threshold",
)
COUNTS = ("max_new_tokens", "max_denoising_steps")


def checked(settings: dict[str, Any], canvas: int) -> dict[str, Any]:
    r"""Settings for ``generate``; raises before any work.

    Args:
        settings (dict): what the caller gave.
        canvas (int): C, tokens of a canvas.
    """
    out = {name: value for name, value in settings.items() if value is not None}
    for ours, theirs in SAME.items():
        if ours in out:
            if theirs in out:
                raise InputError(f"{ours} and {theirs} mean the same: give one of them")
            out[theirs] = out.pop(ours)
    if "temperature" in out:
        raise InputError(
            f"temperature={out['temperature']!r}: the family's falls from t_max to t_min over the "
            "steps: give those (0.8 and 0.4 by default); there is no greedy mode"
        )
    if out.pop("block_length", canvas) != canvas:
        raise InputError(
            f"block_length is {settings['block_length']}: the model's canvas has {canvas} tokens; "
            "leave it out"
        )
    unknown = sorted(out.keys() - set(KNOWN))
    if unknown:
        raise InputError(
            f"unknown settings {unknown}: the family's generate would ignore them without a word; "
            f"known are {', '.join((*SAME, *KNOWN))}"
        )
    for name in COUNTS:
        value = out.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}: expected a whole number of at least 1")
    return out


def check_context(config: Any, prefix: int, settings: dict[str, Any]) -> None:
    """Raise ValueError unless all canvases fit behind a prompt of ``prefix`` tokens."""
    canvas, context = config.canvas_length, config.text_config.max_position_embeddings
    whole = -(-settings.get("max_new_tokens", canvas) // canvas) * canvas
    if prefix + whole > context:
        raise InputError(
            f"the prompt has {prefix} tokens and {whole} are asked for (whole canvases of "
            f"{canvas}), but the model's context is {context}: ask for fewer, or give smaller or "
            "fewer pictures"
        )


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings as ``generate`` takes them."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    out = dict(settings)
    if "entropy_bound" in out:
        bound = EntropyBoundSamplerConfig(entropy_bound=float(out.pop("entropy_bound")))
        out["sampler_config"] = bound
    return out


@torch.no_grad()
def sampled(
    model: Any, input_ids: Tensor, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> Recorder:
    """Run ``model.generate`` and record it; draws from torch's global random state."""
    recorder = Recorder(model)
    with recorder.watching():
        model.generate(
            input_ids=input_ids,
            **inputs,
            **options_of(settings),
            streamer=recorder,
            cache_implementation="dynamic",
            disable_compile=True,
        )
    return recorder


@dataclass
class Recorder(BaseStreamer):
    r"""What one ``generate`` did; a streamer to it, and hooks.

    Attributes:
        canvases (list): for every canvas a list of its steps' ids (B, C) before the step.
        signals (list): the same of the decoder's self-conditioning (B, C, D).
        drafts (list): the same of what the step would have written (B, C).
        sure (list): the same of the drafts' probabilities (B, C), without temperature.
        final (list): (B, C) of every canvas, padded behind the end of the answer.
    """

    model: Any
    canvases: list[list[Tensor]] = field(default_factory=list)
    signals: list[list[Tensor]] = field(default_factory=list)
    drafts: list[list[Tensor]] = field(default_factory=list)
    sure: list[list[Tensor]] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)
    _logits: Tensor | None = None
    _begun: bool = False

    # -- what generate calls ----------------------------------------------------------------------

    def put(self, value: Tensor) -> None:
        """The prompt, then every finished canvas."""
        if self._begun:
            self.final.append(value.to(self.model.device))
        self._begun = True

    def put_draft(self, value: Tensor) -> None:
        """The argmax of a step; of examples that are done, of the step that ended them."""
        assert self._logits is not None
        draft, logits = value.to(self._logits.device), capped(self.model, self._logits)
        odds = logits.gather(-1, draft[..., None])[..., 0] - logits.logsumexp(-1)
        self.drafts[-1].append(draft)
        self.sure[-1].append(odds.exp().float())

    def end(self) -> None:
        """Nothing is open."""

    # -- hooks ----------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the decoder while the context is open."""
        decoder = self.model.model.decoder

        def step(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if len(self.final) == len(self.canvases):
                for kind in (self.canvases, self.signals, self.drafts, self.sure):
                    kind.append([])
            self.canvases[-1].append(kwargs["decoder_input_ids"].clone())

        def signal(_module: Any, args: tuple[Tensor, Tensor]) -> None:
            self.signals[-1].append(args[1].clone())

        def seen(_module: Any, _args: Any, out: Tensor) -> None:
            self._logits = out

        handles = [
            decoder.register_forward_pre_hook(step, with_kwargs=True),
            decoder.self_conditioning.register_forward_pre_hook(signal),
            self.model.lm_head.register_forward_hook(seen),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- the record -------------------------------------------------------------------------------

    def states(self, filler: int) -> tuple[Tensor, Tensor, Tensor]:
        """States of all steps, see :func:`states_of`."""
        canvases, signals = ([torch.stack(c) for c in x] for x in (self.canvases, self.signals))
        return states_of(canvases, signals, torch.cat(self.final, 1), filler)

    @property
    def commits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Commit step, probability there, and last step of every token, each (B, T)."""
        steps, odds, last, first = [], [], [], 0
        for drafts, sure in zip(self.drafts, self.sure, strict=True):
            own = settled(torch.stack(drafts))
            steps.append(own + first)
            odds.append(torch.stack(sure).gather(0, own[None])[0])
            first += len(drafts)
            last.append(torch.full_like(own, first - 1))
        return torch.cat(steps, 1), torch.cat(odds, 1), torch.cat(last, 1)

    def lengths(self, prefix: int) -> tuple[int, ...]:
        """Tokens that the encoder reads: the prompt's, then before every step. Before the first one
        of a later canvas it reads the canvas before."""
        found = [prefix]
        for number, steps in enumerate(self.canvases):
            found += [steps[0].shape[1] if number else 0, *[0] * (len(steps) - 1)]
        return tuple(found)


def settled(drafts: Tensor) -> Tensor:
    """(B, C) first step from which every draft (S, B, C) is the last one."""
    same = (drafts == drafts[-1]).flip(0).cumprod(0)
    return len(drafts) - same.sum(0)
