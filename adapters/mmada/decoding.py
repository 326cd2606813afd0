r"""How MMaDA and Lumina-DiMOO decode: settings, record, and one step with gradients.

MMaDA's model has a method for it, ``mmu_generate``. Lumina-DiMOO's loop is a function of its script
(``generate_text_understanding``), written anew here; behind its canvas a token stands that closes
the answer, which is seen at every step: it counts as the canvas's last token. The cache of the
authors (by the largest logit) is for images that it writes, and no part of this loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import CanvasLog, guided
from captum_dcam.adapters.common.settings import GUIDED, Setting, Settings, length
from captum_dcam.adapters.common.text import SpecialIds

SETTINGS = Settings(
    "MMaDA",
    {
        "max_new_tokens": Setting(128, length, also="gen_length"),
        **GUIDED,
    },
    refused={
        "top_k": "MMaDA accepts and ignores it",
        "eot_token": "MMaDA accepts and ignores it: an answer is always as long as its canvas",
        "attention_mask": "a batch here has no padding, so there is nothing to mask",
    },
)


def step_logits(
    model: Any,
    prefix: Tensor,
    mask_id: int,
    tail: int,
    canvas: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    r"""Logits (R, T, V) of one step: what the decoder computes before it chooses.

    Guided, R rows follow in which the whole prompt, image included, is masked.

    Args:
        model (nn.Module): the language model.
        prefix (Tensor): (R, P, D) embeddings of the prompts.
        mask_id (int): id of the mask.
        tail (int): ids at the canvas's end that are given, which Lumina-DiMOO has.
        canvas (Tensor): (R, T) ids.
        scale (Tensor, optional): (R,) guidance scale.
    """
    words = model.get_input_embeddings()
    answer = words(canvas)
    embeds = torch.cat((prefix.to(answer.dtype), answer), dim=1)
    if scale is not None:
        mask = words(canvas.new_tensor([mask_id]))
        open_ = answer[:, : canvas.shape[1] - tail]
        end = mask.expand_as(answer[:, open_.shape[1] :])
        embeds = torch.cat((embeds, torch.cat((mask.expand_as(prefix), open_, end), dim=1)))
    logits = _run(model, embeds, bool(tail)).logits[:, prefix.shape[1] :]
    return logits if scale is None else guided(logits, scale[:, None, None])


def _run(model: Any, embeds: Tensor, listed: bool) -> Any:
    """The model on embeddings (R, L, D). No attention_mask: one with zeros would make it causal.
    Lumina-DiMOO's forward takes lists of ids, and calls its parent's with a bias of ones."""
    if not listed:
        return model(inputs_embeds=embeds, use_cache=False, return_dict=True)
    rows, length = embeds.shape[:2]
    ones = torch.ones(rows, 1, length, length, dtype=torch.bool, device=embeds.device)
    parent: Any = next(c for c in type(model).__mro__ if c.__name__ == "LLaDAModelLM")
    return parent.forward(model, inputs_embeds=embeds, attention_bias=ones, return_dict=True)


def written(
    model: Any, ids: Tensor, tail: Sequence[int], special: SpecialIds, made: dict[str, Any]
) -> Tensor:
    r"""Write block after block of an answer, as Lumina-DiMOO's script does.

    The script means to stop behind a block that holds the end of the answer; it fails there, by a
    name that it does not define. Here the rest is filled with EOS once all rows have their end.

    Args:
        model (nn.Module): called as ``model(ids, infer=True)``.
        ids (Tensor): (B, P) prompts.
        tail (sequence of int): ids behind the canvas.
        special (SpecialIds): the vocabulary's.
        made (dict): checked settings.

    Returns:
        Tensor: (B, P + T + tail) ids.
    """
    count, block, scale = made["max_new_tokens"], made["block_length"], made["cfg_scale"]
    open_ = ids.new_full((len(ids), count), special.mask)
    x = torch.cat((ids, open_, ids.new_tensor(tail).expand(len(ids), len(tail))), dim=1)
    given, first = x != special.mask, ids.shape[1]
    each = made["steps"] * block // count
    for end in range(first + block, first + count + 1, block):
        todo = (x[:, end - block : end] == special.mask).sum(1)
        for step in range(each):
            masked = x == special.mask
            if scale > 0:
                both = torch.cat((x, x.masked_fill(given, special.mask)))
                logits = guided(model(both, infer=True).logits, scale)
            else:
                logits = model(x, infer=True).logits
            best, sure = chosen(logits, made)
            sure[:, end:] = -torch.inf
            sure = sure.masked_fill(~masked, -torch.inf)
            for row in range(len(x)):
                number = int(todo[row] // each + (step < todo[row] % each))
                where = sure[row].topk(number).indices
                x[row, where] = torch.where(masked[row], best[row], x[row])[where]
        if bool((x[:, first:end] == special.eos).any(1).all()):
            x[:, end : first + count] = special.eos
            break
    return x


def chosen(logits: Tensor, made: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) by logits (B, L, V), and what ranks them, float64."""
    noisy = logits
    if made["temperature"] > 0:
        noisy = logits.double()
        noise = torch.rand_like(noisy)
        noisy = noisy.exp() / (-noise.log()) ** made["temperature"]
    best = noisy.argmax(-1)
    if made["remasking"] == "random":
        return best, torch.rand(best.shape, device=best.device)
    return best, logits.double().softmax(-1).gather(-1, best[..., None])[..., 0]


@contextmanager
def logged(model: nn.Module, prefix: int, mask_id: int, scale: float) -> Iterator[CanvasLog]:
    """Record a decoder, which keeps no history, from the model's inputs and outputs."""
    log = CanvasLog(mask_id)

    def before(_module: nn.Module, args: Sequence[Tensor]) -> None:
        ids = args[0].chunk(2)[0] if scale > 0 else args[0]
        log.see(ids[:, prefix:])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        logits = output.logits[:, prefix:]
        log.read(guided(logits, scale) if scale > 0 else logits)

    with model.register_forward_pre_hook(before), model.register_forward_hook(after):
        yield log
