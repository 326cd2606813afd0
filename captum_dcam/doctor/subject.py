"""Whom the checks look at: a model, one question, and what was found so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_dcam.explaining import explain_generation
from captum_dcam.methods.meter import Cost, free_memory, metered
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.prompts import Prompt
from captum_dcam.model.tagging import DEFAULT_TAGGER, NOUN_TAGS, tag
from captum_dcam.model.words import Target, words_of
from captum_dcam.results.explanation import Explanation
from captum_dcam.testing.case import target_at

T = TypeVar("T")
#: types in which differences of logits are coarse
HALF = (torch.bfloat16, torch.float16)
#: what a line says that trained weights alone could decide
RANDOM = "random weights"
#: memory for a copy of weights, over its own: activations need some, too
MARGIN = 1.25
#: words that are looked at where each costs passes
WORDS = 8


class Unjudged(Exception):
    """A check cannot judge; its text says why."""


@dataclass
class Subject:
    r"""A model and one question.

    Args:
        adapter (Adapter): of the model.
        images (list): of the question.
        prompt (str or list of dict): the question.
        layer (int, optional): block that was asked for. Default: the recommended one
        seed (int): of everything that is drawn.
        settings (mapping): of the generation.
    """

    adapter: Adapter
    images: list[Any]
    prompt: Prompt
    layer: int | None
    seed: int
    settings: Mapping[str, Any]
    #: block that is explained: the one that was asked for, where that is usable
    block: int | None = None
    _known: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> nn.Module:
        return self.adapter.model

    @property
    def generator(self) -> torch.Generator:
        """A fresh one with the seed."""
        return torch.Generator().manual_seed(self.seed)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What ``compute`` gives, which is called once; Unjudged where it has failed before."""
        if name not in self._known:
            self._known[name] = None
            self._known[name] = (compute(),)
        if self._known[name] is None:
            raise Unjudged(f"there is no {name}")
        found: T = self._known[name][0]
        return found

    @property
    def request(self) -> Request:
        """The question as the model's input."""
        return self.once("request", lambda: self.adapter.prepare([self.images], [self.prompt]))

    @property
    def forward(self) -> DenoisingForward:
        """With the answer that the model wrote."""
        return self.once("answer", self._generated)

    def _generated(self) -> DenoisingForward:
        """The model's answer, without the check of its replay, which has a line of its own."""
        adapter = self.adapter
        before, adapter.unverified = adapter.unverified, False
        try:
            forward = DenoisingForward(adapter, self.block)
            forward.generate(self.request, generator=self.generator, **self.settings)
        finally:
            adapter.unverified = before
        return forward

    @property
    def positions(self) -> list[int]:
        """Response positions whose tokens may be explained."""
        stop = self.adapter.stop_ids
        tokens = self.forward.trajectory.tokens[0].tolist()
        return [p for p, token in enumerate(tokens) if token not in stop]

    @cached_property
    def words(self) -> tuple[Target, ...]:
        """The answer's words; of an answer without any its tokens."""
        found = words_of(self.adapter, self.forward.trajectory.tokens[0].tolist())
        found = found or tuple(target_at(self.forward, p) for p in self.positions)
        if not found:
            raise Unjudged("the answer has no token to explain")
        return found

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The words that are looked at closely: the first nouns, else the first of all."""
        tags = tag([w.text for w in self.words], DEFAULT_TAGGER)
        named = [w for w, t in zip(self.words, tags, strict=True) if t in NOUN_TAGS]
        return tuple((named or self.words)[:WORDS])

    @property
    def token(self) -> Target:
        """The last token of the first of these words, whose own step commits it."""
        word = self.targets[0]
        return replace(word, positions=word.positions[-1:], token_ids=word.token_ids[-1:])

    @property
    def explained(self) -> tuple[Explanation, Cost, Cost]:
        """All words' explanation by the default preset, and what one word and all of them cost."""
        return self.once("explanation", self._explained)

    def _explained(self) -> tuple[Explanation, Cost, Cost]:
        _, one = self._metered(self.targets[:1])
        found, every = self._metered(self.words)
        return found, one, every

    def _metered(self, words: tuple[Target, ...]) -> tuple[Explanation, Cost]:
        again = self.forward.again()
        with metered(again) as cost:
            found = explain_generation(again, words)
        return found, cost

    @cached_property
    def trained(self) -> bool:
        r"""Whether the weights were trained: gains of norms begin as one number, and then differ.

        A model without such gains counts as trained.
        """
        gains = [
            p
            for block in self.adapter.blocks
            for n, p in block.named_parameters()
            if n.endswith("weight") and p.ndim == 1 and len(p) > 1 and not p.is_meta
        ]
        return not gains or any(bool((g != g[0]).any()) for g in gains)

    @contextmanager
    def widened(self) -> Iterator[DenoisingForward]:
        r"""The same answer with the model in float32; its weights are as before, bit for bit, when
        the context ends.

        Raises:
            Unjudged: quantised or offloaded weights, or too little memory; says how much.
        """
        forward, model, held = self.forward, self.model, {}
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF]
        odd = [type(t).__name__ for t in tensors if type(t) not in (Tensor, nn.Parameter)]
        if odd or any(t.is_meta or not t.is_floating_point() for t in model.parameters()):
            raise Unjudged("quantised or offloaded weights have no copy in float32")
        need, free = sum(2 * t.numel() for t in tensors), free_memory(self.adapter.device)
        if free is not None and need * MARGIN > free:
            raise Unjudged(
                f"float32 needs {need / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free"
            )
        with self.adapter.lock:
            try:
                for tensor in tensors:
                    held[tensor] = tensor.dtype
                    tensor.data = tensor.data.float()
                request = self.adapter.prepare([self.images], [self.prompt])
                trajectory = replace(forward.trajectory, kept={})
                yield forward.again(request=request, trajectory=trajectory)
            finally:
                for tensor, dtype in held.items():
                    tensor.data = tensor.data.to(dtype)  # exact: it came from this type
