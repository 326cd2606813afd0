r"""Score-CAM on token scores: a channel weighs what the answer keeps when it masks the image.

No gradients. The masked images serve all words at once: with a prefix cache the image states do
not depend on the step, so only the short steps are computed again for every word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError, InputError
from captum_dcam.methods.base import (
    Attribution,
    AttributionTask,
    Method,
    check_choices,
    check_counts,
    entered,
    pairs_of,
)
from captum_dcam.model.gradients import watched
from captum_dcam.model.layout import Grid

#: what of a token is read on the masked images
SCORES = ("logit", "probability")


class _Read(NamedTuple):
    """One token of word ``target``, read at ``step``."""

    target: int
    step: int
    position: int
    token: int


@entered(
    "score_cam",
    "Score-CAM",
    "gradient",
    "Wang et al., CVPRW 2020",
    "1 + channels (24)",
    "pixel tokens",
    expensive=True,
)
class ScoreCam(Method):
    r"""Score-CAM (Wang et al., CVPRW 2020, Eq. 3–7).

    Every channel :math:`A_k` of the image tokens, stretched to [0, 1] over all grids and enlarged
    to the pixels, masks them: :math:`X_k = X M_k + b (1 - M_k)`. The map is
    :math:`\sum_k \alpha_k A_k` with :math:`\alpha` the softmax over channels of the token's score
    on :math:`X_k`. The score on the bare baseline, which the paper subtracts, is the same for all
    channels and cancels in the softmax: it is not computed. The paper's ReLU is left to the reader.

    A mask is enlarged bilinearly where the last two axes of the pixel tensor are one grid's
    image, and painted token by token in other pixel tensors.

    A budget that ends inside leaves an estimate from the channels done so far.

    Args:
        channels (int, optional): the channels with the largest standard deviation take part; None:
            all, one pass each. Default: 24
        baseline (float): b, in the units of the pixel tensor. Default: 0.0
        score (str): ``logit`` or ``probability`` of the token. Probabilities differ by 1 at most,
            so that the softmax leaves all channels nearly the same weight. Default: ``"logit"``
        batch_size (int): number of masked images per pass. Default: 8
    """

    channels: int | None = 24
    baseline: float = 0.0
    score: str = "logit"
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_counts(self, "channels", "batch_size", optional="channels")
        check_choices(self, score=SCORES)
        if not torch.isfinite(torch.tensor(self.baseline)):
            raise InputError(f"baseline is {self.baseline}: expected a finite number")

    def attribute(self, task: AttributionTask) -> Attribution:
        maps = task.empty()
        done = torch.ones(len(task.targets), dtype=torch.bool)
        note, lost = "", set()
        for group in self._groups(task):
            numbers = [r.target for r in group]
            scores: list[Tensor] = []
            features: tuple[Tensor, ...] = ()
            if not note:
                try:
                    features, chosen = self._channels(task, group[0].step)
                    for part in chosen.split(self.batch_size):
                        scores.append(self._scores(task, group, [f[part] for f in features]))
                except BudgetExhaustedError as error:
                    note = str(error)
            if note:
                done[numbers] = False
            if not scores:
                lost |= {*numbers}
                continue
            weights = torch.cat(scores).softmax(0)
            for whole, own in zip(maps, features, strict=True):
                used = own[chosen[: len(weights)]]
                found = torch.einsum("kr,khw->rhw", weights.to(used), used).cpu()
                whole.index_add_(0, torch.tensor(numbers), found)
            if note:
                note += f": an estimate from {len(weights)} of {len(chosen)} channels"
        for whole in maps:
            whole[sorted(lost)] = 0.0  # words of which a token was not read at all
        return Attribution(maps, done, note=note)

    def _groups(self, task: AttributionTask) -> list[list[_Read]]:
        """Tokens whose image states are the same: all, or those of one step."""
        reads = [
            _Read(number, task.step(position), position, token)
            for number, target in enumerate(task.targets)
            for position, token in pairs_of(target)
        ]
        if task.forward.trajectory.cache == "prefix":
            return [reads]
        return [[r for r in reads if r.step == s] for s in dict.fromkeys(r.step for r in reads)]

    def _channels(self, task: AttributionTask, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Features (D, h, w) of every grid, and the numbers of the channels that take part."""
        with torch.no_grad():
            example, at = torch.tensor([0]), torch.tensor([step])
            _, maps = watched(task.forward, lambda: task.forward.replay(example, at))
        features = tuple(m[0].float() for m in maps)
        spread = torch.cat([f.flatten(1) for f in features], 1).std(1, correction=0)
        count = min(self.channels or len(spread), len(spread))
        return features, spread.topk(count).indices

    @torch.no_grad()
    def _scores(self, task: AttributionTask, group: list[_Read], features: list[Tensor]) -> Tensor:
        """Scores (K, reads) on the pixels masked by K channels (K, h, w)."""
        forward, request = task.forward, task.forward.request
        owners = forward.adapter.pixel_tokens(request)
        masks = pixel_masks(_stretched(features), owners).to(task.pixels)
        pixels = task.pixels.detach() * masks + self.baseline * (1 - masks)
        rows = len(pixels)
        out = torch.empty(rows, len(group))
        with forward.held():
            extras = (e.expand(rows, *e.shape[1:]) for e in request.extras)
            memory = forward.adapter.prefill(forward.adapter.embed(pixels, *extras))
            for step in sorted({r.step for r in group}):
                state = forward.trajectory.state_at(
                    torch.zeros(rows, dtype=torch.long), torch.full((rows,), step)
                )
                logits = forward.adapter.denoise(memory, *state).float()
                values = logits.softmax(-1) if self.score == "probability" else logits
                for i, read in enumerate(group):
                    if read.step == step:
                        out[:, i] = values[:, read.position, read.token].cpu()
        return out


def _stretched(features: list[Tensor]) -> list[Tensor]:
    """Maps (K, h, w) of all grids, each channel to [0, 1] over all of them; constant ones: 0."""
    every = torch.cat([f.flatten(1) for f in features], 1)
    low, high = every.amin(1)[:, None, None], every.amax(1)[:, None, None]
    span = torch.where(high > low, high - low, torch.ones_like(high))
    return [(f - low) / span for f in features]


def pixel_masks(masks: list[Tensor], owners: Tensor) -> Tensor:
    r"""Masks at token resolution, enlarged to the pixel tensor.

    Args:
        masks (list of Tensor): (K, h, w), one per grid.
        owners (Tensor): (1, …) int64 from ``adapter.pixel_tokens``.

    Returns:
        Tensor: (K, …) float32, 1 where a pixel belongs to no token. Where the last two axes hold
        one grid alone, whose rows and columns are rows and columns of pixels, the mask is bilinear
        between the tokens' centres; else each pixel has its token's value.
    """
    flat = torch.cat([m.flatten(1) for m in masks], 1)
    owners = owners.to(flat.device)[0]
    out = flat[:, owners.clamp_min(0).flatten()].view(len(flat), *owners.shape)
    out = torch.where(owners >= 0, out, torch.ones_like(out))
    if owners.ndim < 2:
        return out
    planes = owners.reshape(-1, *owners.shape[-2:])
    painted = out.view(len(flat), *planes.shape)
    start = 0
    for mask in masks:
        shape = (mask.shape[1], mask.shape[2])
        for i, plane in enumerate(planes):
            grid = _plane_grid(plane - start, plane >= 0, shape)
            if grid is not None:
                painted[:, i] = torch.where(plane >= 0, grid.to_pixels(mask), 1.0)
        start += shape[0] * shape[1]
    return out


def _plane_grid(own: Tensor, inside: Tensor, shape: tuple[int, int]) -> Grid | None:
    """A plane (H, W) of one grid's token numbers as that grid in the plane's pixels; None where it
    holds anything else."""
    h, w = shape
    if not bool(inside.any()) or not bool(((own >= 0) & (own < h * w))[inside].all()):
        return None
    rows = torch.where(inside, own.div(w, rounding_mode="floor"), -1).amax(1)
    columns = torch.where(inside, own % w, -1).amax(0)
    crossed = torch.where((rows[:, None] >= 0) & (columns >= 0), rows[:, None] * w + columns, -1)
    y_edges, x_edges = _edges(rows.tolist(), h), _edges(columns.tolist(), w)
    same = torch.equal(crossed, torch.where(inside, own, -1))
    if not same or y_edges is None or x_edges is None:
        return None
    size = own.shape[0], own.shape[1]
    return Grid(torch.zeros(shape, dtype=torch.long), x_edges, y_edges, size)


def _edges(owner: list[int], count: int) -> Tensor | None:
    """First and last pixel edge (count, 2) of every row or column; None unless they follow each
    other."""
    if [n for n in dict.fromkeys(owner) if n >= 0] != list(range(count)):
        return None
    last = {n: i + 1 for i, n in enumerate(owner)}
    return torch.tensor([(owner.index(n), last[n]) for n in range(count)], dtype=torch.float64)
