r"""LLaVA-CAM: Grad-CAM++ of noisy copies of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from captum.attr import LayerActivation
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError, InputError
from captum_dcam.methods.base import (
    Attribution,
    AttributionTask,
    Method,
    check_counts,
    entered,
    noise,
)
from captum_dcam.methods.captum_common import as_tuple
from captum_dcam.model import gradients
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target
from captum_dcam.refine import min_max

#: number of tokens per pass over the noisy copies
TOKENS_AT_ONCE = 8


#: means over the noisy copies of the gradient (D, h, w), its square and its cube
Powers = tuple[Tensor, ...]


def smooth_plus_plus(features: Tensor, powers: Powers) -> Tensor:
    r"""Grad-CAM++ with the gradient's powers averaged over noisy copies (Omeiza et al. 2019).

    .. math:: α = D_2 / (2 D_2 + D_3 \sum_{ij} A), \quad
              M = \sum_c \Big(\sum_{ij} α \, \mathrm{ReLU}(D_1)\Big) A_c

    Args:
        features (Tensor): (D, h, w), A of the clean image.
        powers (tuple of Tensor): D_1, D_2, D_3: (D, h, w) each.

    Returns:
        Tensor: (h, w), signed; α is 0 where its denominator is.
    """
    first, second, third = powers
    below = 2 * second + third * features.sum((-2, -1), keepdim=True)
    # where() keeps the layout, and with it the order in which sum() adds
    alpha = (second / below.where(below != 0, torch.ones_like(below))).where(
        below != 0, torch.zeros_like(below)
    )
    weights = (alpha * first.relu()).sum((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


@entered(
    "llava_cam",
    "LLaVA-CAM",
    "gradient",
    "LLaVA-CAM, Zhang et al. 2024 / Smooth Grad-CAM++, Omeiza et al. 2019",
    "9 + 8 back",
    "gradients",
    stochastic=True,
    foils=True,
)
class LlavaCam(Method):
    r"""Smooth Grad-CAM++ at the tapped block, which LLaVA-CAM applies to multimodal models.

    Gaussian noise is added to the pixels; see :func:`smooth_plus_plus`. All words of a task get
    the same noisy copies. A word of several tokens is the sum of their maps. Where a budget ends
    after some copies, the mean over these is the word's estimate.

    Args:
        samples (int): noisy copies. Default: 8
        std (float): of the noise, as a fraction of the pixels' range. Default: 0.15
        threshold (float, optional): values of the min-max normalised map below it are set to 0
            (Diffusion-CAM's comparison uses 0.4); the map is then normalised to [0, 1]. Default:
            None, the signed map
    """

    samples: int = 8
    std: float = 0.15
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_counts(self, "samples")
        if not 0 <= self.std < float("inf"):
            raise InputError(f"std is {self.std}: expected a fraction of the pixel range")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}: expected 0 to 1, or None")

    def attribute(self, task: AttributionTask) -> Attribution:
        maps = task.empty()
        done = torch.zeros(len(task.targets), dtype=torch.bool)
        copies, note = noisy_copies(task, self.samples, self.std), ""
        for group in _groups(task.targets):
            targets = [part for n in group for part in task.targets[n].parts]
            owners = [n for n in group for _ in task.targets[n].parts]
            try:
                features = clean_features(task, targets)
            except BudgetExhaustedError as error:
                note = str(error)
                break
            powers, used, note = mean_powers(task, copies, targets)
            if not used:
                break
            for n, own, power in zip(owners, features, powers, strict=True):
                for whole, a, three in zip(maps, own, power, strict=True):
                    whole[n] += smooth_plus_plus(a.float(), three).cpu()
            if used < self.samples:
                note += f"; words {group[0]} to {group[-1]} are estimates from {used} copies"
                break
            done[list(group)] = True
        if self.threshold is not None:
            maps = tuple(_thresholded(m, self.threshold) for m in maps)
        return Attribution(maps, done, note=note)


def _groups(targets: Sequence[Target]) -> list[list[int]]:
    """Numbers of consecutive words that have about TOKENS_AT_ONCE tokens together."""
    groups: list[list[int]] = []
    count = TOKENS_AT_ONCE
    for number, target in enumerate(targets):
        if count + len(target.positions) > TOKENS_AT_ONCE:
            groups.append([])
            count = 0
        groups[-1].append(number)
        count += len(target.positions)
    return groups


def noisy_copies(task: AttributionTask, samples: int, std: float) -> list[DenoisingForward]:
    """The bound generation behind noisy pixels, ``std`` as a fraction of the pixels' range."""
    forward, pixels = task.forward, task.pixels
    spread = std * float(pixels.max() - pixels.min())
    out = []
    for _ in range(samples):
        noisy = pixels + noise(pixels, spread, task.generator)
        request = replace(forward.request, pixels=noisy.detach())
        trajectory = replace(forward.trajectory, kept={})
        out.append(forward.again(request=request, trajectory=trajectory))
    return out


def clean_features(task: AttributionTask, tokens: Sequence[Target]) -> list[tuple[Tensor, ...]]:
    """Feature maps (D, h, w), one per grid, of the clean image in every token's state."""
    layer = LayerActivation(task.forward, task.forward.tap)
    shared = task.forward.trajectory.cache == "prefix"
    found: dict[int, tuple[Tensor, ...]] = {}
    out = []
    for token in tokens:
        position = token.positions[0]
        state = 0 if shared else task.step(position)
        if state not in found:
            maps = layer.attribute(task.pixels, additional_forward_args=task.arguments(position))
            found[state] = tuple(m[0] for m in as_tuple(maps))
        out.append(found[state])
    return out


def mean_powers(
    task: AttributionTask, copies: Sequence[DenoisingForward], tokens: Sequence[Target]
) -> tuple[list[tuple[Powers, ...]], int, str]:
    r"""Means of the first three powers of the gradients of single tokens over the noisy copies.

    Returns:
        tuple: for every token :data:`Powers` of every grid (empty if there was no copy); the number
        of copies before the budget ended; what to tell of that.
    """
    sums: dict[tuple[int, int], Powers] = {}
    used, note = 0, ""
    for copy in copies:
        try:
            rows = gradients.target_gradients(copy, tokens, score=task.score)
        except BudgetExhaustedError as error:
            note = str(error)
            break
        used += 1
        for row in rows:
            for grid, gradient in enumerate(row.gradients):
                g = gradient.float()
                new = g, g.square(), g**3
                old = sums.get((row.target, grid), (torch.zeros_like(g),) * 3)
                sums[row.target, grid] = tuple(a + b for a, b in zip(old, new, strict=True))
    means = {at: tuple(s / used for s in parts) for at, parts in sums.items()}
    grids, count = range(len(task.shapes)), len(tokens) if used else 0
    return [tuple(means[n, i] for i in grids) for n in range(count)], used, note


def _thresholded(maps: Tensor, threshold: float) -> Tensor:
    """Maps (N, h, w), each brought to [0, 1], with 0 where it is below the threshold."""
    scaled = min_max(maps)
    return scaled.where(scaled >= threshold, torch.zeros_like(scaled))
