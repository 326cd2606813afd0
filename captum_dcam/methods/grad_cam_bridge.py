r"""How pytorch-grad-cam's classes run on a bound generation and leave nothing behind.

Its classes expect a module of one tensor with a convolution to hook, call ``zero_grad``, ``eval``
and ``backward`` on that module, and keep their hooks. :class:`View` is such a module. It is
thrown away afterwards and only refers to the model, so that none of this reaches the model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from captum_dcam.errors import MethodError, MissingPackageError
from captum_dcam.methods.base import (
    AttributionTask,
    PerToken,
    against,
    check_counts,
    entered,
    seeded,
)
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import no_path
from captum_dcam.model.tap import wide
from captum_dcam.packages import needed

PACKAGE = "pytorch_grad_cam"
#: settings that count something; ``channels`` may be None
_COUNTS = ("channels", "batch_size", "scales", "comparisons", "concepts")


def upstream(name: str, module: str = "") -> Any:
    r"""A class or function of pytorch-grad-cam, imported when it is needed.

    Args:
        name (str): as the package calls it.
        module (str, optional): the package's module that holds it. Default: the package itself

    Raises:
        MissingPackageError: the extra is missing, does not load, or is too old to know the name.
    """
    path = f"{PACKAGE}.{module}" if module else PACKAGE
    found = needed(path, f"pytorch-grad-cam's {name}")
    if not hasattr(found, name):
        raise MissingPackageError(
            f"the installed pytorch-grad-cam has no {name}: pip install --upgrade grad-cam"
        )
    return getattr(found, name)


class View(nn.Module):
    r"""One grid and one token's state as the module that pytorch-grad-cam expects.

    It maps its input to the logits (B, V) at the token's response position. The grid's feature map
    passes through ``layer``, an identity of this module alone, in float32 (bfloat16 has no numpy
    form). Neither the model nor its parameters are submodules: ``eval``, ``zero_grad`` and the
    hooks of the classes end here.

    Args:
        task (AttributionTask): its bound forward runs in the state of the position.
        position (int): response position.
        grid (int): number of the grid.
        image (int, optional): number of the image that the input (B, C, H, W) replaces in the pixel
            tensor. Default: none, only the size of the input counts
        forward (DenoisingForward, optional): the same generation at another block.
            Default: the task's
    """

    def __init__(
        self,
        task: AttributionTask,
        position: int,
        grid: int,
        image: int | None = None,
        forward: DenoisingForward | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.Identity()
        # pytorch-grad-cam takes the device from the first parameter
        self.anchor = nn.Parameter(task.pixels.new_empty(0), requires_grad=False)
        self._task, self._position, self._grid, self._image = task, position, grid, image
        self._model = (forward or task.forward,)  # a module in a tuple does not become a submodule

    @property
    def dummy(self) -> Tensor:
        """An input (1, 1, h, w) of the grid's size: maps come out at token resolution."""
        return torch.zeros(1, 1, *self._task.shapes[self._grid], device=self.anchor.device)

    @property
    def own_pixels(self) -> Tensor:
        """The grid's image (1, C, H, W) in float32."""
        assert self._image is not None
        return images(self._task.pixels)[:, self._image].detach().float()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, V) in float32 or wider, less the foil's."""
        (forward,) = self._model

        def through(features: Tensor, index: int) -> Tensor:
            if index != self._grid:
                return features
            result: Tensor = self.layer(wide(features))
            return result.to(features.dtype)

        with forward.edited(through):
            logits = wide(self._logits(forward, pixels)[:, self._position])
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise no_path(forward)
        return against(logits, self._task.foil(self._position))

    def _logits(self, forward: DenoisingForward, pixels: Tensor) -> Tensor:
        task, rows = self._task, len(pixels)
        if self._image is None and rows == 1:  # nothing below the tap is computed again
            return forward.replay(torch.tensor([0]), torch.tensor([task.step(self._position)]))
        whole = task.pixels.detach()
        whole = whole.expand(rows, *whole.shape[1:])
        if self._image is not None:
            whole = whole.clone()
            images(whole)[:, self._image] = pixels.to(whole)
        state = task.arguments(self._position)
        found: Tensor = forward(whole, *(s.expand(rows, *s.shape[1:]) for s in state))
        return found


def images(pixels: Tensor) -> Tensor:
    """Pixels (B, images, C, H, W); a tensor (B, C, H, W) holds one image."""
    return pixels if pixels.ndim == 5 else pixels[:, None]


def image_of(task: AttributionTask, grid: int) -> int:
    r"""Which image of the pixel tensor a grid's tokens are computed from.

    Raises:
        MethodError: the pixel tensor has no axes (images, C, H, W), or the grid and one image do
            not belong to each other alone.
    """
    forward, pixels = task.forward, task.pixels
    family = forward.adapter.family
    if pixels.ndim not in (4, 5):
        raise MethodError(
            f"{family}'s pixels are {tuple(pixels.shape)}: this class of pytorch-grad-cam changes "
            "images (C, H, W); use one that reads the tapped block, such as pgc_gradcam"
        )
    owners = images(forward.adapter.pixel_tokens(forward.request))[0]
    sizes = torch.tensor([h * w for h, w in task.shapes], device=owners.device)
    number = torch.arange(len(sizes), device=owners.device).repeat_interleave(sizes)
    grids = [set(number[o[o >= 0]].unique().tolist()) for o in owners]
    holding = [i for i, found in enumerate(grids) if grid in found]
    if len(holding) != 1 or grids[holding[0]] != {grid}:
        raise MethodError(
            f"{family}: grid {grid} is computed from the images {holding} of the pixel tensor, "
            "which hold other grids too or are several: this class of pytorch-grad-cam needs one "
            "image per grid; use one that reads the tapped block, such as pgc_gradcam"
        )
    return holding[0]


@contextmanager
def noted(cam: Any) -> Iterator[list[np.ndarray]]:
    """The maps (B, h, w) of a BaseCAM as ``get_cam_image`` gives them: before ReLU, min-max and
    resizing. On leaving, the hooks and the graph are gone."""
    seen: list[np.ndarray] = []
    original: Callable[..., np.ndarray] = cam.get_cam_image

    def get_cam_image(*args: Any, **kwargs: Any) -> np.ndarray:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    cam.get_cam_image = get_cam_image
    try:
        yield seen
    finally:
        del cam.get_cam_image
        released(cam)


def released(cam: Any) -> None:
    """Remove a BaseCAM's hooks, which live as long as the object otherwise, and its graph."""
    cam.activations_and_grads.release()
    cam.outputs = None


def raw(cam: Any, pixels: Tensor, target: Callable, call: Any = None) -> Tensor:
    """Run a BaseCAM (or what is built on it, ``call``) and give its raw map (h, w)."""
    with torch.set_grad_enabled(bool(cam.uses_gradients)), noted(cam) as seen:
        (call or cam)(pixels, [target])
    return torch.as_tensor(seen[0][0], dtype=torch.float32)


def logit(token: int) -> Callable[[Tensor], Tensor]:
    """The target, as the package calls it: a token's logit in logits (…, V)."""
    return lambda logits: logits[..., token]


class Bridge(PerToken):
    """A class of pytorch-grad-cam, called once per grid; entered by :func:`pgc_method`."""

    upstream: ClassVar[str]

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]  # a dataclass
        check_counts(self, *(n for n in names if n in _COUNTS), optional="channels")

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        upstream(self.upstream)
        if "pixel tokens" in self.facts.needs:
            for grid in range(len(task.shapes)):
                image_of(task, grid)

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        grids = range(len(task.shapes))
        with seeded(task.generator):
            return tuple(self._grid(task, position, token, grid) for grid in grids)

    @abstractmethod
    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        """The map (h, w) of one grid."""


B = TypeVar("B", bound=type[Bridge])


@dataclass_transform(frozen_default=True)
def pgc_method(
    name: str, upstream: str, source: str, passes: str, *needs: str, **facts: Any
) -> Callable[[B], B]:
    r"""Decorator that enters a :class:`Bridge` as a frozen dataclass with its facts.

    Args:
        name (str): of the method.
        upstream (str): the package's class, and the method's label.
        source, passes, needs, facts: as in :class:`captum_dcam.methods.base.MethodFacts`.
    """

    def enter(cls: B) -> B:
        cls.upstream = upstream
        known = upstream, "pytorch-grad-cam", source, passes
        facts.setdefault("foils", "gradients" in needs)
        return entered(name, *known, *needs, "grad-cam", **facts)(cls)

    return enter
