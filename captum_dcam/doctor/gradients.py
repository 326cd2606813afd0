"""Lines about gradients: whether they are the model's slopes, whether their type holds them, and
what norms leave of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from captum_dcam.doctor.report import LOOK, OK, STOP, Line
from captum_dcam.doctor.subject import HALF, Subject, Unjudged
from captum_dcam.errors import MethodError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import TargetGradients, target_gradients
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.tap import wide
from captum_dcam.testing.gradients import edited_logit

#: steps of finite differences, over the length of the states: the best one counts, for a small one
#: drowns in rounding and a large one in curvature; of half-precision types
STEPS, COARSE_STEPS = (1e-3, 1e-2, 1e-4), (1e-2, 3e-2, 3e-3)
#: what may remain between slope and difference, over the larger of slope and typical slope; a path
#: that is missing or doubled leaves more than the last, and so may a coarse type by itself
NEAR, COARSE, FAR = 0.05, 0.3, 0.5
#: shares of gradients that are zero, or too small for their type to hold all digits
MOST_ZERO, MOST_SUBNORMAL = 0.1, 0.1


def gradient(subject: Subject) -> Line:
    """At each usable block: is the gradient of a token's logit its slope along two directions?"""
    with _fine(subject) as (forward, coarse):
        apart = {b: _at_block(subject, forward.again(b), coarse) for b in _usable(subject)}
    worst = {name: max(found[name] for found in apart.values()) for name in apart[0]}
    block = max(apart, key=lambda b: max(apart[b].values()))
    listed = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    kind = subject.adapter.dtype if coarse else torch.float32
    how = f"{str(kind).removeprefix('torch.')}, blocks 0 to {max(apart)}"
    text = f"differs from finite differences by at most: {listed} ({how})"
    if coarse:
        text += "; too coarse for a random direction"
    values = {"blocks": {str(b): found for b, found in apart.items()}, "dtype": str(kind)}
    limit = COARSE if coarse else NEAR
    if max(worst.values()) > FAR and not coarse:
        step = "a path from image to answer is missing or doubled: report it with this file"
        return Line(STOP, f"{text}; block {block} worst", step, values)
    if max(worst.values()) > limit:
        step = "load it in float32 and look again; report it if it stays"
        return Line(LOOK, f"{text}; block {block} worst", step, values)
    return Line(OK, text, values=values)


def _usable(subject: Subject) -> range:
    return range(subject.adapter.deepest_block + 1)


@contextmanager
def _fine(subject: Subject) -> Iterator[tuple[DenoisingForward, bool]]:
    """The answer, in float32 where that fits, and whether its type is a coarse one."""
    if subject.adapter.dtype not in HALF:
        yield subject.forward, False
        return
    with ExitStack() as stack:
        try:
            found = stack.enter_context(subject.widened()), False
        except Unjudged:
            found = subject.forward, True
        yield found


def _at_block(subject: Subject, forward: DenoisingForward, coarse: bool) -> dict[str, float]:
    """How far slope and difference are apart, by direction."""
    target = subject.token
    with forward.held():
        (row,) = target_gradients(forward, [target])
        found = {}
        for name, direction in _directions(subject, row, coarse).items():
            slope, typical = _along(row, direction)
            best = float("inf")
            for size in COARSE_STEPS if coarse else STEPS:
                ends = [
                    edited_logit(
                        forward,
                        target,
                        lambda m, i, by=by, d=direction: (wide(m) + by * d[i]).to(m.dtype),
                    )
                    for by in (size, -size)
                ]
                apart = abs((ends[0] - ends[1]) / (2 * size) - slope)
                best = min(best, apart / max(typical, abs(slope)))
                if best <= NEAR:
                    break
            found[name] = best
    return found


def _directions(
    subject: Subject, row: TargetGradients, coarse: bool
) -> dict[str, Sequence[Tensor]]:
    """Directions as long as the states: of the gradient, which changes the logit most, and a random
    one, which alone sees a path that is orthogonal to the others; its change is small."""
    long = _length(row.features)
    own = [wide(g) * (long / _length(row.gradients)) for g in row.gradients]
    found: dict[str, Sequence[Tensor]] = {"its own direction": own}
    if not coarse:
        drawn = subject.generator
        noise = [torch.randn(g.shape, generator=drawn).to(g.device) for g in row.gradients]
        found["a random one"] = [n * (long / _length(noise)) for n in noise]
    return found


def _length(tensors: Sequence[Tensor]) -> float:
    return float(sum(wide(t).square().sum() for t in tensors)) ** 0.5


def _along(row: TargetGradients, direction: Sequence[Tensor]) -> tuple[float, float]:
    """The slope along a direction, and how large slopes along such directions are."""
    products = [wide(g) * d for g, d in zip(row.gradients, direction, strict=True)]
    return float(sum(p.sum() for p in products)), _length(products)


def small(subject: Subject) -> Line:
    """How many gradients are zero, and how many so small that their type drops digits of them."""
    forward = subject.forward
    rows = target_gradients(forward, subject.targets[:1])
    values = torch.cat([g.detach().flatten().abs() for row in rows for g in row.gradients])
    zero = float((values == 0).double().mean())
    least = torch.finfo(values.dtype).tiny
    low = float(((values > 0) & (values < least)).double().mean())
    kind = str(values.dtype).removeprefix("torch.")
    text = f"{zero:.2%} zero, {low:.2%} subnormal in {kind}"
    found = {"zero": zero, "subnormal": low, "dtype": kind}
    if zero > MOST_ZERO or low > MOST_SUBNORMAL:
        step = "load it in bfloat16 or float32, and compare the maps"
        return Line(LOOK, text, step, found)
    return Line(OK, text, values=found)


def norms(subject: Subject) -> Line:
    """Cosine of state and gradient, exact and with the statistics of norms constant, which the
    default preset has: exact gradients are blind along the state."""
    found: dict[str, float] = {}
    for backward in BACKWARDS:
        try:
            rows = target_gradients(subject.forward, [subject.token], backward=backward)
        except MethodError as error:
            step = 'load it without fused or compiled norms, or explain with backward="exact"'
            return Line(STOP, str(error), step, found)
        found[backward] = _cosine(rows[0])
    exact, constant = (found[b] for b in BACKWARDS)
    text = f"mean |cosine| of state and gradient {exact:.3f} exact, {constant:.3f} constant norms"
    if constant <= exact:
        step = 'compare maps with backward="exact": constant norms may not help this model'
        return Line(LOOK, text, step, found)
    return Line(OK, text, values=found)


def _cosine(row: TargetGradients) -> float:
    """Mean over image tokens of |cos(state, gradient)|."""
    pairs = zip(row.features, row.gradients, strict=True)
    each = [
        torch.cosine_similarity(wide(f), wide(g), dim=0, eps=1e-30).abs().flatten()
        for f, g in pairs
    ]
    return float(torch.cat(each).mean())
