"""Lines about maps: their type, how image tokens cluster, signs; and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.doctor.report import LOOK, OK, UNJUDGED, Line
from captum_dcam.doctor.subject import HALF, RANDOM, Subject, Unjudged
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import image_features, mapped_gradients
from captum_dcam.model.words import Target
from captum_dcam.presets import preset
from captum_dcam.refine.affinity import relatives
from captum_dcam.truth.signs import sign_check

#: correlation of maps in two types, from which they tell the same
ALIKE = 0.95
#: relatives of a token, over all others, below which affinity hardly spreads a map, and above which
#: it spreads it over the whole picture
FEW, MANY = 0.005, 0.5
#: words at once that are tried at most
MOST_WORDS = 256


def _trained(subject: Subject, line: Line) -> Line:
    """The line where the weights are trained; else what was measured, not judged."""
    if subject.trained:
        return line
    return Line(UNJUDGED, f"{RANDOM}; {line.found}", values=line.values)


def precision(subject: Subject) -> Line:
    """Correlation of one word's map in the model's type and in float32."""
    kind = str(subject.adapter.dtype).removeprefix("torch.")
    if subject.adapter.dtype not in HALF:
        return Line(OK, f"maps are computed in {kind}", values={"dtype": kind})
    own = _map(subject, subject.forward.again())
    with subject.widened() as forward:
        wide = _map(subject, forward)
    found = float(torch.corrcoef(torch.stack([own, wide]))[0, 1])
    text = f"a word's map in {kind} and in float32 correlate by {found:.3f}"
    step = "explain in float32, or trust large differences only"
    values = {"dtype": kind, "correlation": found}
    same = found >= ALIKE
    return _trained(subject, Line(OK if same else LOOK, text, "" if same else step, values))


def _map(subject: Subject, forward: DenoisingForward) -> Tensor:
    """The signed map of the first word, all grids in one row."""
    reading = preset("default").reading()
    found = maps.word_maps(forward, subject.targets[:1], [0], reading)
    return torch.cat([m.flatten() for m in found]).double().cpu()


def clustering(subject: Subject) -> Line:
    """Whether image tokens resemble some others at the block, as affinity propagation needs."""
    shares = torch.cat([relatives(f[0]).flatten() for f in image_features(subject.forward)])
    middle, most = (float(q) for q in shares.float().quantile(torch.tensor([0.5, 0.95]).to(shares)))
    alone = float((shares * (len(shares) - 1) < 0.5).float().mean())
    text = f"a token resembles {middle:.1%} of the others (5 % of tokens more than {most:.1%})"
    text += f"; {alone:.0%} resemble none"
    values = {"median": middle, "high": most, "alone": alone, "block": subject.forward.layer}
    if middle < FEW or middle > MANY:
        step = "compare maps with and without refinements, or fit the power: captum-dcam calibrate"
        return _trained(subject, Line(LOOK, text, step, values))
    return _trained(subject, Line(OK, text, values=values))


def sign(subject: Subject) -> Line:
    """Whether removing what a map highlights lowers its word more than removing random tokens."""
    explanation, *_ = subject.explained
    targets = subject.targets
    at = [explanation.targets.index(target) for target in targets]
    own = [m[at] for m in explanation.maps]
    falls = sign_check(subject.forward, targets, own, subject.generator, score="commit")
    right = int((falls[:, 0] > falls[:, 1]).sum())
    wrong = [t.text for t, (fall, _) in zip(targets, falls.tolist(), strict=True) if fall < 0]
    mean, random = falls.mean(0).tolist()
    text = (
        f"{right} of {len(targets)} maps: log-probability falls by {mean:.2f}, random {random:.2f}"
    )
    values = {"right": right, "words": len(targets), "fall": mean, "random": random}
    values |= {"inverted": wrong}
    if 2 * right < len(targets) or mean <= random:
        step = "try another block (--layer) or score; docs/SCORES.md has the sign check"
        return _trained(subject, Line(LOOK, text, step, values))
    return _trained(subject, Line(OK, text, values=values))


# -- cost ------------------------------------------------------------------------------------------


def cost(subject: Subject) -> Line:
    """Seconds and peak memory of one word and of all."""
    explanation, one, every = subject.explained
    count = len(explanation.targets)
    values: dict[str, Any] = {"words": count}
    texts = []
    for key, name, spent in (("one", "one word", one), ("all", f"all {count}", every)):
        memory = "memory unknown" if spent.peak_bytes is None else _bytes(spent.peak_bytes)
        texts.append(f"{name}: {spent.seconds:.2f} s, {memory}")
        values |= {f"{key}_seconds": spent.seconds, f"{key}_peak_bytes": spent.peak_bytes}
    return Line(OK, f"{'; '.join(texts)} above what was in use", values=values)


def _bytes(count: int) -> str:
    gib = count / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{count / 2**20:.1f} MiB"


def batch(subject: Subject) -> Line:
    """The largest number of words at once that fits into a GPU's memory."""
    forward = subject.forward
    if subject.adapter.device.type != "cuda":
        raise Unjudged(f"no memory of its own on {subject.adapter.device.type}")
    fits, size = 0, 1
    while size <= MOST_WORDS:
        try:
            _together(forward.again(), [subject.token] * size)
        except torch.cuda.OutOfMemoryError:
            break
        fits, size = size, 2 * size
    torch.cuda.empty_cache()
    if not fits:
        step = "choose a deeper block, a smaller image, or a method without gradients"
        return Line(LOOK, "not even one word fits", step, {"internal_batch_size": 0})
    more = "" if size <= MOST_WORDS else ", the most that was tried"
    return Line(OK, f"internal_batch_size={fits}{more}", values={"internal_batch_size": fits})


def _together(forward: DenoisingForward, targets: Sequence[Target]) -> None:
    """Differentiate targets in one batch, as the default preset does, and forget them."""
    mapped_gradients(
        forward,
        targets,
        [0] * len(targets),
        ["commit"] * len(targets),
        lambda _row: None,
        chunk=len(targets),
        backward=preset("default").reading().backward,
    )
