r"""iGOS++: a small mask whose removal destroys a word and which alone keeps it, optimised.

Written from the papers' equations: I-GOS (Qi et al., AAAI 2020), iGOS++ (Khorram et al., CHIL 2021)
and its use on vision-language models (Xing et al., arXiv:2503.13891).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.methods.base import (
    AttributionTask,
    PerWord,
    WordMaps,
    check_counts,
    entered,
    pairs_of,
)
from captum_dcam.methods.captum_common import CaptumArguments, baseline_of
from captum_dcam.methods.score_cam import pixel_masks
from captum_dcam.methods.superpixels import overlaps
from captum_dcam.model.words import Target

#: masks (K, I, h, w), one per image, 1 where it is kept → the word's score (K,) on what they leave
ScoreOf = Callable[[Tensor], Tensor]
#: how far the value that changes most goes in a step; the best of these is taken
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)


class Objective:
    r"""What a mask costs: :math:`F(M) = f(M) - f(1 - M) + \lambda_1 \overline{1 - M} +
    \lambda_2 TV(M)`.

    Args:
        score (callable): f.
        l1, tv (float): :math:`\lambda_1` of the mean of 1 − M, and :math:`\lambda_2` of the mean
            squared difference of neighbours.
        points (int): S of the integrated gradient.
        batch (int): masks per call of ``score``.
    """

    def __init__(self, score: ScoreOf, l1: float, tv: float, points: int, batch: int) -> None:
        self.score, self.l1, self.tv, self.points, self.batch = score, l1, tv, points, batch

    def regulariser(self, masks: Tensor) -> Tensor:
        """What masks (K, I, h, w) cost by themselves, (K,)."""
        differences = [masks.diff(dim=d).square().flatten(1) for d in (-2, -1)]
        rough = torch.cat(differences, 1)
        total = rough.sum(1) / max(rough.shape[1], 1)
        return self.l1 * (1 - masks).flatten(1).mean(1) + self.tv * total

    def values(self, masks: Tensor) -> Tensor:
        """F (K,)."""
        both = torch.cat((masks, 1 - masks))
        with torch.no_grad():
            found = torch.cat([self.score(part) for part in both.split(self.batch)])
            kept, rest = found.double().chunk(2)
            return kept - rest + self.regulariser(masks)

    def direction(self, mask: Tensor) -> Tensor:
        r"""The gradient at one mask (I, h, w) with f integrated along straight lines of masks.

        :math:`\nabla_M \frac{1}{S} \sum_{s=1}^{S} \left[ f(\tfrac{s}{S} M) - f(1 - \tfrac{s}{S} M)
        \right] + \nabla_M g(M)`: deletion towards the empty image, insertion towards the whole one,
        so that a score that no longer falls or rises nearby still tells where it did.
        """
        leaf = mask.detach().requires_grad_()
        (total,) = torch.autograd.grad(self.regulariser(leaf[None]).sum(), leaf)
        shares = torch.arange(1, self.points + 1, dtype=mask.dtype) / self.points
        signs = torch.tensor([1.0, -1.0], dtype=mask.dtype).repeat(self.points)
        for part in torch.arange(2 * self.points).split(self.batch):
            scaled = shares[part // 2].view(-1, 1, 1, 1) * leaf
            deleted = (part % 2 == 0).view(-1, 1, 1, 1)
            found = self.score(torch.where(deleted, scaled, 1 - scaled)).to(mask.dtype)
            value = (signs[part] * found).sum() / self.points
            total = total + torch.autograd.grad(value, leaf)[0]
        return total

    def minimise(self, mask: Tensor, steps: int) -> Tensor:
        r"""The mask (I, h, w) after at most so many steps down, each value between 0 and 1.

        A step tries :data:`LENGTHS` and takes the lowest F; where none is lower it ends. The papers
        search the length by halving it.
        """
        current = float(self.values(mask[None])[0])
        for _ in range(steps):
            down = self.direction(mask)
            stuck = ((mask <= 0) & (down > 0)) | ((mask >= 1) & (down < 0))
            down = down.masked_fill(stuck, 0)
            highest = float(down.abs().max())
            if highest == 0:
                break
            tried = torch.stack([(mask - n * down / highest).clamp(0, 1) for n in LENGTHS])
            values = self.values(tried)
            best = int(values.argmin())
            if float(values[best]) >= current:
                break
            mask, current = tried[best], float(values[best])
        return mask


@entered(
    "igos_pp",
    "iGOS++",
    "perturbation",
    "Khorram et al., CHIL 2021; Xing et al., arXiv:2503.13891",
    "322 + 200 back",
    "gradients",
    "pixel tokens",
    expensive=True,
)
class IgosPlusPlus(PerWord):
    r"""iGOS++ with one mask, as it is used on vision-language models.

    The mask M lies over the whole image; F is f on the image under the mask (deletion) minus f on
    what the mask hides (insertion), plus what the mask costs (:class:`Objective`). f is the mean
    probability of the word's tokens, each read at its own step. M starts at 1 and goes down
    integrated gradients. The map is 1 − M, the mean over every image token's box; ≥ 0.

    The first paper has two masks of which this is the product, and a TV that the image's edges
    weaken; both put a blurred image where the mask is 0, this its mean colour, as deletion and
    insertion do. The optimiser's step length is ours.

    Args:
        size (int): cells of the mask per side. Default: 32
        steps (int): at most. Default: 10
        points (int): of the integrated gradient. Default: 10
        l1 (float): weight of the mean of 1 − M. Default: 1.0
        tv (float): weight of the mean squared difference of neighbouring cells. Default: 1.0
        batch_size (int): number of masked images per pass. Default: 8
    """

    size: int = 32
    steps: int = 10
    points: int = 10
    l1: float = 1.0
    tv: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_counts(self, "size", "steps", "points", "batch_size")
        for name in ("l1", "tv"):
            object.__setattr__(self, name, checks.real(name, getattr(self, name), low=0.0))

    def word(self, task: AttributionTask, reader: None, target: Target) -> WordMaps:
        score, hidden = self.score(task, target), _hidden(task, self.size)
        objective = Objective(score, self.l1, self.tv, self.points, self.batch_size)
        images = 1 + max(grid.image for grid in task.forward.request.layout.grids)
        start = torch.ones(images, self.size, self.size)
        found = objective.minimise(start, self.steps)
        return tuple(own[0] for own in hidden(found[None])), None

    def score(self, task: AttributionTask, target: Target) -> ScoreOf:
        """f of masks, differentiable."""
        forward, hidden = task.forward, _hidden(task, self.size)
        owners = forward.adapter.pixel_tokens(forward.request)
        pairs = pairs_of(target)
        cases = [CaptumArguments(task, pair) for pair in pairs]
        still = baseline_of(cases[0], "mean")

        def score(masks: Tensor) -> Tensor:
            shown = pixel_masks([1 - own for own in hidden(masks)], owners).to(still)
            pixels = cases[0].pixels * shown + still * (1 - shown)
            found = []
            for case, (position, token) in zip(cases, pairs, strict=True):
                arguments = (a.expand(len(pixels), *a.shape[1:]) for a in case.arguments)
                logits = case.forward(pixels, *arguments)[:, position]
                found.append(logits.softmax(-1)[:, token])
            return torch.stack(found).mean(0).cpu()

        return score


def _hidden(task: AttributionTask, size: int) -> Callable[[Tensor], list[Tensor]]:
    """Masks (K, I, size, size) to how much of every token's box they hide, (K, h, w) per grid; 0
    for a box outside of its image."""
    ways: list[tuple[int, Tensor, Tensor]] = []
    for grid in task.forward.request.layout.grids:
        cells = grid.resized((size, size))
        rows, columns = (overlaps(e, size) for e in (cells.y_edges, cells.x_edges))
        rows, columns = (m / m.sum(1, keepdim=True).clamp_min(1e-9) for m in (rows, columns))
        ways.append((grid.image, rows, columns))

    def hidden(masks: Tensor) -> list[Tensor]:
        return [
            rows.to(masks) @ (1 - masks[:, image]) @ columns.to(masks).T
            for image, rows, columns in ways
        ]

    return hidden
