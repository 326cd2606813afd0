"""Problems and small methods that tests of this folder share."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import tiny
import torch

from captum_dcam.methods import METHODS, AttributionTask, MethodFacts, PerToken, register_method
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target


def targets(forward, positions=(0, 3), example=0):
    tokens = forward.trajectory.tokens[example].tolist()
    return tuple(Target(f"word {p}", (p,), (tokens[p],)) for p in positions)


def task_of(cache="prefix", positions=(0, 3), seed=0, **settings):
    """A task on the tiny model; the answer's tokens at ``positions``."""
    forward = single(tiny.bound(cache, **settings))
    score = settings.pop("score", "commit")
    return AttributionTask(
        forward, targets(forward, positions), score, torch.Generator().manual_seed(seed)
    )


@contextmanager
def registered(name, **facts):
    """A method that runs one pass a token, or raises what ``fails`` says, while the context is
    open."""
    own = MethodFacts(name, "gradient", "this test", "1", **facts)

    @register_method(name)
    @dataclass(frozen=True)
    class Made(PerToken):
        scale: float = 1.0
        fails: str = ""
        facts: ClassVar[MethodFacts] = own

        def token(self, task: AttributionTask, position: int, token: int):
            logits = task.forward(task.pixels, *task.arguments(position))
            if self.fails:
                raise ValueError(self.fails)
            value = logits[0, position, token].detach() * self.scale
            return tuple(torch.full(shape, float(value)) for shape in task.shapes)

    try:
        yield Made
    finally:
        METHODS.remove(name)
