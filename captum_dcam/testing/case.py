r"""What the checks need to know of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import ConformanceError, InputError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.guard import frozen
from captum_dcam.model.layout import Layout
from captum_dcam.model.words import Target

#: (width, height): square, wide, tall, tiny, large, and ratios that divide nothing
SIZES = (
    (64, 64), (120, 40), (40, 120), (9, 7), (16, 16), (333, 250), (250, 333), (97, 61), (41, 87),
    (512, 300),
)  # fmt: skip

#: tolerance of replayed logits away from the CPU, over the largest logit
ELSEWHERE = 1e-5


@dataclass(frozen=True)
class Reference:
    r"""A generation by the family's own code, S steps of an answer of T tokens.

    Args:
        tokens (Tensor): (B, T) int64. T may be less than the trajectory's, where the family cuts
            its answer; only its T positions are compared.
        logits (sequence of Tensor): of every step (B, T, V), row t predicting response position t;
            NaN where the family computes none.
        canvases (Tensor, optional): (S, B, T), what stood on the canvas before every step.
        commit_step (Tensor, optional): (B, T). Default: counted from ``canvases`` and the mask id
    """

    tokens: Tensor
    logits: Sequence[Tensor]
    canvases: Tensor | None = None
    commit_step: Tensor | None = None


@dataclass(frozen=True)
class AdapterCase:
    r"""One adapter in one mode, small enough to be checked in seconds.

    Args:
        name (str): family and mode, the row of the table.
        make (callable): ``make(dtype)`` → a fresh adapter of a tiny model in evaluation mode; the
            same weights every time.
        reference (callable): ``reference(adapter, request, settings)`` → :class:`Reference`, by the
            family's own ``generate`` on ``adapter.model``. Must not use the adapter's.
        settings (mapping): of the generation: deterministic, several steps and tokens, an answer
            shorter than the image span.
        one_token (mapping): what changes in ``settings`` for an answer of one token.
        shortest (int): positions of that answer, where a canvas cannot have one. Default: 1
        seed (int, optional): of a generator for families that cannot decode without one; the
            reference makes the same one with :meth:`generator`. Default: None, no generator
        prompt, other_prompt (str): two questions of different length.
        conversation (sequence of dict, optional): of several turns. Default: one of three
        picture_size (tuple): (width, height) of ordinary images. Default: (80, 60)
        sizes (tuple): at least eight (width, height) for the layout. Default: :data:`SIZES`
        tolerance (float): largest difference of replayed logits, over the largest logit. Default:
            0, bit for bit
        float64 (callable): context in which the family runs in float64 throughout. Default: none
        no_float64 (str, optional): why it cannot; then gradients are only checked to be there.
        feasible (sequence of int, optional): the calls that hold the image, as the family's facts
            say. Default: as many as the family's own ``generate`` makes
        image_states (callable, optional): ``(adapter, request)`` → (B, N, …), what image tokens
            look like before the first block. Default: what goes into the first block
        source (str): whose code the model is. Default: ``"double"``
    """

    name: str
    make: Callable[[torch.dtype], Adapter]
    reference: Callable[[Adapter, Request, Mapping[str, Any]], Reference]
    settings: Mapping[str, Any]
    one_token: Mapping[str, Any]
    shortest: int = 1
    seed: int | None = None
    prompt: str = "what is this ?"
    other_prompt: str = "is this a red circle ?"
    conversation: Sequence[dict[str, Any]] = (
        {"role": "user", "content": "what is this ?"},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "what colour ?"},
    )
    picture_size: tuple[int, int] = (80, 60)
    sizes: Sequence[tuple[int, int]] = field(default=SIZES, repr=False)
    tolerance: float = 0.0
    float64: Callable[[], AbstractContextManager[Any]] = nullcontext
    no_float64: str | None = None
    feasible: Sequence[int] | None = None
    image_states: Callable[[Adapter, Request], Tensor] | None = None
    source: str = "double"

    def __post_init__(self) -> None:
        if len(set(self.sizes)) < 8:
            raise InputError(f"{self.name} has {len(set(self.sizes))} sizes: expected at least 8")

    def on(self, device: str) -> AdapterCase:
        """The same case with its model on another device.

        Kernels for one row and for several need not round alike there: replayed logits may differ
        by :data:`ELSEWHERE` of the largest.
        """
        made = self.make

        def moved(dtype: torch.dtype) -> Adapter:
            adapter = made(dtype)
            adapter.model.to(torch.device(device))
            return adapter

        name, tolerance = f"{self.name}, {device}", max(self.tolerance, ELSEWHERE)
        return replace(self, name=name, make=moved, tolerance=tolerance)

    def picture(self, seed: int = 0) -> Image.Image:
        """An image of coarse coloured noise."""
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(self.picture_size, Image.Resampling.BICUBIC)

    def generator(self) -> torch.Generator | None:
        """A fresh generator with the case's seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def bound(
        self,
        adapter: Adapter,
        layer: int = 0,
        *,
        keep: bool = True,
        images: Sequence[Sequence[Any]] | None = None,
        prompts: Sequence[Any] | None = None,
        **changes: Any,
    ) -> DenoisingForward:
        """A forward with a bound generation. Default: one image and the prompt"""
        adapter.unverified = False  # all steps are checked, and faults named by the suite
        forward = DenoisingForward(adapter, layer)
        pictures = [[self.picture()]] if images is None else images
        request = adapter.prepare(pictures, [self.prompt] if prompts is None else prompts)
        settings = {**self.settings, **changes}
        forward.generate(request, keep=keep, generator=self.generator(), **settings)
        return forward

    def own(self, adapter: Adapter, request: Request, **changes: Any) -> Reference:
        """The family's own generation of a request. The parameters are frozen as in a replay:
        some kernels round differently while weights ask for gradients."""
        with torch.no_grad(), frozen(adapter.model):
            return self.reference(adapter, request, {**self.settings, **changes})


def expect(condition: bool, message: str) -> None:
    """Raise ConformanceError with ``message`` unless ``condition``."""
    if not condition:
        raise ConformanceError(message)


def explained(forward: DenoisingForward, example: int = 0) -> list[int]:
    """Response positions of an example whose tokens may be explained."""
    stop = forward.adapter.stop_ids
    tokens = forward.trajectory.tokens[example].tolist()
    reads = forward.trajectory.reads
    found = [
        p for p, token in enumerate(tokens) if token not in stop and reads(example, [p], "commit")
    ]
    expect(
        bool(found),
        f"the answer {tokens} has stop tokens, or tokens that never settled, only: give settings, "
        "or a seed of the tiny model, with which it writes something",
    )
    return found


def target_at(forward: DenoisingForward, position: int, example: int = 0) -> Target:
    """The token written at a response position, as a target."""
    token = int(forward.trajectory.tokens[example, position])
    return Target(f"token {token} at {position}", (position,), (token,))


def token_positions(layout: Layout) -> Tensor:
    """(N,) positions of all image tokens in the sequence."""
    return torch.cat([grid.positions.flatten() for grid in layout.grids])
