r"""How LLaDA-V decodes: its caches, its record, and one step of it with gradients.

Every step runs the whole sequence. Two caches exist. Fast-dLLM runs the whole sequence at some
steps and the part from the current block on at the others, with keys and values of the rest from
the last whole run: a step's state is then the canvas, the canvas of that run, and where the part
begins. dLLM-Cache mixes outputs of several earlier steps at every block: a step is no function of
its own canvas, and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import CanvasRecorder, Step
from captum_dcam.errors import MethodError

MASK, BOS, EOS = 126336, 126080, 126081
HEADER, HEADER_END, TURN_END = 126346, 126347, 126348
#: ids that the decoder rules out at masked positions
FORBIDDEN = (EOS, BOS, HEADER, HEADER_END)
#: products of fewer rows take another kernel, and differ in their last bits
SAME_KERNEL = 8


def is_fast(blocks: Sequence[nn.Module]) -> bool:
    """Whether Fast-dLLM's hooks hang on the blocks' attention."""
    forward = vars(blocks[0].self_attn).get("forward")
    return forward is not None and "fast_dllm_cache" in inspect.signature(forward).parameters


def refuse_feature_cache(blocks: Sequence[nn.Module]) -> None:
    """MethodError when dLLM-Cache hangs on the blocks."""
    held = [i for i, b in enumerate(blocks) if "_old_forward" in vars(b)]
    if held:
        raise MethodError(
            f"dLLM-Cache has replaced the forward of {len(held)} of {len(blocks)} blocks "
            "(register_cache_LLaDA_V): at its cached steps the blocks return states of earlier "
            "steps, full in length but without a gradient to the image, so that no step can be "
            "replayed from its canvas. Switch the cache off: load the model again and do not "
            "register it (Fast-dLLM can stay)"
        )


def states_of(
    steps: Sequence[Step], guidance: float, fast: bool, final: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """States (S, 1, …) of recorded steps, and the final state (1, …) with the answer visible.

    The canvas alone; guided: with the scale; Fast-dLLM: with the canvas of the last whole run and
    the canvas position from which the step ran (-1 where it ran the whole sequence).
    """
    canvases = torch.stack([s.canvas for s in steps])
    if guidance > 0:
        scale = torch.full(canvases.shape[:2], float(guidance), device=canvases.device)
        return (canvases, scale), (final, scale[0])
    if not fast:
        return (canvases,), (final,)
    whole = [s for s in range(len(steps)) if steps[s].start == 0]
    behind = [max(w for w in whole if w <= s) for s in range(len(steps))]
    prefix = steps[0].length - steps[0].canvas.shape[1]
    begins = torch.tensor([[s.start - prefix if s.start else -1] for s in steps])
    begins = begins.to(canvases.device)
    return (canvases, canvases[behind], begins), (final, final, torch.full_like(begins[0], -1))


def last_runs(steps: Sequence[Step]) -> Tensor:
    """(1, W): the last step that ran each canvas position, which alone has logits there."""
    width = steps[0].canvas.shape[1]
    last = torch.zeros(1, width, dtype=torch.int64)
    for number, step in enumerate(steps):
        last[:, -min(step.length, width) :] = number
    return last


def step_logits(model: Any, prefix: Tensor, *state: Tensor) -> Tensor:
    """Logits (R, W, V) of one step: the part of the family's decoder between canvas and choice."""
    with mixed_precision(prefix.device):
        if len(state) == 3:
            return _cached_logits(model, prefix, *state)
        embeds = _joined(model, prefix, state[0])
        if len(state) == 1:
            return _head(model, model.model(inputs_embeds=embeds)[0], state[0].shape[1])
        blind = _joined(model, _mask(model).expand_as(prefix), state[0])
        hidden = model.model(inputs_embeds=torch.cat((embeds, blind)))[0]
        logits, unconditional = _head(model, hidden, state[0].shape[1]).chunk(2)
        return unconditional + (state[1][:, None, None] + 1) * (logits - unconditional)


def _cached_logits(
    model: Any, prefix: Tensor, canvas: Tensor, whole: Tensor, begins: Tensor
) -> Tensor:
    """Logits (R, W, V) of Fast-dLLM's steps: one whole run for all rows, then each row's part.

    Positions that a row's step did not run have logits 0.
    """
    cache: list[Any] = []
    front = prefix.shape[1]
    hidden = model.model(inputs_embeds=_joined(model, prefix, whole), fast_dllm_cache=cache)[0]
    width = canvas.shape[1]
    out = []
    for row, begin in enumerate(begins.tolist()):
        own = slice(row, row + 1)
        if begin < 0:
            out.append(_head(model, hidden[own], width))
            continue
        cut = [[t[own, :, : front + begin] for t in pair] for pair in cache]
        rest = model.model.embed_tokens(canvas[own, begin:])
        logits = _head(
            model, model.model(inputs_embeds=rest, fast_dllm_cache=cut)[0], width - begin
        )
        out.append(nn.functional.pad(logits, (0, 0, begin, 0)))
    return torch.cat(out)


def _mask(model: Any) -> Tensor:
    """(1, D) embedding of the mask token."""
    return model.model.embed_tokens(torch.tensor([MASK], device=model.lm_head.weight.device))


def _joined(model: Any, prefix: Tensor, canvas: Tensor) -> Tensor:
    words = model.model.embed_tokens(canvas)
    return torch.cat((prefix.to(words.dtype), words), dim=1)


def _head(model: Any, hidden: Tensor, width: int) -> Tensor:
    """Logits of the last ``width`` positions; the family computes all, and uses these."""
    rows = max(width, SAME_KERNEL)
    logits = model.lm_head(hidden[:, -rows:])[:, -width:]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mixed_precision(device: torch.device) -> Any:
    """The family decodes under CUDA autocast in float16, whatever the weights' type."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.float16)


def recorder_for(
    prefix: int, settings: dict[str, Any], suffix: Sequence[int], device: torch.device
) -> CanvasRecorder:
    """A recorder with the canvas before the first step: masks, then the suffix."""
    canvas = torch.full((1, settings["gen_length"] + len(suffix)), MASK, device=device)
    if suffix:
        canvas[0, -len(suffix) :] = torch.tensor(list(suffix), device=device)
    return CanvasRecorder(prefix, canvas, MASK, FORBIDDEN, settings["cfg_scale"])
