r"""What a method is: settings in a frozen dataclass, a bound generation in, one map a word out.

Every method, ours or a rival's, gets the same :class:`AttributionTask` and returns an
:class:`Attribution`. Existing implementations are called, not rewritten; a file here is wiring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError, InputError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target
from captum_dcam.registry import Registry

#: what ``MethodFacts.needs`` may hold, and what each means
NEEDS = {
    "gradients": "backward passes",
    "attention": "attention weights",
    "pixel tokens": "which image token every pixel belongs to",
    "grad-cam": "the extra grad-cam",
    "rescaling": "the picture again at other sizes",
}

#: whose implementation or idea: the order of the table
GROUPS = (
    "Diffusion-CAM",
    "gradient",
    "logit lens",
    "attention",
    "relevance",
    "Captum, layer",
    "Captum, pixels",
    "pytorch-grad-cam",
)


@dataclass(frozen=True)
class MethodFacts:
    r"""What a reader of the method table wants to know.

    Args:
        label (str): as its authors write it.
        group (str): one of :data:`GROUPS`.
        source (str): the paper, shortly.
        passes (str): cost for one token, in passes through the model: ``"1 + 1 back"``.
        needs (tuple of str): keys of :data:`NEEDS`.
        text (bool): gives relevance of text tokens as well. Default: False
        target_blind (bool): one map whatever the word. Default: False
        stochastic (bool): draws from the task's generator. Default: False
        expensive (bool): so many passes that a budget makes sense. Default: False
        runs_on (tuple of str): kinds of model. Default: both
    """

    label: str
    group: str
    source: str
    passes: str
    needs: tuple[str, ...] = ()
    text: bool = False
    target_blind: bool = False
    stochastic: bool = False
    expensive: bool = False
    runs_on: tuple[str, ...] = ("dMLLM", "AR")

    def __post_init__(self) -> None:
        unknown = set(self.needs) - NEEDS.keys()
        if unknown:
            raise InputError(f"{self.label} needs {sorted(unknown)}: known are {sorted(NEEDS)}")
        if self.group not in GROUPS:
            raise InputError(f"{self.label} is of group {self.group!r}: known are {GROUPS}")


@dataclass(frozen=True)
class AttributionTask:
    r"""What every method is given: a bound generation of one example, and words of its answer.

    Args:
        forward (DenoisingForward): batch 1, tapped; see :func:`single`.
        targets (tuple of Target): N words.
        score (str): state whose logits are read: ``commit``, ``final`` or ``teacher``.
        generator (torch.Generator): all randomness.
    """

    forward: DenoisingForward
    targets: tuple[Target, ...]
    score: str = "commit"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        if self.forward.request.batch != 1:
            raise InputError(
                "a task is one example: narrow the forward with single(forward, example)"
            )

    @property
    def pixels(self) -> Tensor:
        """(1, …), what Captum calls ``inputs``."""
        return self.forward.request.pixels

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of every grid of image tokens."""
        return self.forward.request.layout.shapes

    def step(self, position: int) -> int:
        """The step at which the score reads a response position."""
        return self.forward.trajectory.step_of(0, position, self.score)

    def arguments(self, position: int) -> tuple[Tensor, ...]:
        """Captum's ``additional_forward_args`` for a token at a response position."""
        state = self.forward.trajectory.state_at(
            torch.tensor([0]), torch.tensor([self.step(position)])
        )
        return (*self.forward.request.extras, *state)

    def empty(self) -> tuple[Tensor, ...]:
        """Zero maps (N, h, w), one a grid."""
        return tuple(torch.zeros(len(self.targets), *shape) for shape in self.shapes)


@dataclass(frozen=True)
class Attribution:
    r"""What a method found.

    Args:
        maps (tuple of Tensor): one (N, h, w) a grid, float32 on the CPU, with the method's own sign
            and scale: what is positive speaks for the word.
        done (Tensor): (N,) bool; False where the budget ended before the word's map was complete
            (its map is then zero, or an estimate if ``note`` says so).
        text (Tensor, optional): (N, K) relevance of the K tokens of
            :func:`captum_dcam.model.sequence.text_tokens`, on the scale of the maps.
        note (str): what a reader must know. Default: empty
    """

    maps: tuple[Tensor, ...]
    done: Tensor
    text: Tensor | None = None
    note: str = ""


class Method(ABC):
    """Base of the registered frozen dataclasses; their fields are the method's settings."""

    name: ClassVar[str] = ""
    facts: ClassVar[MethodFacts]

    @abstractmethod
    def attribute(self, task: AttributionTask) -> Attribution:
        """Maps of all targets of a task."""

    def check(self, task: AttributionTask) -> None:
        """Raise before any work when the method cannot run on this model or generation."""
        if "pixel tokens" in self.facts.needs:
            task.forward.adapter.pixel_tokens(task.forward.request)

    def describe(self) -> dict[str, Any]:
        """A JSON-able record: the name and the settings."""
        record: dict[str, Any] = {"name": self.name}
        for one in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, one.name)
            record[one.name] = list(value) if isinstance(value, tuple) else value
        return record


class PerToken(Method):
    r"""A method that explains one token at a time.

    The map of a word of several tokens is the sum of their maps, each token read at its own step
    (Eq. 2 of Diffusion-CAM). A budget that ends inside a word leaves the words before it.
    """

    @abstractmethod
    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        """Signed maps (h, w), one a grid, of the logit of ``token`` at response ``position``."""

    def attribute(self, task: AttributionTask) -> Attribution:
        maps = task.empty()
        done = torch.zeros(len(task.targets), dtype=torch.bool)
        for n, target in enumerate(task.targets):
            try:
                parts = [
                    self.token(task, position, token)
                    for position, token in zip(target.positions, target.token_ids, strict=True)
                ]
            except BudgetExhaustedError as error:
                return Attribution(maps, done, note=str(error))
            for whole, *own in zip(maps, *parts, strict=True):
                whole[n] = torch.stack([p.detach().float().cpu() for p in own]).sum(0)
            done[n] = True
        return Attribution(maps, done)


#: method name → class; ``@register_method("name")`` stands above ``@dataclass(frozen=True)``
METHODS: Registry[type[Method]] = Registry("method", named=True)
register_method = METHODS.register
#: ``method("tam", eci=False)``: a method by its name, with fields of its class as settings
method: Callable[..., Method] = METHODS.get


def method_names() -> tuple[str, ...]:
    """All names, in the order of the table: group after group."""
    return tuple(sorted(METHODS, key=lambda name: GROUPS.index(METHODS[name].facts.group)))


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Global random state drawn from ``generator`` inside, as before afterwards.

    For implementations that draw from torch's and numpy's global state.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def noise(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a tensor's shape, device and dtype, drawn in float32 on the generator's
    device."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device)
    return (std * drawn).to(like.device, like.dtype)


def pooled_pixels(values: Tensor, owners: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple:
    r"""Mean of pixel attributions over the pixels of each image token.

    Args:
        values (Tensor): (1, …) attribution of every element of the pixel tensor.
        owners (Tensor): (1, …) int64 from ``adapter.pixel_tokens``: token of every element, -1 for
            none.
        shapes (sequence): (h, w) of every grid.

    Returns:
        tuple of Tensor: maps (h, w) float32, one a grid; 0 where a token owns no pixel.
    """
    count = sum(h * w for h, w in shapes)
    flat, at = values.detach().float().cpu().flatten(), owners.cpu().expand_as(values).flatten()
    inside = at >= 0
    total = torch.zeros(count).index_add_(0, at[inside], flat[inside])
    number = torch.zeros(count).index_add_(0, at[inside], torch.ones_like(flat[inside]))
    means = total / number.clamp_min(1)
    parts = means.split([h * w for h, w in shapes])
    return tuple(p.view(shape) for p, shape in zip(parts, shapes, strict=True))
