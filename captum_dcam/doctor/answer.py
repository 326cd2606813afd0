"""Lines about an answer: its words, its replay, rotary tables, the calls that hold the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.doctor.model import facts_of
from captum_dcam.doctor.report import LOOK, OK, STOP, UNJUDGED, Line
from captum_dcam.doctor.subject import RANDOM, Subject, Unjudged
from captum_dcam.model import buffers
from captum_dcam.model.verification import replayed
from captum_dcam.model.words import answer_text

#: words of the answer that a line shows
SHOWN = 12
#: a part of all positions, above which one token is a stutter
STUTTER = 0.5
#: positions of a rotary table that are looked at, and what may remain in half precision
ROWS, NEAR = 512, 0.02


def answer(subject: Subject) -> Line:
    """What the model writes."""
    trajectory, positions = subject.forward.trajectory, subject.positions
    tokens = trajectory.tokens[0].tolist()
    text = answer_text(subject.adapter, tokens)
    shown = " ".join(text.split()[:SHOWN])
    sure = float(trajectory.confidence[0, positions].float().mean()) if positions else 0.0
    values = {"answer": text, "tokens": len(positions), "mean_confidence": sure}
    if not positions:
        step = "ask for more tokens (gen_length), or another prompt"
        return Line(STOP, f"no token to explain among {len(tokens)}", step, values)
    found = f"{shown!r}, {len(positions)} tokens, {sure:.0%} sure on average"
    if not subject.trained:
        return Line(UNJUDGED, f"{RANDOM}; {found}", values=values)
    most = Counter(tokens[p] for p in positions).most_common(1)[0][1]
    if len(positions) >= SHOWN and most > STUTTER * len(positions):
        step = "compare with the authors' demo (decoding='demo'); look at template and weights"
        return Line(LOOK, f"{found}; one token fills half of it", step, values)
    return Line(OK, found, values=values)


def replay(subject: Subject) -> Line:
    """Whether a step of the generation, computed again, is the generation's."""
    forward = subject.forward
    with forward.held():
        found = replayed(subject.adapter, forward.request, forward.trajectory)
    if found is None:
        raise Unjudged("the answer has no token to explain")
    values = {"recorded": found.recorded, "replayed": found.replayed, "position": found.position}
    if found.recorded == found.replayed:
        return Line(OK, f"bit-equal: probability {found.recorded:.4g} twice", values=values)
    text = (
        f"probability {found.recorded:.6g} in the generation, {found.replayed:.6g} computed again"
    )
    if not found.far:
        return Line(OK, f"equal within rounding: {text}", values=values)
    step = (
        "take off hooks and caches that remember, torch.compile, quantisation or another attention "
        "than the model's code has; maps would explain another computation"
    )
    return Line(STOP, text, step, values)


def feasible(subject: Subject) -> Line:
    """Which calls of the generation hold the image."""
    trajectory = subject.forward.trajectory
    names = [call.name for call in trajectory.calls]
    held = trajectory.feasible
    values = {"calls": len(names), "feasible": list(held), "cache": trajectory.cache}
    text = f"{len(held)} of {len(names)} calls, cache {trajectory.cache!r}"
    if not held:
        return Line(STOP, text, "decode with another cache, or without one", values)
    listed = names[held[0]] if len(held) == 1 else f"{names[held[0]]} … {names[held[-1]]}"
    return Line(OK, f"{text}: {listed}", values=values)


# -- rotary tables, which generation and replay share ----------------------------------------------


def rotary(subject: Subject) -> Line:
    """Whether rotary tables are what their settings say, and these what the authors published."""
    model, known = subject.model, facts_of(subject.adapter).rotary
    wrong = buffers.wrong(model)
    tables = list(_position_tables(model))
    broken = [place for place, sin, cos in tables if not _turns(sin, cos)]
    bases = sorted(_bases(model))
    values = {"wrong": wrong, "broken": broken, "bases": bases, "published": list(known)}
    if wrong or broken:
        what = buffers.counted(wrong) if wrong else f"sines and cosines of {broken[0]}"
        step = "wrap it with verify=True, which computes them again, or load it anew"
        return Line(STOP, f"{what} no angles in order", step, values)
    text = f"base {', '.join(f'{b:g}' for b in bases) or 'unknown'}"
    checked = f"{len(tables)} cached tables in order" if tables else "no wrong table"
    if not known or not bases:
        found = f"{checked}; {text}, nothing to compare it with"
        return Line(UNJUDGED, found, values=values)
    if not set(bases) & set(known):
        expected = " or ".join(f"{b:g}" for b in known)
        step = "look whether config.json is the checkpoint's own"
        return Line(LOOK, f"{text}; {checked}; published: {expected}", step, values)
    return Line(OK, f"{text}, as published; {checked}", values=values)


def _bases(model: nn.Module) -> set[float]:
    """Bases of rotary frequencies that the model's configurations name."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    found: set[float] = set()
    for config in configs.values():
        inner = vars(config) if hasattr(config, "__dict__") else {}
        for name in ("rope_theta", "rope_parameters", "rope_scaling"):
            found |= set(_numbers(inner.get(name), name))
    return found


def _numbers(value: Any, name: str) -> Iterator[float]:
    """Values of ``rope_theta`` in a setting, which may be nested."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif name == "rope_theta" and isinstance(value, int | float):
        yield float(value)


def _position_tables(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Cached sines and cosines (…, L, d) of positions that modules for rotary embeddings keep."""
    seen: set[int] = set()
    for place, module in model.named_modules():
        if "rotary" not in type(module).__name__.lower():
            continue
        for held in (v for v in vars(module).values() if isinstance(v, Mapping)):
            sines = {n: t for n, t in held.items() if isinstance(t, Tensor) and "sin" in str(n)}
            for name, sin in sines.items():
                cos = held.get(str(name).replace("sin", "cos"))
                if isinstance(cos, Tensor) and sin.ndim >= 2 and id(sin) not in seen:
                    seen.add(id(sin))
                    yield place, sin, cos


def _turns(sin: Tensor, cos: Tensor) -> bool:
    """Whether row p turns by p times the angles of row 1, which fall in each half."""
    table = torch.complex(*(t.detach().double().flatten(0, -2)[:ROWS].cpu() for t in (cos, sin)))
    if len(table) < 2:
        return True
    angles = table[1].angle()
    falls = all(bool((half.diff() <= NEAR).all()) for half in angles.chunk(2))
    steps = table[:-1] * table[1]
    return falls and bool(((table[1:] - steps).abs() <= NEAR).all())
