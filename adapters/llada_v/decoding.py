r"""How LLaDA-V decodes: its settings, its caches, its record, and one step of it with gradients.

Every step runs the whole sequence. Two caches exist. Fast-dLLM runs the whole sequence at some
steps and the part from the current block on at the others, with keys and values of the rest from
the last whole call: a step's state is then the canvas, the canvas of that run, and where the part
begins. dLLM-Cache mixes outputs of several earlier steps at every block: a step is no function of
its own canvas, and is refused.

ReDiff's decoder fills masks as LLaDA-V's does, and writes the tokens of the block anew that are no
longer masked, at every step. A token commits at the step that changed it last.

VidLaDA's decoder computes logits of the current block only; a step's state is the canvas and the
block's length, by which the head runs here too: products of other sizes differ in their last bits.
Once a stop is found, it can write tokens of the block anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import guided
from captum_dcam.adapters.common.settings import (
    GUIDED,
    Setting,
    Settings,
    length,
    one_of,
    read_guided,
    share,
)
from captum_dcam.adapters.common.text import SpecialIds
from captum_dcam.errors import InputError, InputTypeError, MethodError
from captum_dcam.model.trajectory import Given

#: products of fewer rows take another kernel, and differ in their last bits
SAME_KERNEL = 8


SETTINGS = Settings(
    "LLaDA-V",
    {
        "gen_length": Setting(128, length),
        **GUIDED,
        "stopping_criteria": Setting(("<|eot_id|>",)),
        "generation_suffix": Setting(),
        "prefix_refresh_interval": Setting(),
        "revise": Setting(False, one_of(False, True)),
        "revise_start": Setting(None, share),
        "revise_topk": Setting(None, share),
    },
    refused={
        "max_new_tokens": "LLaDA-V ignores it: use gen_length",
        "fake_ans": "a draft would be an answer that no step has committed",
    },
)


def checked(
    given: dict[str, Any], generator: torch.Generator | None, fast: bool, revises: bool
) -> dict[str, Any]:
    """Arguments for the family's ``generate``; raises before any work on what cannot work."""
    out = read_guided(SETTINGS, given, generator, "gen_length")
    if isinstance(out["stopping_criteria"], str):
        raise InputTypeError("stopping_criteria is a string: expected a list of stop strings")
    if fast and out["cfg_scale"] > 0:
        raise InputError(
            f"cfg_scale is {out['cfg_scale']}: Fast-dLLM fails on guided decoding; call "
            "unregister_fast_dllm_hook(hook), or leave cfg_scale at 0"
        )
    refresh = out["prefix_refresh_interval"]
    if refresh is None:
        del out["prefix_refresh_interval"]
    elif not fast or refresh < 1:
        raise InputError(
            f"prefix_refresh_interval is {refresh}: it is a setting of Fast-dLLM, at least 1; "
            "register its hook first"
        )
    out["stopping_criteria"] = list(out["stopping_criteria"]) or None
    return _revising(out, revises)


def _revising(out: dict[str, Any], revises: bool) -> dict[str, Any]:
    """The settings of ReDiff's decoder are passed on to it alone: others swallow them."""
    own = {name: out.pop(name) for name in ("revise", "revise_start", "revise_topk")}
    if not own["revise"]:
        for name, value in own.items():
            if name != "revise" and value is not None:
                raise InputError(f"{name} is {value}: it is a setting of revise=True")
        return out
    if not revises:
        raise InputError(
            "revise is True, but this model's generate knows no such argument and would ignore it: "
            "load the model by ReDiff's package (jiyt17/ReDiff, its folder train on PYTHONPATH in "
            "place of LLaDA-V's)"
        )
    return {**out, **{name: value for name, value in own.items() if value is not None}}


def check_given(
    given: Given | None, options: dict[str, Any], asked: dict[str, Any], fast: bool
) -> None:
    """Raise for what excludes given tokens; where some are, nothing stops the answer."""
    if given is None:
        return
    if fast:
        raise MethodError(
            "Fast-dLLM makes a canvas of its own, in which no given token can stand: "
            "call unregister_fast_dllm_hook(hook) to fill the holes of an answer"
        )
    if options.get("revise"):
        raise InputError(
            "revise is True, beside an answer with holes: ReDiff's decoder rewrites tokens, the "
            "given ones too; leave it out"
        )
    if options["generation_suffix"]:
        raise InputError(
            f"generation_suffix is {options['generation_suffix']!r}, beside an answer with holes: "
            "write it at the answer's end"
        )
    if bool(given.at.any()):
        if asked.get("stopping_criteria"):
            raise InputError(
                f"stopping_criteria is {asked['stopping_criteria']!r}, beside an answer with "
                "holes: a stop would cut the given words behind it; leave it out"
            )
        options["stopping_criteria"] = None


def ruled_out(logits: Tensor, ids: SpecialIds) -> Tensor:
    """A copy of logits (B, T, V) in which the ids that the decoder never writes have none."""
    logits = logits.clone()
    logits[:, :, [ids.eos, ids.bos, ids.header, ids.header_end]] = -torch.inf
    return logits


@dataclass(frozen=True)
class Step:
    """One call of the transformer: the canvas (1, W) it was given, and the part it was given.

    ``length`` tokens from sequence position ``start`` on went in; the rest came from a cache.
    """

    canvas: Tensor
    start: int
    length: int


@dataclass
class CanvasRecorder:
    r"""Canvas, commits and confidences of a decoder that works on embeddings in place.

    Every step such a decoder runs ``transformer(inputs_embeds=…)``, then ``head``, and embeds the
    candidates of all positions it ran with ``words``. Where the embeddings differ at the next step,
    the candidate was committed.

    Args:
        prefix (int): tokens before the canvas.
        canvas (Tensor): (1, W) ids before the first step.
        guidance (float): the decoder's classifier-free guidance scale; above 0, row 1 of a call is
            the unconditional one.
        ids (SpecialIds): the vocabulary's.
    """

    prefix: int
    canvas: Tensor
    guidance: float
    ids: SpecialIds
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit_step = torch.full_like(self.canvas, -1)
        self.confidence = torch.zeros(self.canvas.shape, device=self.canvas.device)
        self._embeds: Tensor | None = None
        self._logits: Tensor | None = None
        self._prompt: Tensor | None = None
        self._hidden: Tensor | None = None
        self._at = 0  # the canvas position of the first row of the logits

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Hooks on the transformer, the head and the embedding of ids while the context is open."""
        with (
            model.model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.model.register_forward_hook(self._ran),
            model.lm_head.register_forward_hook(self._after),
            model.model.embed_tokens.register_forward_hook(self._embedded),
        ):
            yield

    def _before(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"][:1]
        width, length = self.canvas.shape[1], embeds.shape[1]
        start = self.prefix + width - length
        seen = min(width, length)
        if start == 0:
            self._check_prompt(embeds[:, : self.prefix])
        now = embeds[:, -seen:].clone()  # changed in place afterwards
        if self._embeds is not None:
            moved = (now != self._embeds[:, -seen:]).any(-1)
            self._commit(moved, width - seen)
            now = torch.cat((self._embeds[:, : width - seen], now), dim=1)
        self._embeds = now
        self.steps.append(Step(self.canvas.clone(), start, length))

    def _check_prompt(self, prompt: Tensor) -> None:
        """MethodError where the decoder has written into its own prompt: ReDiff's takes as many
        tokens as it wants, also where fewer may be written."""
        if self._prompt is None:
            self._prompt = prompt.clone()
        elif not torch.equal(prompt, self._prompt):
            where = (prompt != self._prompt).any(-1)[0].nonzero()[:, 0].tolist()
            raise MethodError(
                f"step {len(self.steps) - 1} wrote over the prompt's embeddings at {where}, so "
                "that later steps saw another prompt and cannot be replayed: ReDiff's decoder does "
                "so where a stop has been found and revise_topk asks for more tokens than stand "
                "before it; leave out revise_topk, or give stopping_criteria=[]"
            )

    def _ran(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._hidden = output[0]

    def _first(self, given: Tensor) -> int:
        """The canvas position of the head's first row: VidLaDA's head is given a block of it."""
        width, rows = self.canvas.shape[1], given.shape[1]
        hidden, self._hidden = self._hidden, None
        if hidden is None or rows == hidden.shape[1]:
            return width - min(width, rows)
        own = hidden[:, -width:].to(given.device)
        return next(
            at for at in range(0, width, rows) if torch.equal(own[:, at : at + rows], given)
        )

    def _after(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._at = self._first(args[0])
        seen = min(self.canvas.shape[1], output.shape[1])
        rows = output[:, -seen:].float()
        if self.guidance > 0:
            rows = guided(rows, self.guidance)
        # a copy: the decoder writes into its logits
        self._logits = ruled_out(rows[:1], self.ids)

    def _embedded(self, _module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        if self._logits is None:
            return
        seen = self._logits.shape[1]
        self._chosen = args[0][:, -seen:].clone()
        probability = self._logits.double().softmax(-1).gather(-1, self._chosen[..., None])
        self._sure, self._logits = probability[..., 0].float(), None

    def _commit(self, moved: Tensor, offset: int) -> None:
        """Take the last step's candidates where ``moved`` (1, seen) from position ``offset`` on."""
        where = torch.zeros_like(self.canvas, dtype=torch.bool)
        where[:, offset:] = moved
        padding = (self._at, self.canvas.shape[1] - self._chosen.shape[1] - self._at)
        self.canvas = torch.where(where, nn.functional.pad(self._chosen, padding), self.canvas)
        sure = nn.functional.pad(self._sure, padding)
        self.confidence = torch.where(where, sure, self.confidence)
        self.commit_step[where] = len(self.steps) - 1

    def finish(self, answer: Tensor) -> None:
        """Take what the last step committed from the decoder's result (1, N), N <= W."""
        moved = self.canvas[:, : answer.shape[1]] != answer
        self._commit(nn.functional.pad(moved, (0, self.canvas.shape[1] - moved.shape[1])), 0)
        self.commit_step[self.commit_step < 0] = len(self.steps) - 1
        self.confidence = self.confidence.cpu()
        self.tokens = torch.full_like(self.canvas, self.ids.eos)
        self.tokens[:, : answer.shape[1]] = answer


def replaced(module: Any) -> Any:
    """What stands in the place of a module's forward, accelerate's hook aside, over it or under it;
    None where it is the class's own."""
    own = vars(module)
    forward = own.get("forward")
    if "_hf_hook" in own and getattr(forward, "__wrapped__", None) is own.get("_old_forward"):
        forward = own["_old_forward"]
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def is_fast(blocks: Sequence[nn.Module]) -> bool:
    """Whether Fast-dLLM's hooks hang on the blocks' attention."""
    forward = replaced(blocks[0].self_attn)
    return forward is not None and "fast_dllm_cache" in inspect.signature(forward).parameters


def refuse_feature_cache(blocks: Sequence[nn.Module]) -> None:
    """MethodError when dLLM-Cache hangs on the blocks; accelerate keeps a forward by the same
    name."""
    held = [i for i, b in enumerate(blocks) if "_old_forward" in vars(b) and replaced(b)]
    if held:
        raise MethodError(
            f"dLLM-Cache has replaced the forward of {len(held)} of {len(blocks)} blocks "
            "(register_cache_LLaDA_V): at its cached steps the blocks return states of earlier "
            "steps, full in length but without a gradient to the image, so that no step can be "
            "replayed from its canvas. Switch the cache off: load the model again and do not "
            "register it (Fast-dLLM can stay)"
        )


def refuse_copied_cache(blocks: Sequence[nn.Module]) -> None:
    """MethodError when Fast-dLLM fills its cache behind accelerate's hooks, which hand a copy of it
    to every block."""
    hook: Any = vars(blocks[0]).get("_hf_hook")
    moves = getattr(hook, "execution_device", None) is not None
    if moves and "fast_dllm_cache" not in (hook.skip_keys or ()):
        raise MethodError(
            "Fast-dLLM is registered on a model that accelerate has spread: its hooks hand every "
            "block a copy of the cache, so that the cache stays empty. Spread it by "
            "dispatch_model(…, skip_keys='fast_dllm_cache'), or unregister Fast-dLLM"
        )


def states_of(
    steps: Sequence[Step], guidance: float, fast: bool, final: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """States (S, 1, …) of recorded steps, and the final state (1, …) with the answer visible.

    The canvas alone; guided: with the scale; Fast-dLLM: with the canvas of the last whole call and
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


def unsettled(
    steps: Sequence[Step], commit_step: Tensor, mask_id: int, settings: dict[str, Any]
) -> Tensor:
    """(1, W) bool: tokens that the last step of their block wrote over another token. A block gets
    its share of the steps, or is left before, as soon as none of its tokens is masked."""
    total, block = settings["gen_length"], settings["block_length"]
    each = settings["steps"] * block // total
    canvases = torch.cat([s.canvas for s in steps])
    masked = (canvases == mask_id).cpu()
    last, step = torch.full(commit_step.shape, -1), 0
    for begin in range(0, total, block):
        own = slice(begin, begin + block)
        end = min(step + each, len(steps))
        while step < end and bool(masked[step, own].any()):
            step += 1
        last[:, own] = step - 1
    when = commit_step.cpu()
    return (when == last) & ~masked.gather(0, when)


def by_block(
    states: Sequence[Tensor], final: Sequence[Tensor], block: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """States and final state of VidLaDA: with the block's length, (S, 1) and (1,)."""
    lengths = torch.full(states[0].shape[:2], block, device=states[0].device)
    return (*states, lengths), (*final, lengths[0])


def split_block(state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int | None]:
    """A state of VidLaDA without the block's length, and that; None where an answer was given."""
    if len(state) == 1 or state[-1].is_floating_point():
        return state, None
    return state[:-1], int(state[-1].max())


def runs(steps: Sequence[Step]) -> Tensor:
    """(S, 1, W) bool: the canvas positions that each step ran, which alone have logits there."""
    width = steps[0].canvas.shape[1]
    ran = torch.zeros(len(steps), 1, width, dtype=torch.bool)
    for number, step in enumerate(steps):
        ran[number, :, -min(step.length, width) :] = True
    return ran


def step_logits(
    model: Any, prefix: Tensor, mask_id: int, *state: Tensor, block: int | None = None
) -> Tensor:
    """Logits (R, W, V) of one step: the part of the family's decoder between canvas and choice.
    With ``block`` the head runs on so many positions at a time."""
    with mixed_precision(prefix.device):
        if len(state) == 3:
            return _cached_logits(model, prefix, *state)
        embeds = _joined(model, prefix, state[0])
        if len(state) == 1:
            return _head(model, model.model(inputs_embeds=embeds)[0], state[0].shape[1], block)
        mask = torch.tensor([mask_id], device=prefix.device)
        masked = model.model.embed_tokens(mask)
        blind = _joined(model, masked.expand_as(prefix), state[0])
        hidden = model.model(inputs_embeds=torch.cat((embeds, blind)))[0]
        return guided(_head(model, hidden, state[0].shape[1], block), state[1][:, None, None])


def _cached_logits(
    model: Any, prefix: Tensor, canvas: Tensor, whole: Tensor, begins: Tensor
) -> Tensor:
    """Logits (R, W, V) of Fast-dLLM's steps: one whole call for all rows, then each row's part.

    Positions that a row's call leaves out have logits 0.
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


def _joined(model: Any, prefix: Tensor, canvas: Tensor) -> Tensor:
    words = model.model.embed_tokens(canvas)
    return torch.cat((prefix.to(words.dtype), words), dim=1)


def _head(model: Any, hidden: Tensor, width: int, block: int | None = None) -> Tensor:
    """Logits of the last ``width`` positions; the family computes all, and uses these, or computes
    a block."""
    if block is None:
        rows = max(width, SAME_KERNEL)
        logits = model.lm_head(hidden[:, -rows:])[:, -width:]
    else:
        parts = hidden[:, -width:].split(block, dim=1)
        logits = torch.cat([model.lm_head(part) for part in parts], dim=1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mixed_precision(device: torch.device) -> Any:
    """The family decodes under CUDA autocast in float16, whatever the weights' type."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.float16)
