"""Check 7: the last block's output, through ``unembed`` at ``query_position``, is the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from captum_dcam.errors import MethodError
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.sequence import outputs_of, unkept
from captum_dcam.testing.case import AdapterCase, expect

#: what may differ, over the largest logit: the head is run on other rows than in the model
ROUNDING = 1e-5


@torch.no_grad()
def check_head(case: AdapterCase) -> str:
    r"""For every position of an answer, in the step that writes it: the last block's output at
    ``query_position``, through final norm and head (``unembed``), is its replayed logits; for every
    example of a batch. Methods that read logits out of hidden states rest on it (logit lens, TAM,
    ARC, the relevance of text).

    Guided decoding runs a row without the image behind the example's: there the logits are
    :math:`u + w (c - u)` of both rows', with one weight for all positions of a step. A step that
    runs a part of the sequence against a cache has no such output; its positions are counted.

    Returns:
        str: how many positions were compared; that the adapter declares no ``unembed``, where it
        raises MethodError.

    Raises:
        ConformanceError: position, step, and how far the two are apart.
    """
    adapter = case.make(torch.float32)
    if adapter.batches:
        shown, asked = [[case.picture(s)] for s in (0, 1)], [case.prompt, case.other_prompt]
        both = case.bound(adapter, images=shown, prompts=asked)
        forwards = [single(both, b) for b in (0, 1)]
    else:
        forwards = [case.bound(adapter)]
    compared, guided = 0, False
    for forward in forwards:
        try:
            with forward.held():
                own, rows = _compare(case, forward)
        except MethodError as error:
            return f"not compared, no unembed: {error}"
        expect(
            own > 0,
            "no position is written in a step that runs the whole sequence: nothing could be "
            "compared",
        )
        compared, guided = compared + own, guided or rows > 1
    count = sum(f.trajectory.tokens.shape[1] for f in forwards)
    rest = f" of {count}: others are written in a part of the sequence" if compared < count else ""
    return f"{compared} positions{rest}{', guided' if guided else ''}"


def _compare(case: AdapterCase, forward: DenoisingForward) -> tuple[int, int]:
    """Number of positions that were compared in their steps, and of the rows of a step."""
    trajectory = forward.trajectory
    written = trajectory.commit_step[0].tolist()
    compared, rows = 0, 1
    for step in sorted(set(written)):
        hidden, logits = _step(forward, step)
        if hidden is not None:
            own = [p for p, at in enumerate(written) if at == step]
            _check_rows(case, forward, step, own, hidden, logits[own])
            compared, rows = compared + len(own), max(rows, len(hidden))
    return compared, rows


def _step(forward: DenoisingForward, step: int) -> tuple[Tensor | None, Tensor]:
    """The last block's output (R, L, D) of a step, of the row that sees the image first, and the
    logits (T, V); None where the step ran a part of the sequence."""
    adapter = forward.adapter
    last = len(adapter.blocks) - 1
    with outputs_of({last: adapter.blocks[last]}, twins=adapter.step_blocks) as found:
        logits = unkept(forward).replay(torch.tensor([0]), torch.tensor([step]))[0]
    # behind a cached prefix, and in modules of their own, a step goes on where the prefill ended
    joined = forward.trajectory.cache == "prefix" or bool(adapter.step_blocks)
    hidden = torch.cat(found[last], 1) if joined else found[last][-1]
    length = forward.request.layout.prefix_length + len(logits)
    if adapter.step_blocks:  # later canvases are not there yet
        hidden = pad(hidden, (0, 0, 0, max(0, length - hidden.shape[1])))
    return (hidden if hidden.shape[1] == length else None), logits


def _check_rows(
    case: AdapterCase,
    forward: DenoisingForward,
    step: int,
    positions: list[int],
    hidden: Tensor,
    wanted: Tensor,
) -> None:
    """Compare logits (n, V) with what the head makes of hidden states (R, L, D)."""
    adapter, layout = forward.adapter, forward.request.layout
    near = max(case.tolerance, ROUNDING)
    queries = [adapter.query_position(layout, p) for p in positions]
    expect(
        all(0 <= q < hidden.shape[1] for q in queries),
        f"query_position gives {queries} for positions {positions}: the sequence has "
        f"{hidden.shape[1]} positions",
    )
    found = _joined(adapter.unembed(hidden[:, queries]).double(), wanted.double())
    expect(
        found.shape == wanted.shape,
        f"unembed gives {tuple(found.shape)} for {len(positions)} rows, the logits are "
        f"{tuple(wanted.shape)}",
    )
    gaps = (found - wanted).abs().amax(-1) / wanted.abs().max().clamp_min(1e-30)
    worst = int(gaps.argmax())
    expect(
        float(gaps[worst]) <= near,
        f"position {positions[worst]} at step {step}: the last block's output at {queries[worst]}, "
        f"through unembed, differs from its logits by {float(gaps[worst]):.1e} of the largest: "
        f"expected at most {near:.0e}; query_position is the place whose output predicts the "
        "position (one less where models predict the next token), unembed the final norm and the "
        "head, with all scales",
    )


def _joined(found: Tensor, wanted: Tensor) -> Tensor:
    """Rows (R, n, V) as the model joins them: one row as it is, two with the guidance that fits
    best."""
    if len(found) == 1:
        return found[0]
    expect(len(found) == 2, f"the last block ran {len(found)} rows for one example, not 1 or 2")
    seeing, blind = found
    apart = seeing - blind
    weight = ((wanted - blind) * apart).sum() / apart.square().sum().clamp_min(1e-30)
    return blind + weight * apart
