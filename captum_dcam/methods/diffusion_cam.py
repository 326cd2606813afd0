"""Diffusion-CAM's three presets as methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from captum_dcam.denoising import DenoisingForward
from captum_dcam.methods.base import Attribution, Facts, Method, Problem, register_method
from captum_dcam.presets import Preset, preset
from captum_dcam.word_maps import context_for, needs_repeated, repeated_maps, word_maps


class _Preset(Method):
    """A preset: its own score, product and refinements, whatever the problem's score is."""

    preset: ClassVar[str]

    def attribute(self, problem: Problem) -> Attribution:
        chosen: Preset = preset(self.preset)
        refine, forward = chosen.refinements(), problem.forward
        raw = word_maps(
            forward,
            problem.targets,
            [0] * len(problem.targets),
            chosen.score,
            None,
            chosen.product,
            chosen.center,
        )
        own = None
        if needs_repeated(refine):
            own = repeated_maps(forward, 0, chosen.score, None, chosen.product, chosen.center)
        maps = [m.float() for m in raw]
        if len(refine):
            maps = [
                refine(m.relu(), context_for(forward, grid.image_size, own, i))
                for i, (m, grid) in enumerate(zip(maps, _grids(forward), strict=True))
            ]
        done = torch.ones(len(problem.targets), dtype=torch.bool)
        return Attribution(tuple(m.cpu() for m in maps), done)


def _grids(forward: DenoisingForward) -> tuple:
    assert forward.request is not None
    return forward.request.layout.grids


@register_method("diffusion_cam")
@dataclass(frozen=True)
class DiffusionCamDefault(_Preset):
    """The library's default preset."""

    preset: ClassVar[str] = "default"
    facts: ClassVar[Facts] = Facts(
        "Diffusion-CAM (default)",
        "Diffusion-CAM",
        "this library, docs/SCORES.md",
        "1 + 1 back",
        ("gradients",),
    )


@register_method("diffusion_cam_paper")
@dataclass(frozen=True)
class DiffusionCamPaper(_Preset):
    """The paper's form: pooled weights on the final state, all four modules."""

    preset: ClassVar[str] = "paper"
    facts: ClassVar[Facts] = Facts(
        "Diffusion-CAM (paper)",
        "Diffusion-CAM",
        "Diffusion-CAM, ACL 2026, Eq. 2–13",
        "1 + 1 back",
        ("gradients",),
    )


@register_method("diffusion_cam_base")
@dataclass(frozen=True)
class DiffusionCamBase(_Preset):
    """The paper's base map: Grad-CAM on the image tokens, unrefined."""

    preset: ClassVar[str] = "base"
    facts: ClassVar[Facts] = Facts(
        "Grad-CAM on image tokens",
        "Diffusion-CAM",
        "Diffusion-CAM, ACL 2026, Eq. 2–4",
        "1 + 1 back",
        ("gradients",),
    )
