r"""What a refinement is: a small frozen object that turns maps into maps.

Pure functions do the work and take everything as explicit arguments, so that they also run on
Captum's and pytorch-grad-cam's maps. The objects hold a function's settings, so that they can be
composed, looked up by name and written into a result; what belongs to one request (how many
denoising steps, how large the image, which maps the repeated words have) comes in a
:class:`RefineContext`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from captum_dcam.checks import plain, whole
from captum_dcam.errors import InputError
from captum_dcam.refine.checks import (
    Check,
    check_count,
    check_features,
    check_image_size,
    check_maps,
    check_settings,
)
from captum_dcam.registry import Registry

_Value = TypeVar("_Value")

_MEANINGS = {
    "steps": "the number of denoising steps S of the answer",
    "image_size": "the image's (height, width) in pixels",
    "repeated_maps": "the maps of the repeated function words",
    "features": "the states of the image tokens at the tapped block, (D, H, W)",
}
#: contexts that hold it, for the message where it is missing
_EXAMPLES = {
    "features": "captum_dcam.maps.contexts_of(forward)[0], or RefineContext(features=states)",
}
#: what a stage may need of a :class:`RefineContext`: the names of its fields
EVERYTHING = frozenset(_MEANINGS)


@dataclass(frozen=True, eq=False)
class RefineContext:
    r"""What refinements may need to know of a request beyond its maps.

    Args:
        steps (int, optional): number of denoising steps S. AKD needs it. Default: None
        image_size (tuple[int, int], optional): image (height, width) in pixels. AKD needs it.
            Default: None
        repeated_maps (Tensor, optional): M_rep of SICD, broadcastable to the maps, non-negative
            and on the maps' own scale. Default: None
        features (Tensor, optional): states of the grid's image tokens at the tapped block, (D, h,
            w), or (R, D, h, w) for maps (R, ..., h, w). Affinity needs them. Default: None
        shares (Tensor, optional): share of the picture that each token shows, (h, w), on any
            scale, see :attr:`captum_dcam.model.layout.Layout.shares`. Default: all alike
        picture (int, optional): which image of the request the grid shows. Default: 0

    Raises:
        TypeError, ValueError: a value of the wrong kind, with what is expected.
    """

    steps: int | None = None
    image_size: tuple[int, int] | None = None
    repeated_maps: Tensor | None = None
    features: Tensor | None = None
    shares: Tensor | None = None
    picture: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count(self.steps, "RefineContext", "steps", _MEANINGS["steps"])
        if self.image_size is not None:
            check_image_size(self.image_size, "RefineContext")
        if self.repeated_maps is not None:
            check_maps(self.repeated_maps, "RefineContext", name="repeated_maps")
        if self.features is not None:
            check_features(self.features, "RefineContext")
        if self.shares is not None:
            check_maps(self.shares, "RefineContext", name="shares")
        object.__setattr__(self, "picture", whole("RefineContext: `picture`", self.picture, 0))


@runtime_checkable
class Refinement(Protocol):
    r"""Maps (..., H, W) in, maps of the same shape and dtype out, and a record of the settings.

    An attribute ``needs`` may name what the stage reads of its context; without it the stage is
    given everything, see :func:`needs_of`. A stage that works on all grids of a request together
    has a method ``over(maps, contexts)`` besides, see :func:`over_grids`.
    """

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Refine the maps."""
        ...

    def describe(self) -> dict[str, Any]:
        r"""A JSON-able record ``{"name": ..., **settings}``."""
        ...


class NamedRefinement(ABC):
    r"""Base of the registered dataclasses: their record is their name and their fields.

    :func:`register_refinement` gives the class its name. A class that reads nothing of its context,
    or only a part, says so in ``needs``: the maps of repeated words cost passes of the model.
    ``checks`` has one for every setting that can be wrong.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = EVERYTHING
    checks: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self) -> None:
        settings = self._settings()
        check_settings(type(self).__name__, self.checks, **settings)
        # A list, as JSON gives it back, would make the object unhashable and unequal.
        for name, value in settings.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))

    @abstractmethod
    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Refine the maps."""

    def describe(self) -> dict[str, Any]:
        r"""A JSON-able record; ``refinement(**record)`` builds an equal object again."""
        record = {"name": self.name, **self._settings()}
        return {k: list(v) if isinstance(v, tuple) else plain(v) for k, v in record.items()}

    def _settings(self) -> dict[str, Any]:
        names = (field.name for field in fields(self))  # type: ignore[arg-type]  # a dataclass
        return {name: getattr(self, name) for name in names}


class FunctionRefinement(NamedRefinement):
    r"""A refinement that is one function of maps and settings, and reads nothing of its context."""

    needs: ClassVar[frozenset[str]] = frozenset()
    function: ClassVar[Callable[..., Tensor]]

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Refine maps (..., H, W) by the function, with the settings of this object."""
        return self.function(maps, **self._settings())


#: name → class; ``@register_refinement("name")`` stands above ``@dataclass(frozen=True)``
REFINEMENTS: Registry[type[NamedRefinement]] = Registry("refinement", named=True)
register_refinement = REFINEMENTS.register
registered_refinements = REFINEMENTS.names
#: ``refinement("rank_gaussian", kernel_size=5)``; ``refinement(**other.describe())`` equals other
refinement: Callable[..., NamedRefinement] = REFINEMENTS.get


def required(value: _Value | None, caller: str, name: str) -> _Value:
    r"""Return the context's value, or say which one is missing and how to give it.

    Raises:
        ValueError: the value is None.
    """
    if value is None:
        context = _EXAMPLES.get(name, "RefineContext(steps=32, image_size=(480, 640))")
        raise InputError(
            f"{caller} needs `{name}` ({_MEANINGS[name]}), but the context holds none: give it "
            f"one, for example refine(maps, context) with {context}."
        )
    return value


def over_grids(
    stage: Refinement, maps: Sequence[Tensor], contexts: Sequence[RefineContext | None]
) -> tuple[Tensor, ...]:
    r"""One stage on maps (..., H, W) of several grids: by its ``over``, or grid by grid."""
    over: Callable[..., tuple[Tensor, ...]] | None = getattr(stage, "over", None)
    if over is not None:
        return over(maps, contexts)
    return tuple(stage(m, context) for m, context in zip(maps, contexts, strict=True))


def needs_of(stage: Refinement) -> frozenset[str]:
    r"""What a stage reads of its context: its ``needs``, everything where it does not say.

    Raises:
        ValueError: a name that no context has.
    """
    needs = frozenset(getattr(stage, "needs", EVERYTHING))
    if unknown := sorted(needs - EVERYTHING):
        raise InputError(
            f"{type(stage).__name__} needs {', '.join(map(repr, unknown))}, which no context has: "
            f"expected names of {', '.join(sorted(EVERYTHING))}"
        )
    return needs
