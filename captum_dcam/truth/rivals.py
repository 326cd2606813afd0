r"""Scores of words that others have published for autoregressive models, read from a generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam.methods import AttributionTask
from captum_dcam.methods.attention import Attentions
from captum_dcam.methods.lens import logits_in_chunks
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.sequence import image_positions, outputs_of, unkept
from captum_dcam.model.words import Target


@holding
@torch.no_grad()
def internal_confidence(forward: DenoisingForward, targets: Sequence[Target]) -> Tensor:
    r"""The highest probability that an image token gives a word, through the model's own head,
    after any block; of the word's least sure token.

    The states are those of the step that committed the token. Costs one pass with a prefix cache,
    and one per step without; and the output head at every image token of every block.

    Args:
        forward (DenoisingForward): with a bound generation of one example.
        targets (sequence of Target): N words.

    Returns:
        Tensor: (N,) float64, 0 to 1.

    Source:
        Jiang et al., Interpreting and editing vision-language representations to mitigate
        hallucinations (VL-interp), 2025, section 4.1; there of autoregressive models.
    """
    trajectory, adapter = forward.trajectory, forward.adapter
    shared = trajectory.cache == "prefix"
    wanted: dict[int, list[tuple[int, int]]] = {}
    for n, target in enumerate(targets):
        for position, token in zip(target.positions, target.token_ids, strict=True):
            step = 0 if shared else trajectory.step_of(0, position, "commit")
            wanted.setdefault(step, []).append((n, token))
    fresh, image_at = unkept(forward), image_positions(forward)
    blocks = dict(enumerate(adapter.blocks))
    found = torch.ones(len(targets), dtype=torch.float64)
    for step, some in wanted.items():
        with outputs_of(blocks, twins=adapter.step_blocks) as seen:
            fresh.replay(torch.tensor([0]), torch.tensor([step]))
        ids = torch.tensor([token for _, token in some])
        highest = torch.zeros(len(some), dtype=torch.float64)
        for outputs in seen.values():
            hidden = torch.cat([h[0] for h in outputs])
            for logits in logits_in_chunks(adapter, hidden[image_at.to(hidden.device)]):
                odds = logits.double().softmax(-1)[:, ids.to(logits.device)]
                highest = torch.maximum(highest, odds.amax(0).cpu())
        for (n, _), value in zip(some, highest.tolist(), strict=True):
            found[n] = min(float(found[n]), value)
    return found


@holding
def prelim_attention(forward: DenoisingForward, targets: Sequence[Target]) -> Tensor:
    r"""The attention that a word pays to the answer's tokens that were visible when it was
    committed, mean over heads, blocks and the word's tokens; high speaks against the word.

    Of an answer that was given, all its other tokens are visible.

    Args:
        forward (DenoisingForward): with a bound generation of one example.
        targets (sequence of Target): N words.

    Returns:
        Tensor: (N,) float64, 0 to 1.

    Raises:
        MethodError: the model's attention cannot be seen.

    Source:
        PAS, Prelim attention score: detecting object hallucinations in large vision-language
        models, 2025, arXiv:2511.11502; there of autoregressive models.
    """
    trajectory, prefix = forward.trajectory, forward.request.layout.prefix_length
    attentions = Attentions(AttributionTask(forward, tuple(targets), "commit"))
    commit = trajectory.commit_step[0].cpu()
    blocks = range(len(forward.adapter.blocks))
    out = torch.zeros(len(targets), dtype=torch.float64)
    order = sorted((int(commit[p]), p, n) for n, t in enumerate(targets) for p in t.positions)
    for step, position, n in order:  # tokens of one state after the other: a pass for each state
        visible = torch.ones_like(commit, dtype=torch.bool) if trajectory.forced else commit < step
        visible[position] = False
        row = attentions.row(position, blocks)[prefix : prefix + len(commit)]
        out[n] += float(row[visible].double().sum()) / len(targets[n].positions)
    return out
