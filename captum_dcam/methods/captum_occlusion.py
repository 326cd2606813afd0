"""Captum's occlusion, by pixels where they lie in rows and columns, else by image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from captum import attr
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.methods.base import MethodFacts, register_method
from captum_dcam.methods.captum_common import CaptumArguments, token_size
from captum_dcam.methods.captum_pixels import GROUP, MASKS, PixelMethod


@register_method("occlusion")
@dataclass(frozen=True)
class Occlusion(PixelMethod):
    r"""Fall of the logit when a window is painted over, averaged over the windows of a pixel.

    Args:
        patch (int): tokens a side of the window. Default: 4
        stride (int): tokens from one window to the next, at most ``patch``. Default: 3
        baseline (str): paint: ``mean`` (the picture's mean colour) or ``zero``.
            Default: ``"mean"``
        batch (int): so many windows in one pass. Default: 4
    """

    patch: int = 4
    stride: int = 3
    baseline: str = "mean"
    batch: int = 4

    algorithm: ClassVar[type] = attr.Occlusion
    facts: ClassVar[MethodFacts] = MethodFacts(
        "Occlusion",
        GROUP,
        "Zeiler & Fergus, ECCV 2014, §4.2",
        "1 + windows (64)",
        MASKS,
        expensive=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.patch:
            raise InputError(
                f"stride is {self.stride} tokens and the window {self.patch}: expected a stride of "
                "at most the window, else tokens are never covered"
            )

    def values(self, case: CaptumArguments) -> Any:
        size = token_size(case.owners, case.task.shapes)
        return self._over_tokens(case) if size is None else super().values(case)

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        owners = case.owners
        size = token_size(owners, case.task.shapes)
        assert size is not None  # values() sees to that
        shape = owners.shape[1:]
        # A window covers all channels of one picture or tile.
        lead = [
            1 if bool((owners.diff(dim=d + 1) != 0).any()) else n for d, n in enumerate(shape[:-2])
        ]
        window = [min(self.patch * s, n) for s, n in zip(size, shape[-2:], strict=True)]
        stride = [min(self.stride * s, n) for s, n in zip(size, window, strict=True)]
        return {
            **super().call(case),
            "sliding_window_shapes": (*lead, *window),
            "strides": (*lead, *stride),
            "baselines": self.emptied(case),
            "perturbations_per_eval": self.batch,
        }

    def _over_tokens(self, case: CaptumArguments) -> Tensor:
        """The same where the pixel tensor has no rows and columns (patches in a list): the window
        slides over grids of one number a token, 1 for its pixels and 0 for the paint."""
        owners, empty, shapes = case.owners, self.emptied(case), case.task.shapes
        inside, at = owners[0] >= 0, owners[0].clamp_min(0)

        def forward(*values: Tensor) -> Tensor:
            shown = torch.cat([v.flatten(1) for v in values[: len(shapes)]], 1)
            pixels = torch.where(inside & (shown[:, at] == 0), empty, case.pixels)
            return case.forward(pixels, *values[len(shapes) :])

        windows = [(min(self.patch, h), min(self.patch, w)) for h, w in shapes]
        found = self.algorithm(forward).attribute(
            tuple(case.pixels.new_ones(1, h, w) for h, w in shapes),
            **super().call(case),
            sliding_window_shapes=tuple(windows),
            strides=tuple((min(self.stride, h), min(self.stride, w)) for h, w in windows),
            baselines=(0,) * len(shapes),
            perturbations_per_eval=self.batch,
        )
        return torch.cat([f.flatten(1) for f in found], 1)[:, at]
