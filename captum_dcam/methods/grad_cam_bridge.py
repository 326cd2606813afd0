r"""What lets pytorch-grad-cam's classes run on a bound generation and leave nothing behind.

Its classes expect a module of one tensor with a convolution to hook, call ``zero_grad``, ``eval``
and ``backward`` on that module, and keep their hooks. :class:`View` is such a module: a throw-away
one that only refers to the model, so that none of this reaches the model.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from captum_dcam.errors import InfeasibleStepError, InputError, MethodError
from captum_dcam.methods.base import AttributionTask, PerToken, seeded
from captum_dcam.model.forward import DenoisingForward

PACKAGE = "pytorch_grad_cam"
#: where the methods stand in the table
GROUP = "pytorch-grad-cam"


def upstream(name: str, module: str = "") -> Any:
    r"""A class or function of pytorch-grad-cam, imported when it is needed.

    Args:
        name (str): as the package calls it.
        module (str, optional): the package's module that holds it. Default: the package itself

    Raises:
        MethodError: the extra is missing, does not load, or is too old to know the name.
    """
    path = f"{PACKAGE}.{module}" if module else PACKAGE
    try:
        found = importlib.import_module(path)
    except (ImportError, RuntimeError, OSError) as error:
        raise MethodError(
            f'pytorch-grad-cam cannot be imported ({error}): pip install "captum-dcam[grad-cam]"; '
            "it needs torchvision, and torch and torchvision must come from the same source (a "
            "CPU-only torch beside a CUDA torchvision does not load)"
        ) from error
    if not hasattr(found, name):
        raise MethodError(
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
        task (AttributionTask): its bound forward is run in the state of the position.
        position (int): response position.
        grid (int): number of the grid.
        picture (int, optional): input (B, C, H, W) takes the place of this picture in the pixel
            tensor. Default: the input's size alone counts, the pixels stay the task's
        forward (DenoisingForward, optional): the same generation at another block.
            Default: the task's
    """

    def __init__(
        self,
        task: AttributionTask,
        position: int,
        grid: int,
        picture: int | None = None,
        forward: DenoisingForward | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.Identity()
        # pytorch-grad-cam takes the device from the first parameter
        self.anchor = nn.Parameter(task.pixels.new_empty(0), requires_grad=False)
        self._run = _Run(task, position, grid, picture, forward or task.forward)

    @property
    def dummy(self) -> Tensor:
        """An input (1, 1, h, w) of the grid's size: maps come out at token resolution."""
        shape = self._run.task.shapes[self._run.grid]
        return torch.zeros(1, 1, *shape, device=self.anchor.device)

    @property
    def own_pixels(self) -> Tensor:
        """The grid's picture (1, C, H, W) in float32."""
        assert self._run.picture is not None
        return pictures(self._run.task.pixels)[:, self._run.picture].detach().float()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, V) in float32 or wider."""
        return self._run(pixels, self.layer)


class _Run:
    """What a view does; an object of its own, so that ``nn.Module`` does not adopt the model."""

    def __init__(
        self,
        task: AttributionTask,
        position: int,
        grid: int,
        picture: int | None,
        forward: DenoisingForward,
    ) -> None:
        self.task, self.forward = task, forward
        self.position, self.grid, self.picture = position, grid, picture

    def __call__(self, pixels: Tensor, layer: nn.Module) -> Tensor:
        def through(features: Tensor, index: int) -> Tensor:
            if index != self.grid:
                return features
            return layer(_wide(features)).to(features.dtype)

        with self.forward.edited(through):
            logits = _wide(self._logits(pixels)[:, self.position])
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise InfeasibleStepError(
                f"the logits of position {self.position} have no gradient path to the image "
                f"states of block {self.forward.layer}: choose another step or a shallower block"
            )
        return logits

    def _logits(self, pixels: Tensor) -> Tensor:
        task, rows = self.task, len(pixels)
        if self.picture is None and rows == 1:  # nothing below the tap is computed again
            step = torch.tensor([task.step(self.position)])
            return self.forward.replay(torch.tensor([0]), step)
        whole = task.pixels.detach()
        whole = whole.expand(rows, *whole.shape[1:])
        if self.picture is not None:
            whole = whole.clone()
            pictures(whole)[:, self.picture] = pixels.to(whole)
        state = task.arguments(self.position)
        return self.forward(whole, *(s.expand(rows, *s.shape[1:]) for s in state))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype.itemsize >= 4 else values.float()


def pictures(pixels: Tensor) -> Tensor:
    """Pixels (B, images, C, H, W); a tensor (B, C, H, W) holds one picture."""
    return pixels if pixels.ndim == 5 else pixels[:, None]


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


class Bridge(PerToken):
    """A class of pytorch-grad-cam, run once a grid."""

    upstream: ClassVar[str]

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        upstream(self.upstream)

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        with seeded(task.generator):
            return tuple(
                self._grid(task, position, token, grid) for grid in range(len(task.shapes))
            )

    @abstractmethod
    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        """The map (h, w) of one grid."""


def raw(cam: Any, pixels: Tensor, target: Callable, call: Any = None) -> Tensor:
    """Run a BaseCAM (or what is built on it, ``call``) and give its raw map (h, w)."""
    with torch.set_grad_enabled(bool(cam.uses_gradients)), noted(cam) as seen:
        (call or cam)(pixels, [target])
    return torch.as_tensor(seen[0][0], dtype=torch.float32)


def logit(token: int) -> Callable[[Tensor], Tensor]:
    """The target, as the package calls it: a token's logit in logits (…, V)."""
    return lambda logits: logits[..., token]


def positive(method: Any, *names: str) -> None:
    """Raise for settings that are not whole numbers of at least 1, or None where they may be."""
    for name in names:
        value = getattr(method, name)
        if value is None and name == "channels":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}: expected a whole number of at least 1")
