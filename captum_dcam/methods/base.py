r"""What a method is: a frozen dataclass of settings that makes one map per word of a generation.

Every method, ours or a rival's, gets the same :class:`AttributionTask` and returns an
:class:`Attribution`. Existing implementations are called, not rewritten: a file connects parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from captum_dcam import checks
from captum_dcam.errors import (
    BudgetExhaustedError,
    InputError,
    InputTypeError,
    LayerError,
    MethodError,
)
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import diagnosed
from captum_dcam.model.guard import DRAWING
from captum_dcam.model.norms import BACKWARDS, passing
from captum_dcam.model.sequence import image_positions, split_grids, text_tokens, unkept
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target
from captum_dcam.packages import needed
from captum_dcam.registry import Registry

T = TypeVar("T")

#: what ``MethodFacts.needs`` may hold, and what each means
NEEDS = {
    "gradients": "backward passes",
    "attention": "attention weights",
    "pixel tokens": "which image token every pixel belongs to",
    "grad-cam": "the extra grad-cam",
    "scikit-image": "the extra eval",
    "scikit-learn": "the extra eval",
    "rescaling": "the picture again at other sizes",
}

#: the needs that are packages, by the module that is imported
PACKAGES = {"grad-cam": "pytorch_grad_cam", "scikit-image": "skimage", "scikit-learn": "sklearn"}

#: whose implementation or idea: the order of the table
GROUPS = (
    "Diffusion-CAM",
    "gradient",
    "logit lens",
    "attention",
    "relevance",
    "perturbation",
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
        source (str): the paper, in short.
        passes (str): cost for one token, in passes through the model: ``"1 + 1 back"``.
        needs (tuple of str): keys of :data:`NEEDS`.
        text (bool): gives the relevance of text tokens as well. Default: False
        target_blind (bool): gives all words the same map. Default: False
        stochastic (bool): draws from the task's generator. Default: False
        expensive (bool): takes many passes, so that a budget makes sense. Default: False
        runs_on (tuple of str): kinds of model. Default: both
        foils (bool): takes words with a foil, and explains the difference of their logits.
            Default: False
        own_backward (bool): says itself how its gradients pass through norms. Default: False
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
    foils: bool = False
    own_backward: bool = False

    @property
    def takes_backward(self) -> bool:
        """Whether a task's ``backward`` changes what it finds."""
        return "gradients" in self.needs and not self.own_backward

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
        score (str or int): state whose logits are read: ``commit``, ``final``, ``teacher``, or the
            number of a denoising step.
        generator (torch.Generator): where all random numbers come from.
        backward (str): how gradients pass through norms: ``exact`` or ``constant_norms``, see
            :mod:`captum_dcam.model.norms`. Default: ``"exact"``
    """

    forward: DenoisingForward
    targets: tuple[Target, ...]
    score: Score = "commit"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    backward: str = "exact"

    def __post_init__(self) -> None:
        score = self.forward.trajectory.check_score(self.score)
        object.__setattr__(self, "score", score)
        checks.choice("backward", self.backward, BACKWARDS)
        checks.draws("generator", self.generator)
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

    @property
    def length(self) -> int:
        """L, tokens of the hooked sequence: the prefix and the answer."""
        return self.forward.request.layout.prefix_length + self.forward.trajectory.tokens.shape[1]

    def foil(self, position: int) -> int | None:
        """The token that the word of this task, its only one, is compared with at a position."""
        pairs = (pair for t in self.targets for pair in zip(t.positions, t.foils, strict=True))
        return dict(pairs).get(position)

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
        """Zero maps (N, h, w), one per grid."""
        return tuple(torch.zeros(len(self.targets), *shape) for shape in self.shapes)


@dataclass(frozen=True)
class Attribution:
    r"""What a method found.

    Args:
        maps (tuple of Tensor): (N, h, w), one per grid, float32 on the CPU, with the method's own
            sign and scale: what is positive speaks for the word.
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


def _holding_task(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method of :class:`Method` that holds the task's model while it runs."""

    @wraps(run)
    def held(self: Method, task: AttributionTask) -> Any:
        self.check_foils(task.targets)
        # methods turn gradients off where they need none; under no_grad they would find zeros
        with task.forward.held(), torch.enable_grad(), diagnosed(task.forward):
            with passing(task.backward if self.facts.takes_backward else "exact"):
                return run(self, task)

    return held


class Method(ABC):
    """Base of the registered frozen dataclasses; their fields are the method's settings."""

    name: ClassVar[str] = ""
    facts: ClassVar[MethodFacts]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("attribute", "check"):
            if name in vars(cls):
                setattr(cls, name, _holding_task(vars(cls)[name]))

    @property
    def refines(self) -> bool:
        """Whether its maps come refined, as a preset's do: no refinement is put upon them."""
        return False

    @abstractmethod
    def attribute(self, task: AttributionTask) -> Attribution:
        """Maps of all targets of a task."""

    def check(self, task: AttributionTask) -> None:
        """Raise before any work if the method cannot run on this model or generation."""
        self.check_foils(task.targets)
        self.check_packages()
        if "pixel tokens" in self.facts.needs:
            task.forward.adapter.pixel_tokens(task.forward.request)

    def check_foils(self, targets: Sequence[Target]) -> None:
        """Raise MethodError for words with a foil, unless the method takes them."""
        found = [t.text for t in targets if t.foil_ids is not None]
        if found and not self.facts.foils:
            known = ", ".join(sorted(n for n, c in METHODS.items() if c.facts.foils))
            raise MethodError(
                f"method {self.name!r} differentiates no difference of logits, and {found[0]!r} "
                f"has a foil: leave the foil out, or choose one of {known}"
            )

    def check_packages(self) -> None:
        """Raise MissingPackageError for a package that the method needs and that is not there."""
        for need in self.facts.needs:
            if need in PACKAGES:
                needed(PACKAGES[need], f"method {self.name!r}")

    def describe(self) -> dict[str, Any]:
        """A JSON-able record: the name and the settings."""
        record: dict[str, Any] = {"name": self.name}
        for one in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, one.name)
            record[one.name] = list(value) if isinstance(value, tuple) else checks.plain(value)
        return record


#: maps (h, w) of a word, one per grid, and the relevance (K,) of text tokens, if any
WordMaps = tuple[tuple[Tensor, ...], Tensor | None]
#: (response position, token id, its foil's or None) to the values of that token
TokenValues = Callable[[int, int, int | None], Tensor]


class PerWord(Method):
    r"""A method that explains one word at a time; what all words need is read once.

    A budget that ends inside a word leaves the words before it.
    """

    def reader(self, task: AttributionTask) -> Any:
        """What all words need, read when the first of them needs it."""
        return None

    @abstractmethod
    def word(self, task: AttributionTask, reader: Any, target: Target) -> WordMaps:
        """What is found of one word; may raise BudgetExhaustedError."""

    def attribute(self, task: AttributionTask) -> Attribution:
        maps, reader, count = task.empty(), self.reader(task), len(task.targets)
        done, note = torch.zeros(count, dtype=torch.bool), ""
        text = torch.zeros(count, len(text_tokens(task.forward))) if self.facts.text else None
        for n, target in enumerate(task.targets):
            try:
                found, relevance = self.word(task, reader, target)
            except BudgetExhaustedError as error:
                note = str(error)
                break
            for whole, own in zip(maps, found, strict=True):
                whole[n] = own
            if text is not None and relevance is not None:
                text[n] = relevance
            done[n] = True
        return Attribution(maps, done, text, note)


class PerToken(PerWord):
    r"""A method that explains one token at a time and gives no relevance of text.

    The map of a word of several tokens is the sum of their maps, each token read at its own step
    (Eq. 2 of Diffusion-CAM).
    """

    @abstractmethod
    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        """Signed maps (h, w), one per grid, of the logit of ``token`` at response ``position``,
        less that of :meth:`AttributionTask.foil` there."""

    def attribute(self, task: AttributionTask) -> Attribution:
        return replace(super().attribute(task), text=None)

    def word(self, task: AttributionTask, reader: None, target: Target) -> WordMaps:
        alone = replace(task, targets=(target,))
        parts = [self.token(alone, *pairs_of(part)[0]) for part in target.parts]
        return tuple(_total(same) for same in zip(*parts, strict=True)), None


class PerPosition(PerWord):
    r"""A method that finds a value at every position of the sequence, image and text alike.

    The values of a word of several tokens are the sum of theirs (Eq. 2 of Diffusion-CAM).
    """

    @abstractmethod
    def reader(self, task: AttributionTask) -> TokenValues:
        """(response position, token id, foil's) to the values (L,) of every position."""

    def word(self, task: AttributionTask, reader: TokenValues, target: Target) -> WordMaps:
        values = _total([reader(*pairs_of(part)[0], part.foils[0]) for part in target.parts])
        maps = split_grids(values[image_positions(task.forward)], task.forward)
        return maps, values[text_tokens(task.forward).positions] if self.facts.text else None


def against(logits: Tensor, foil: int | None) -> Tensor:
    """Logits (…, V) less the foil's, so that a token's is the difference; as they are without."""
    return logits if foil is None else logits - logits[..., foil, None]


def pairs_of(target: Target) -> list[tuple[int, int]]:
    """(response position, token id) of every token of a word."""
    return list(zip(target.positions, target.token_ids, strict=True))


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.detach().float().cpu() for p in parts]).sum(0)


def check_counts(method: Method, *names: str, optional: str = "") -> None:
    """Raise for settings that are not whole numbers of at least 1; ``optional`` may be None."""
    for name in names:
        value = getattr(method, name)
        if value is None and name == optional:
            continue
        object.__setattr__(method, name, checks.whole(name, value))


def check_choices(method: Method, **known: Collection[str]) -> None:
    """Raise for settings that are none of their known values."""
    for name, values in known.items():
        checks.choice(name, getattr(method, name), values)


#: method name → class; ``@register_method("name")`` stands above ``@dataclass(frozen=True)``
METHODS: Registry[type[Method]] = Registry(
    "method",
    named=True,
    aliases={  # written as `folded` writes them
        "dcam": "diffusion_cam",
        "gradcam": "layer_grad_cam",
        "gradcam++": "pgc_gradcam_plus_plus",
        "eigencam": "pgc_eigencam",
        "layercam": "pgc_layercam",
        "hirescam": "pgc_hirescam",
        "xgradcam": "pgc_xgradcam",
        "ablationcam": "pgc_ablationcam",
        "ig": "integrated_gradients",
        "layerig": "layer_integrated_gradients",
        "gradxinput": "input_x_gradient",
        "smoothgrad": "noise_tunnel",
        "shapley": "shapley_value_sampling",
        "rollout": "attention_rollout",
        "lens": "logit_lens",
    },
    listed="captum-dcam compare --list-methods",
)
register_method = METHODS.register
#: ``method("tam", eci=False)``: a method by its name, with fields of its class as settings
method: Callable[..., Method] = METHODS.get


M = TypeVar("M", bound=type[Method])


@dataclass_transform(frozen_default=True)
def entered(
    name: str, label: str, group: str, source: str, passes: str, *needs: str, **facts: Any
) -> Callable[[M], M]:
    r"""Decorator that enters a class as a frozen dataclass with its facts.

    Args:
        name (str): of the method.
        label, group, source, passes, needs, facts: as in :class:`MethodFacts`.
    """

    def enter(cls: M) -> M:
        cls.facts = MethodFacts(label, group, source, passes, needs, **facts)
        register_method(name)(dataclass(frozen=True)(cls))
        return cls

    return enter


def method_names() -> tuple[str, ...]:
    """All names, in the order of the table: group after group."""
    return tuple(sorted(METHODS, key=lambda name: GROUPS.index(METHODS[name].facts.group)))


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's and numpy's global random state from ``generator``, and restore it afterwards.

    For implementations that draw from the global state.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    with DRAWING, torch.random.fork_rng():
        numpy_state = np.random.get_state()
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
        tuple of Tensor: maps (h, w) float32, one per grid; 0 where a token owns no pixel.
    """
    count = sum(h * w for h, w in shapes)
    flat, at = values.detach().float().cpu().flatten(), owners.cpu().expand_as(values).flatten()
    inside = at >= 0
    total = torch.zeros(count).index_add_(0, at[inside], flat[inside])
    number = torch.zeros(count).index_add_(0, at[inside], torch.ones_like(flat[inside]))
    means = total / number.clamp_min(1)
    parts = means.split([h * w for h, w in shapes])
    return tuple(p.view(shape) for p, shape in zip(parts, shapes, strict=True))


class Replays(Generic[T]):
    r"""The calls of one example's generation, computed again for methods that look into the blocks.

    The prefill runs once, each step from a copy of its cache.

    Args:
        forward (DenoisingForward): bound, batch 1.
        watch (callable): gives the context that is open during every call; it yields what is seen.
            It must not refer to the reading's owner: a circle would keep graphs in memory.
    """

    def __init__(
        self, forward: DenoisingForward, watch: Callable[[], AbstractContextManager[T]]
    ) -> None:
        self.forward, self._watch = unkept(forward), watch
        self._prefix: tuple[Any, T] | None = None
        self._last: tuple[int, Tensor, T] | None = None

    def prefix(self) -> tuple[Any, T]:
        """The prefill's memory and what was seen of it."""
        if self._prefix is None:
            with self._watch() as seen:
                memory = self.forward.prefill()
            self._prefix = memory, seen
        return self._prefix

    def step(self, step: int) -> tuple[Tensor, T]:
        """Logits (T, V) of a step and what was seen of it; only the last step is kept."""
        if self._last is None or self._last[0] != step:
            self._last = None  # frees the graph of the step before
            memory, _ = self.prefix()
            example, device = torch.tensor([0]), self.forward.request.pixels.device
            with self._watch() as seen:
                # select() copies: a cache that grows in place would grow with every step
                own = self.forward.adapter.select(memory, example.to(device))
                logits = self.forward.step(own, example, torch.tensor([step]))
            self._last = step, logits[0], seen
        return self._last[1:]


def check_block(adapter: Adapter, block: int) -> int:
    """A block's index from 0; unlike the tapped one, the last block may be read."""
    count = len(adapter.blocks)
    if checks.as_whole(block) is None:
        raise InputTypeError(f"block is {block!r}: expected a block's number, 0 to {count - 1}")
    if not -count <= block < count:
        raise LayerError(
            f"block {block} is not in the model: {adapter.family} has {count} blocks, 0 to "
            f"{count - 1}, or -1 for the last"
        )
    return block % count
