"""Diffusion-CAM's three presets as methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from captum_dcam import maps
from captum_dcam.errors import InputError, UnknownNameError, near
from captum_dcam.maps import PRODUCTS
from captum_dcam.methods.base import Attribution, AttributionTask, Method, entered
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.tagging import DEFAULT_TAGGER
from captum_dcam.model.trajectory import Score, check_score
from captum_dcam.presets import preset
from captum_dcam.refine import Compose


@dataclass(frozen=True)
class _Preset(Method):
    r"""A preset of Diffusion-CAM, and what may be changed in it.

    Args:
        score (str or int, optional): state whose logits are read, or the number of a denoising
            step; ``"task"`` for that of the task. Default: the preset's, whatever the task's is,
            for it is part of the method
        product (str, optional), center (bool, optional), backward (str, optional): as in
            ``DiffusionCAM.attribute``. Default: the preset's, whatever the task's is
        refined (bool, optional): apply the preset's refinements. Default: True
        at (float, optional): explain the image states of the call at this fraction of the steps,
            0 to 1 (Table 5). Default: the call that the score needs
    """

    preset: ClassVar[str]
    score: Score | None = None
    product: str | None = None
    center: bool | None = None
    backward: str | None = None
    refined: bool = True
    at: float | None = None

    def __post_init__(self) -> None:
        if self.score not in (None, "task"):
            object.__setattr__(self, "score", check_score(self.score))
        for value, known in ((self.product, PRODUCTS), (self.backward, BACKWARDS)):
            if value is not None and value not in known:
                raise UnknownNameError(f"unknown {value!r}{near(value, known)}")
        if self.at is not None and not 0 <= self.at <= 1:
            raise InputError(f"at is {self.at}: expected a fraction of the steps, 0 to 1")

    @property
    def refines(self) -> bool:
        return self.refined and len(preset(self.preset).refinements()) > 0

    def attribute(self, task: AttributionTask) -> Attribution:
        chosen, forward = preset(self.preset), task.forward
        reading = chosen.reading(
            score=task.score if self.score == "task" else self.score,
            product=self.product,
            center=self.center,
            backward=self.backward,
            step=self._step(forward),
            tagger=DEFAULT_TAGGER,  # a method gives the same maps on every machine
        )
        refine = chosen.refinements() if self.refined else Compose([])
        signed, refined = maps.explained(forward, task.targets, reading, refine)
        found = refined if len(refine) else signed
        done = torch.ones(len(task.targets), dtype=torch.bool)
        return Attribution(tuple(m.cpu() for m in found), done)

    def _step(self, forward: DenoisingForward) -> int | None:
        """The call at the fraction ``at`` of the steps."""
        if self.at is None:
            return None
        step = round(self.at * (forward.trajectory.steps - 1))
        # behind a cached prefix the prefill, the only call that holds the image, is the first
        return step + 1 if forward.trajectory.cache == "prefix" and self.at else step


@entered(
    "diffusion_cam",
    "Diffusion-CAM (default)",
    "Diffusion-CAM",
    "this library, docs/SCORES.md",
    "1 + 1 back",
    "gradients",
    foils=True,
    own_backward=True,
)
class DiffusionCamDefault(_Preset):
    """The library's default preset."""

    preset: ClassVar[str] = "default"


@entered(
    "diffusion_cam_paper",
    "Diffusion-CAM (paper)",
    "Diffusion-CAM",
    "Diffusion-CAM, ACL 2026, Eq. 2–13",
    "1 + 1 back",
    "gradients",
    foils=True,
    own_backward=True,
)
class DiffusionCamPaper(_Preset):
    """The paper's form: pooled weights on the final state, all four modules."""

    preset: ClassVar[str] = "paper"


@entered(
    "diffusion_cam_base",
    "Grad-CAM on image tokens",
    "Diffusion-CAM",
    "Diffusion-CAM, ACL 2026, Eq. 2–4",
    "1 + 1 back",
    "gradients",
    foils=True,
    own_backward=True,
)
class DiffusionCamBase(_Preset):
    """The paper's base map: Grad-CAM on the image tokens, unrefined."""

    preset: ClassVar[str] = "base"
