r"""What Captum's methods have in common: a token in Captum's terms, baselines, groups of tokens.

Captum draws noise in float32 and subtracts logits, so its methods get float32 pixels and float32
logits around a model of any type: a thin function casts on the way in and on the way out. What
they get is a copy of the pixels, because Captum marks what it is given as requiring gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from captum.attr import Attribution, GradientAttribution
from torch import Tensor
from typing_extensions import dataclass_transform

from captum_dcam import checks
from captum_dcam.methods.base import (
    AttributionTask,
    Method,
    PerToken,
    against,
    check_choices,
    check_counts,
    entered,
    seeded,
)
from captum_dcam.model.tap import wide

#: what stands for "no image"
BASELINES = ("mean", "zero")
#: settings that count something
_COUNTS = ("steps", "samples", "permutations", "batch", "patch", "stride")
#: settings that are a size
_SIZES = {"std", "alpha"}


@dataclass(frozen=True)
class CaptumArguments:
    r"""One token of a task, as Captum wants it.

    Args:
        task (AttributionTask): where it comes from.
        target (tuple): (position, token).
    """

    task: AttributionTask
    target: tuple[int, int]

    @cached_property
    def pixels(self) -> Tensor:
        """(1, …), a copy in float32 (float64 stays)."""
        return wide(self.task.pixels.detach()).clone()

    def forward(self, pixels: Tensor, *arguments: Tensor) -> Tensor:
        """Float32 pixels, extras and state to float32 logits (B, T, V), less the foil's."""
        logits = wide(self.task.forward(pixels.to(self.task.pixels.dtype), *arguments))
        return against(logits, self.task.foil(self.target[0]))

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Extras and state of the token's step."""
        return self.task.arguments(self.target[0])

    @property
    def owners(self) -> Tensor:
        """Which image token every element of the pixel tensor belongs to, -1 for none."""
        return pixel_owners(self.task)


def pixel_owners(task: AttributionTask) -> Tensor:
    """``adapter.pixel_tokens`` of the task's request, on the pixels' device."""
    request = task.forward.request
    owners = task.forward.adapter.pixel_tokens(request).to(request.pixels.device)
    return owners.expand_as(request.pixels)


def as_tuple(values: Any) -> tuple[Tensor, ...]:
    """Captum gives a tensor for one grid and a tuple for several: always a tuple."""
    return values if isinstance(values, tuple) else (values,)


def attributed(made: Attribution, inputs: Any, **call: Any) -> Any:
    r"""What a Captum object attributes; the object is empty afterwards.

    Some of Captum's objects refer to themselves, and would keep the forward and all its
    activations alive until Python looks for cycles.
    """
    try:
        return made.attribute(inputs, **call)
    finally:
        for part in (*vars(made).values(), made):
            if isinstance(part, Attribution):
                vars(part).clear()


def check_settings(method: Method) -> None:
    """Raise ValueError for settings that cannot work; they mean the same wherever they occur."""
    names = [f.name for f in fields(method)]  # type: ignore[arg-type]  # subclasses are dataclasses
    check_counts(method, *(name for name in names if name in _COUNTS))
    for name in _SIZES.intersection(names):
        value = getattr(method, name)
        object.__setattr__(method, name, checks.real(name, value, above=True))
    if "baseline" in names:
        check_choices(method, baseline=BASELINES)


class CaptumMethod(PerToken):
    r"""A Captum class and how to call it; settings that several methods have are checked here.

    A subclass is entered by :func:`captum_method`. It says in :meth:`maps` how attributions become
    maps, and in ``passed`` what Captum calls its settings.
    """

    algorithm: ClassVar[type]
    group: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()  #: what it needs besides gradients
    passed: ClassVar[dict[str, str]] = {}
    baseline: str  # a setting of those that have one; no field of the others

    def __post_init__(self) -> None:
        check_settings(self)

    def build(self, case: CaptumArguments) -> Any:
        """The Captum object."""
        return self.algorithm(case.forward)

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        """Arguments of its ``attribute`` besides the inputs."""
        given = {"target": case.target, "additional_forward_args": case.arguments}
        given |= {theirs: getattr(self, own) for own, theirs in self.passed.items()}
        return given | ({"baselines": self.emptied(case)} if hasattr(self, "baseline") else {})

    def values(self, case: CaptumArguments) -> Any:
        """What Captum returns."""
        return attributed(self.build(case), case.pixels, **self.call(case))

    @abstractmethod
    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        """One map (h, w) per grid from it."""

    def emptied(self, case: CaptumArguments) -> Tensor:
        """The baseline image of the setting ``baseline``."""
        return baseline_of(case, self.baseline, "pixel tokens" in self.facts.needs)

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        case = CaptumArguments(task, (position, token))
        if self.by_gradient() and "pixel tokens" in self.facts.needs:
            case.pixels.requires_grad_()  # Captum warns about inputs that do not
        with seeded(task.generator) if self.facts.stochastic else nullcontext():
            return self.maps(self.values(case), case)

    @classmethod
    def by_gradient(cls) -> bool:
        """Whether Captum counts the class among the gradient methods."""
        return issubclass(cls.algorithm, GradientAttribution)


C = TypeVar("C", bound=type[CaptumMethod])


@dataclass_transform(frozen_default=True)
def captum_method(
    name: str, algorithm: type, source: str, passes: str, *, label: str = "", **facts: Any
) -> Callable[[C], C]:
    r"""Decorator that enters a :class:`CaptumMethod` as a frozen dataclass with its facts.

    Args:
        name (str): of the method.
        algorithm (type): Captum's class.
        source, passes, label, facts: as in :class:`captum_dcam.methods.base.MethodFacts`.
            Default label: the name of Captum's class
    """

    def enter(cls: C) -> C:
        cls.algorithm = algorithm
        needs = (*(("gradients",) if cls.by_gradient() else ()), *cls.reads)
        known = label or algorithm.__name__, cls.group, source, passes
        return entered(name, *known, *needs, **{"foils": cls.by_gradient(), **facts})(cls)

    return enter


@dataclass(frozen=True)
class PathMethod(CaptumMethod):
    """Integrates gradients along a straight line of images from a baseline to the image."""

    steps: int = 16
    baseline: str = "mean"
    batch: int = 4

    passed: ClassVar[dict[str, str]] = {"steps": "n_steps", "batch": "internal_batch_size"}


@dataclass(frozen=True)
class ShapMethod(CaptumMethod):
    """Mean gradient at random points between a baseline and the image with noise."""

    samples: int = 8
    std: float = 0.1
    baseline: str = "mean"
    batch: int = 4

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return super().call(case) | {"stdevs": spread(case, self.std)}

    def values(self, case: CaptumArguments) -> Any:
        # Captum runs all samples at once; a mean of parts bounds the memory.
        found = []
        for start in range(0, self.samples, self.batch):
            count = min(self.batch, self.samples - start)
            values = attributed(self.build(case), case.pixels, **self.call(case), n_samples=count)
            found.append([v.detach() * (count / self.samples) for v in as_tuple(values)])
        return tuple(torch.stack(same).sum(0) for same in zip(*found, strict=True))


def spread(case: CaptumArguments, part: float) -> float:
    """A standard deviation as a fraction of the range of the pixels' values."""
    return part * float(case.pixels.detach().max() - case.pixels.detach().min())


def baseline_of(case: CaptumArguments, kind: str, owned: bool = True) -> Tensor:
    r"""The image without content, like ``case.pixels``.

    Args:
        case (CaptumArguments): whose pixels.
        kind (str): ``zero``: 0, whatever that is before normalisation. ``mean``: the mean colour,
            over rows and columns of each channel of each image; where pixels do not lie in rows
            and columns, over the axes along which the token changes.
        owned (bool): pixels that belong to no token (padding) stay as they are. ``zero`` alone can
            do without knowing them. Default: True
    """
    pixels = case.pixels.detach()
    if kind == "zero" and not owned:
        return torch.zeros_like(pixels)
    owners = case.owners
    inside = owners >= 0
    if kind == "zero":
        return pixels.masked_fill(inside, 0)
    if token_size(owners, case.task.shapes) is not None:
        axes = [-2, -1]
    else:
        axes = [d for d in range(1, owners.ndim) if bool((owners.diff(dim=d) != 0).any())]
    total = (pixels * inside).sum(axes, keepdim=True)
    mean = total / inside.sum(axes, keepdim=True).clamp_min(1)
    return torch.where(inside, mean, pixels)


def groups_of(shapes: Sequence[tuple[int, int]], patch: int) -> Tensor:
    r"""Group (N,) int64 of every image token, grid after grid.

    A group is a square of ``patch`` tokens per side. Groups at the right and lower edge are smaller
    where the grid is not a multiple.
    """
    found, first = [], 0
    for h, w in shapes:
        wide = -(-w // patch)
        own = (torch.arange(h) // patch)[:, None] * wide + torch.arange(w) // patch
        found.append(own.flatten() + first)
        first += -(-h // patch) * wide
    return torch.cat(found)


def token_size(owners: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    r"""Height and width of the largest image token in pixels; None where pixels are not an image.

    Pixels are an image where the token's row depends on the second-last axis alone and its column
    on the last, in every slice (an image, tile or channel).
    """
    if owners.ndim < 3:
        return None
    h, w = owners.shape[-2:]
    places = [
        torch.cartesian_prod(torch.tensor([i]), torch.arange(a), torch.arange(b))
        for i, (a, b) in enumerate(shapes)
    ]
    slices = owners.cpu().reshape(-1, h, w)
    inside = slices >= 0
    grid, row, column = torch.cat(places).T[:, slices.clamp_min(0)]
    lines = _constant(row, inside, (2,)) and _constant(column, inside, (1,))
    if not (lines and _constant(grid, inside, (1, 2))):
        return None
    return _longest(row, inside, 2), _longest(column, inside, 1)


def _constant(values: Tensor, inside: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether ``values`` do not change along axes, where they count."""
    low = values.masked_fill(~inside, torch.iinfo(values.dtype).max).amin(axes)
    high = values.masked_fill(~inside, -1).amax(axes)
    return bool(((low == high) | (high < 0)).all())


def _longest(values: Tensor, inside: Tensor, along: int) -> int:
    """The most pixels that one row (column) of tokens takes; ``along`` the other axis."""
    line = values.masked_fill(~inside, -1).amax(along)
    return max(int(row[row >= 0].bincount().max()) for row in line if bool((row >= 0).any()))
