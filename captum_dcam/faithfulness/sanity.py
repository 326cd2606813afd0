r"""Sanity checks: does a map change with the model, the answer around it, and the word?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from captum_dcam.errors import InputError, MethodError
from captum_dcam.faithfulness.reading import Explain, flat_maps
from captum_dcam.methods.edited import one_example
from captum_dcam.metrics import obj_iou, rank_correlation
from captum_dcam.metrics._checks import stretched
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.guard import Guard
from captum_dcam.model.progress import ProgressLike, watched
from captum_dcam.model.words import Target
from captum_dcam.refine.checks import check_odd


@dataclass(frozen=True, eq=False)
class Randomization:
    r"""Maps before and after weights were replaced, S stages, N words.

    Args:
        stages (tuple of str): what was replaced last; all stages before stay replaced.
        spearman (Tensor): (S, N) rank correlation over all grids; near 0: the map needs the model.
        ssim (Tensor): (S, N) structural similarity, mean over the grids.
    """

    stages: tuple[str, ...]
    spearman: Tensor
    ssim: Tensor


@holding
def parameter_randomization(
    forward: DenoisingForward,
    targets: Sequence[Target],
    explain: Explain,
    generator: torch.Generator,
    *,
    stages: int | Sequence[int] | None = None,
    progress: ProgressLike = None,
) -> Randomization:
    r"""Replace weights from the output side down, and compare each stage's maps with the model's.

    A map that survives does not explain the model. The cascade goes from the last block to the
    first, and ends with everything else (embeddings, image tower, head: families that tie the head
    to the word embeddings leave no other order). Every parameter is drawn anew from a normal
    distribution of its own mean and standard deviation. The answer is held fixed. Weights are
    restored bit for bit, also after an error.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words.
        explain (callable): ``(forward, targets) -> maps``.
        generator (torch.Generator): draws the weights.
        stages (int or sequence of int, optional): how many of the blocks + 1 stages; or after which
            of them maps are compared, counted from 1, -1 for the last. Default: all
        progress (bool, callable or Progress, optional): True shows a bar of the model's passes, see
            :mod:`captum_dcam.model.progress`. Default: nothing

    Returns:
        Randomization: of these stages.

    Raises:
        MethodError: quantised weights, which cannot be drawn.

    Source:
        Adebayo et al., Sanity checks for saliency maps, 2018, section 3.1.
    """
    cascade = _cascade(forward.adapter)
    wanted = _wanted(stages, len(cascade))
    words = tuple(targets)
    before = _explained(forward, words, explain)
    found, watch = [], watched(forward.adapter, progress, "randomization")
    with watch, _restored(forward.adapter.guard) as replace_values:
        for number, (_, parameters) in enumerate(cascade[: wanted[-1]], 1):
            for parameter in parameters:
                replace_values(parameter, _drawn(parameter, generator))
            if number in wanted:
                found.append(_alike(before, _explained(forward, words, explain)))
    spearman, ssim = (torch.stack(rows) for rows in zip(*found, strict=True))
    return Randomization(tuple(cascade[n - 1][0] for n in wanted), spearman, ssim)


def _wanted(stages: int | Sequence[int] | None, count: int) -> list[int]:
    """Numbers of stages, from 1, in order."""
    if stages is None or isinstance(stages, int):
        found = list(range(1, (count if stages is None else stages) + 1))
    else:
        found = sorted({n + count + 1 if n < 0 else n for n in stages})
    if not found or not 1 <= found[0] <= found[-1] <= count:
        raise InputError(
            f"stages is {stages}: expected 1 to {count}, numbers of stages, or None for all"
        )
    return found


@holding
def shuffled_answer(
    forward: DenoisingForward, target: Target, generator: torch.Generator
) -> DenoisingForward:
    r"""The same image and word, with the answer's other tokens in random order.

    Tokens keep their steps: where a position was visible, it now shows its new token; where it was
    masked, it stays masked. Stop tokens and the word itself keep their places. An answer of fewer
    than two other tokens stays as it is.

    Args:
        forward (DenoisingForward): bound, one example.
        target (Target): the word that stays.
        generator (torch.Generator): draws the order.

    Returns:
        DenoisingForward: bound to the changed record; the given one is untouched.
    """
    one_example(forward)
    old = forward.trajectory
    tokens = old.tokens[0]
    stop = forward.adapter.stop_ids
    kept = {*target.positions, *(p for p, t in enumerate(tokens.tolist()) if t in stop)}
    free = [p for p in range(len(tokens)) if p not in kept]
    order = torch.randperm(len(free), generator=generator, device=generator.device).tolist()
    changed = tokens.clone()
    changed[free] = tokens[[free[i] for i in order]]

    def shown(canvas: Tensor) -> Tensor:
        visible = canvas == tokens.to(canvas.device)
        return torch.where(visible, changed.to(canvas), canvas)

    trajectory = replace(
        old,
        tokens=changed[None],
        states=(shown(old.states[0]), *old.states[1:]),
        final_state=(shown(old.final_state[0]), *old.final_state[1:]),
        kept={},
    )
    return forward.again(trajectory=trajectory)


@holding
def answer_shuffle(
    forward: DenoisingForward,
    targets: Sequence[Target],
    explain: Explain,
    generator: torch.Generator,
) -> Tensor:
    r"""Rank correlation of a word's map with its map among shuffled other tokens.

    Near 1: the map comes from the word and the image. Low: it also depends on the text around.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words, each shuffled around on its own.
        explain (callable): ``(forward, targets) -> maps``.
        generator (torch.Generator): draws the orders.

    Returns:
        Tensor: (N,) float64, in [-1, 1].
    """
    words = tuple(targets)
    before = _rows(_explained(forward, words, explain))
    found = []
    for row, word in zip(before, words, strict=True):
        other = shuffled_answer(forward, word, generator)
        after = _rows(_explained(other, (word,), explain))
        found.append(rank_correlation(row, after[0]))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def placebo(
    maps: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    *,
    groups: Tensor | None = None,
    metric: Callable[[Tensor, Tensor], Tensor] = obj_iou,
) -> tuple[Tensor, Tensor]:
    r"""Every word's mask scored with its own map, and with the map of another word.

    A method whose own score is not above the placebo's finds objects, but not the word's.

    Args:
        maps (Tensor): (N, H, W), non-negative, at mask resolution; N at least 2.
        masks (Tensor): bool (N, H, W), or (N, C, H, W).
        generator (torch.Generator): draws the other word, each equally likely.
        groups (Tensor, optional): (N,) integers; words of one group name one object ("red",
            "circle") and are no placebo for each other. Default: every word its own
        metric (callable, optional): of maps and masks. Default: :func:`obj_iou`

    Returns:
        tuple of Tensor: own and placebo scores, (N,) each.

    Raises:
        ValueError: a word without any other to draw from.
    """
    count = len(maps)
    kinds = torch.arange(count) if groups is None else groups.cpu()
    if maps.ndim != 3 or kinds.shape != (count,):
        raise InputError(
            f"maps have shape {tuple(maps.shape)} and groups {tuple(kinds.shape)}: expected (N, H, "
            "W) and (N,)"
        )
    drawn = []
    for n in range(count):
        others = (kinds != kinds[n]).nonzero()[:, 0]
        if len(others) == 0:
            raise InputError(
                f"word {n} has no other word to draw a map from: expected words of at least two "
                "objects"
            )
        at = torch.randint(len(others), (), generator=generator, device=generator.device)
        drawn.append(int(others[int(at)]))
    return metric(maps, masks), metric(maps[drawn], masks)


def structural_similarity(first: Tensor, second: Tensor, window: int = 7) -> Tensor:
    r"""SSIM of maps, each brought to [0, 1] by its lowest and highest value first.

    Uniform windows with the sample covariance, data range 1, constants 0.01² and 0.03², the mean
    taken where the whole window lies on the map. Smaller maps get the largest odd window that fits.
    A constant map becomes 0; two of them have a similarity of 1.

    Args:
        first, second (Tensor): (..., H, W), finite, of one shape; signed values are fine.
        window (int, optional): side of the window, odd. Default: 7

    Returns:
        Tensor: (...) float64, in [-1, 1].

    Source:
        Wang et al., Image quality assessment, 2004, Eq. 13.
    """
    if first.shape != second.shape or first.ndim < 2 or 0 in first.shape[-2:]:
        raise InputError(
            f"maps have shapes {tuple(first.shape)} and {tuple(second.shape)}: expected the same, "
            "(..., H, W) with H and W of at least 1"
        )
    check_odd(window, "structural_similarity", "window")
    shortest = min(first.shape[-2:])
    side = min(window, shortest - 1 + shortest % 2)
    leading = first.shape[:-2]
    wide = (x.detach().cpu().double().reshape(-1, 1, *x.shape[-2:]) for x in (first, second))
    axes = (-2, -1)
    one, two = (stretched(x, x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)) for x in wide)

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(values, side, stride=1)

    sample = side**2 / max(side**2 - 1, 1)
    m1, m2 = mean(one), mean(two)
    v1, v2 = (sample * (mean(x * x) - m * m) for x, m in ((one, m1), (two, m2)))
    both = sample * (mean(one * two) - m1 * m2)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * m1 * m2 + c1) * (2 * both + c2)
    bottom = (m1 * m1 + m2 * m2 + c1) * (v1 + v2 + c2)
    return (top / bottom).mean((-3, -2, -1)).reshape(leading)


def _cascade(adapter: Adapter) -> list[tuple[str, list[nn.Parameter]]]:
    """Stages of parameters, each parameter in the first stage that holds it."""
    seen: set[int] = set()
    stages = []
    blocks = [(f"block {i}", block) for i, block in enumerate(adapter.blocks)]
    for name, part in (*reversed(blocks), ("rest", adapter.model)):
        own = [p for p in part.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        for p in own:
            if not p.is_floating_point():
                raise MethodError(
                    f"{name} holds weights of type {p.dtype}, which cannot be drawn at random: "
                    "load the model without quantisation"
                )
        stages.append((name, own))
    return stages


@contextmanager
def _restored(guard: Guard) -> Iterator[Callable[[nn.Parameter, Tensor], None]]:
    """A function that replaces a parameter's values, until the context ends."""
    before: list[tuple[nn.Parameter, Tensor]] = []

    def replace_values(parameter: nn.Parameter, values: Tensor) -> None:
        # kept in main memory: the whole model must not lie twice on an accelerator
        before.append((parameter, parameter.detach().to("cpu", copy=True)))
        parameter.data.copy_(values)
        guard.changed()

    try:
        yield replace_values
    finally:
        for parameter, values in reversed(before):
            parameter.data.copy_(values)
        guard.changed()


def _drawn(parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    values = parameter.detach().float()
    drawn = torch.randn(values.shape, generator=generator, device=generator.device)
    return values.mean() + values.std(correction=0) * drawn.to(values)


def _explained(
    forward: DenoisingForward, targets: tuple[Target, ...], explain: Explain
) -> tuple[Tensor, ...]:
    """Maps of a forward for which nothing is kept: what is explained may have changed."""
    one_example(forward)
    fresh = forward.again(trajectory=replace(forward.trajectory, kept={}))
    maps = tuple(explain(fresh, targets))
    flat_maps(forward, maps, targets, "explain")  # checks them
    return tuple(m.detach().cpu().double() for m in maps)


def _rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, h, w) of all grids as rows (N, tokens)."""
    return torch.cat([m.flatten(1) for m in maps], dim=1)


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    grids = [structural_similarity(a, b) for a, b in zip(first, second, strict=True)]
    return rank_correlation(_rows(first), _rows(second)), torch.stack(grids).mean(0)
