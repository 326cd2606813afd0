r"""Features and gradients of many targets of one generation, in as few passes as their steps need.

With a prefix cache the image states come from one prefill, which all tokens share: one forward pass
of the prefill, one of all needed states as a batch, then a vector-Jacobian product per target.
Without a cache every step has image states of its own. Targets are then rows of one batch, and one
backward pass of their sum gives each row its own gradient.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_dcam.errors import DcamError, InfeasibleStepError
from captum_dcam.model.budget import rows_at_once
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.norms import passing
from captum_dcam.model.tap import finite, gather, hidden_of, hooked, wide
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target

T = TypeVar("T")
#: told of a read: the target's number, the step, and its logits (T, V), without a graph
Seen = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class TargetGradients:
    r"""Features and gradients (D, h, w), one pair per grid, of target number ``target``.

    ``tokens``: gradient × activation at the tapped block's output, summed over channels, at every
    token of the sequence that is no image token, (L,) float32 on the CPU; 0 at image tokens, NaN
    at answer tokens of which no one pass has all states. None where it was not asked for.
    """

    target: int
    features: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    tokens: Tensor | None = None


@dataclass(frozen=True)
class _Read:
    """One read of logits: target, example, step, and the terms (position, token id, sign) of the
    target's sum that are read there."""

    target: int
    example: int
    step: int
    terms: tuple[tuple[int, int, int], ...]


def _reads(
    forward: DenoisingForward,
    targets: Sequence[Target],
    examples: Sequence[int],
    scores: Sequence[Score],
    call: int | None,
) -> list[_Read]:
    """Group every target's tokens by the step that its score reads."""
    trajectory = forward.trajectory
    out = []
    every = zip(targets, examples, scores, strict=True)
    for number, (target, example, score) in enumerate(every):
        by_step: dict[int, list[tuple[int, int, int]]] = {}
        for term in target.terms:
            if call is not None and trajectory.cache == "none":
                step = call
            else:
                step = trajectory.step_of(example, term[0], score)
            by_step.setdefault(step, []).append(term)
        out += [_Read(number, example, s, tuple(p)) for s, p in sorted(by_step.items())]
    return out


@holding
def target_gradients(
    forward: DenoisingForward,
    targets: Sequence[Target],
    examples: Sequence[int] | None = None,
    *,
    score: Score = "commit",
    call: int | None = None,
    chunk: int | None = None,
    backward: str = "exact",
) -> list[TargetGradients]:
    r"""Features and gradients at the tap of targets of the bound generation.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): the sums of logits to differentiate, less their foils'.
        examples (sequence of int, optional): example of every target. Default: all 0
        score (str or int, optional): the state each token is read at, or the step's number.
            Default: ``"commit"``
        call (int, optional): index of the call whose image states are explained. Without a cache
            the logits are then that call's too. Default: the call that the score needs
        chunk (int, optional): number of targets per batch of steps (bounds memory). Default: the
            forward's ``internal_batch_size``; where it has none, what fits into free memory, see
            :func:`captum_dcam.model.budget.rows_at_once`
        backward (str, optional): how gradients pass through norms, see
            :mod:`captum_dcam.model.norms`. Default: ``"exact"``

    Returns:
        list of TargetGradients: at least one per target; without a cache one per step at which
        its tokens are read, because each step has its own image states.

    Raises:
        InfeasibleStepError: the call does not hold the image, or its logits do not depend on it.
    """
    score = forward.trajectory.check_score(score)
    found = mapped_gradients(
        forward,
        targets,
        [0] * len(targets) if examples is None else examples,
        [score] * len(targets),
        lambda row: row,
        call=call,
        chunk=chunk,
        backward=backward,
    )
    return sorted(found, key=lambda row: row.target)


@holding
def mapped_gradients(
    forward: DenoisingForward,
    targets: Sequence[Target],
    examples: Sequence[int],
    scores: Sequence[Score],
    each: Callable[[TargetGradients], T],
    *,
    call: int | None = None,
    chunk: int | None = None,
    backward: str = "exact",
    seen: Seen | None = None,
    tokens: bool = False,
) -> list[T]:
    r"""What ``each`` makes of every row of :func:`target_gradients`, which is then forgotten: the
    gradients of many targets together are large.

    Args:
        forward, targets, examples, call, chunk, backward: as there.
        scores (sequence of str or int): of every target.
        each (callable): of a row.
        seen (callable, optional): told of every read of logits, see :data:`Seen`. Default: nothing
        tokens (bool, optional): fill in :attr:`TargetGradients.tokens`, from the same passes.
            Default: False

    Returns, raises: as there; targets of a batch come in the order of their passes.
    """
    trajectory = forward.trajectory
    if call is not None:
        trajectory.check_call(call)
    reads = _reads(forward, targets, examples, scores, call)
    size = chunk or forward.internal_batch_size

    def checked(row: TargetGradients) -> T:
        if not any(bool(g.any()) for g in row.gradients):
            raise no_path(forward, targets[row.target].text)
        check_gradients(forward, row.gradients)
        return each(row)

    everything = forward.tap.collecting() if tokens else nullcontext()
    try:
        with torch.enable_grad(), diagnosed(forward), passing(backward), everything:
            if trajectory.cache == "prefix":
                return list(map(checked, _prefix_rows(forward, reads, len(targets), size, seen)))
            size = size or rows_at_once(forward)
            return [
                checked(row)
                for start in range(0, len(reads), size)
                for row in _full_rows(forward, reads[start : start + size], seen)
            ]
    except torch.cuda.OutOfMemoryError as error:
        raise torch.cuda.OutOfMemoryError(
            f"{min(size, len(reads)) if size else 'the'} words at once do not fit into memory at "
            f"block {forward.layer}: fewer (internal_batch_size=1) or a deeper block need less "
            f"({error})"
        ) from error


def check_gradients(forward: DenoisingForward, gradients: Sequence[Tensor]) -> None:
    """NotFiniteError for gradients that overflowed."""
    for gradient in gradients:
        finite(gradient, "the gradients at the tapped block", forward.adapter.dtype)


#: what torch says where a graph is missing
PATHLESS = (
    "does not require grad",
    "not have been used in the graph",
    "Inference tensors cannot be saved for backward",
    "requires_grad=True on inference tensor",
)


def no_path(forward: DenoisingForward, text: str | None = None) -> InfeasibleStepError:
    """The error about a logit that has no gradient at the tap, with the reason that the model
    shows."""
    whose = "the target's logit has" if text is None else f"the logits of {text!r} have"
    return InfeasibleStepError(
        f"{whose} no gradient path to the image states of block {forward.layer}: {_reason(forward)}"
    )


def _reason(forward: DenoisingForward) -> str:
    model = forward.model
    if any(p.is_inference() for p in model.parameters()):
        return (
            "the model's weights were made inside torch.inference_mode, and can be in no graph; "
            "load it outside (or with captum_dcam.load)"
        )
    if any(p.is_meta for p in model.parameters()):
        return (
            "weights are offloaded, and come without a graph; load the model where all of it fits, "
            "or choose a method that needs no gradients, such as logit_lens or attention"
        )
    whole = {
        f"{type(m).__name__} ({kind})"
        for m in model.modules()
        for n, t in itertools.chain(
            m.named_parameters(recurse=False), m.named_buffers(recurse=False)
        )
        if "weight" in n and (kind := _quantised(t)) is not None
    }
    whole |= {f"{type(m).__name__} (packed)" for m in model.modules() if _packs(m)}
    if whole:
        return (
            f"layers of the kind {', '.join(sorted(whole))} hold quantised weights, and their "
            "kernels have no backward pass; load the model unquantised or with bitsandbytes on a "
            "GPU, or choose a method that needs no gradients, such as logit_lens or attention"
        )
    return (
        f"choose another step or a shallower block (the deepest usable one is "
        f"{forward.adapter.deepest_block}); if no block has one, a layer above it computes without "
        "a graph (torch.no_grad, a kernel without a backward pass)"
    )


def _quantised(weight: Tensor) -> str | None:
    """How a weight is quantised: its type of integers, or the class of tensor that others pack them
    into; None for one that is not."""
    if not weight.is_floating_point():
        return str(weight.dtype).removeprefix("torch.")
    kind = type(weight)
    return None if kind in (Tensor, torch.nn.Parameter) else kind.__name__


def _packs(module: torch.nn.Module) -> bool:
    """Whether a module is one of torch's own quantised layers, which have no parameters."""
    return hasattr(module, "_packed_params") and hasattr(module, "in_features")


@contextmanager
def diagnosed(forward: DenoisingForward) -> Iterator[None]:
    """What torch says of a missing graph becomes :func:`no_path`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DcamError) or not any(text in str(error) for text in PATHLESS):
            raise
        raise no_path(forward) from error


def watched(forward: DenoisingForward, work: Callable[[], T]) -> tuple[T, tuple[Tensor, ...]]:
    """Run ``work`` and catch the feature maps that went into the tap."""
    seen: list[tuple[Tensor, ...]] = []
    handle = forward.tap.register_forward_pre_hook(lambda _m, maps: seen.append(maps))
    try:
        result = work()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise InfeasibleStepError(
            f"the tapped block saw the image {len(seen)} times in one replay: expected once; "
            "choose a block that runs once per call"
        )
    return result, seen[0]


@holding
def image_features(
    forward: DenoisingForward, examples: Sequence[int] = (0,), call: int | None = None
) -> tuple[Tensor, ...]:
    r"""Feature maps that the tap hands on, without gradients, as refinements read them.

    They come from the outputs that the generation kept, else from one pass of the model.

    Args:
        forward (DenoisingForward): with a bound generation.
        examples (sequence of int, optional): E examples of the bound batch. Default: the first
        call (int, optional): index of the call whose image states are meant. Default: the first
            that holds the image

    Returns:
        tuple of Tensor: (E, D, h, w), one per grid.

    Raises:
        InfeasibleStepError: the call does not hold the image.
    """
    trajectory, rows = forward.trajectory, list(examples)
    call = min(trajectory.feasible, default=0) if call is None else call
    trajectory.check_call(call)
    output, seen = forward.kept_output(call), list[Any]()
    with torch.no_grad(), hooked([(forward.tap, lambda _m, _maps, out: seen.append(out))]):
        if output is not None:
            forward.tap(*gather(hidden_of(output)[: forward.request.batch], forward.request.layout))
        elif trajectory.cache == "prefix":
            forward.prefill()
        else:
            forward.replay(torch.tensor(rows), torch.full((len(rows),), call))
            rows = list(range(len(rows)))
    maps = seen[0] if isinstance(seen[0], tuple) else (seen[0],)
    return tuple(m[rows] for m in maps)


def _total(logits: Tensor, reads: Sequence[_Read]) -> Tensor:
    """The sum of the logits that are read, read r in row r."""
    # one index: the gradient of every single one would be as large as all logits
    positions, tokens, signs = zip(*(t for r in reads for t in r.terms), strict=True)
    rows = [row for row, read in enumerate(reads) for _ in read.terms]
    found = logits[rows, list(positions), list(tokens)]
    return (found * found.new_tensor(signs)).sum()


def gradients_of(score: Tensor, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of a score; zeros where no path leads."""
    if not score.requires_grad:
        return tuple(torch.zeros_like(m) for m in maps)
    return torch.autograd.grad(score, maps, materialize_grads=True)


def _tell(logits: Tensor, reads: Sequence[_Read], seen: Seen | None) -> None:
    """Tell of the logits that are read, read r in row r."""
    if seen is not None:
        for row, read in zip(logits.detach(), reads, strict=True):
            seen(read.target, read.step, row)


def _prefix_rows(
    forward: DenoisingForward, reads: list[_Read], count: int, chunk: int | None, seen: Seen | None
) -> Iterator[TargetGradients]:
    """All targets from one prefill graph; tokens of one target add up whatever their steps.

    The steps see the prefix through the cache alone. So one backward pass of a batch of steps gives
    every row its gradient with respect to the cache. Each target then needs one product with the
    prefill; targets of different examples share one, for no example sees another.
    """
    memory, maps = watched(forward, forward.prefill)
    prefix = _leaves(forward)
    links = [t for t in forward.adapter.memory_tensors(memory) if t.requires_grad]
    if chunk is None:  # what is left beside the prefill's graph
        cached = sum(t[0].numel() * t.element_size() for t in links)
        chunk = rows_at_once(forward, cached)
    example_of = {r.target: r.example for r in reads}
    left = count
    for start in range(0, count, chunk):
        numbers = range(start, min(start + chunk, count))
        part = [r for r in reads if r.target in numbers]
        into_cache, answers = _in_turn(forward, memory, links, part, seen)
        for together in _rounds(numbers, example_of):
            left -= len(together)
            rows = {
                example_of[n]: [i for i, r in enumerate(part) if r.target == n] for n in together
            }
            grads = torch.autograd.grad(
                links,
                (*maps, *prefix),
                [_cotangent(*pair, rows) for pair in zip(links, into_cache, strict=True)],
                retain_graph=left > 0,
                materialize_grads=True,
            )
            products = _products(prefix, grads[len(maps) :], forward.request.batch)
            for number in together:
                b = example_of[number]
                features = tuple(m[b].detach() for m in maps)
                own = tuple(g[b].detach() for g in grads[: len(maps)])
                tokens = torch.cat((products[b], answers[rows[b]].sum(0)))
                yield TargetGradients(number, features, own, tokens if prefix else None)
        del into_cache  # not beside the next chunk's


def _leaves(forward: DenoisingForward) -> tuple[Tensor, ...]:
    """The states of all tokens that the last passes made leaves, in their order; none where none
    were asked for."""
    leaves = forward.tap.leaves
    if not leaves:
        return ()
    found = tuple(leaves)
    leaves.clear()
    return found


def _products(states: Sequence[Tensor], gradients: Sequence[Tensor], rows: int) -> Tensor:
    """Gradient × activation (R, L) of the first R rows of states (…, D) that follow one another,
    on the CPU; (R, 0) of none."""
    parts = [
        (wide(g[:rows]) * wide(s[:rows].detach())).sum(-1).float().cpu()
        for s, g in zip(states, gradients, strict=True)
    ]
    return torch.cat(parts, dim=1) if parts else torch.zeros(rows, 0)


def _cotangent(link: Tensor, gradient: Tensor, rows: Mapping[int, Sequence[int]]) -> Tensor:
    """What a cached tensor (B, …) gets from its gradient (R, …): the sum of each example's rows."""
    if len(link) == 1 and len(rows[0]) == 1:  # no copy: it is as large as the cache
        return gradient[rows[0][0] :][:1]
    whole = torch.zeros_like(link)
    for example, own in rows.items():
        whole[example] = gradient[own].sum(0)
    return whole


def _rounds(numbers: Iterable[int], example_of: Mapping[int, int]) -> list[list[int]]:
    """Targets in as few groups as hold no two of one example."""
    seen: Counter[int] = Counter()
    rounds: list[list[int]] = []
    for number in numbers:
        example = example_of[number]
        if seen[example] == len(rounds):
            rounds.append([])
        rounds[seen[example]].append(number)
        seen[example] += 1
    return rounds


def _in_turn(
    forward: DenoisingForward,
    memory: Any,
    links: list[Tensor],
    reads: list[_Read],
    seen: Seen | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """:func:`_cache_gradients` of all reads at once; one by one where tokens are wanted of a family
    that runs rows of other canvases apart, so that a block sees some of the rows only."""
    if forward.tap.leaves is None or not forward.adapter.step_blocks:
        return _cache_gradients(forward, memory, links, reads, seen)
    alone = [_cache_gradients(forward, memory, links, [read], seen) for read in reads]
    longest = max(tokens.shape[1] for _, tokens in alone)
    rows = [torch.nn.functional.pad(t, (0, longest - t.shape[1])) for _, t in alone]
    return tuple(map(torch.cat, zip(*(g for g, _ in alone), strict=True))), torch.cat(rows)


def _cache_gradients(
    forward: DenoisingForward,
    memory: Any,
    links: list[Tensor],
    reads: list[_Read],
    seen: Seen | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradient (R, …) of every read's logits with respect to each cached tensor; and gradient ×
    activation (R, T) of the answer's tokens, (R, 0) where it was not asked for."""
    if not links:
        return (), torch.zeros(len(reads), 0)
    examples = torch.tensor([r.example for r in reads])  # on the CPU: layers may lie on several
    steps = torch.tensor([r.step for r in reads])
    one = len(examples.unique()) == 1  # its rows are one row in memory
    rows = (
        t[examples[:1]].expand(len(examples), *t.shape[1:]) if one else t[examples] for t in links
    )
    leaves = [t.detach().requires_grad_() for t in rows]
    own = forward.adapter.replace_memory(forward.adapter.select(memory, examples), leaves)
    logits = forward.step(own, examples, steps)
    _tell(logits, reads, seen)
    answer = _leaves(forward)
    found = torch.autograd.grad(
        _total(logits, reads), (*leaves, *answer), materialize_grads=bool(answer)
    )
    return found[: len(leaves)], _products(answer, found[len(leaves) :], len(reads))


def _full_rows(
    forward: DenoisingForward, reads: list[_Read], seen: Seen | None
) -> list[TargetGradients]:
    """One row per read; the backward pass of the sum gives every row its own gradient."""
    examples = torch.tensor([r.example for r in reads])
    steps = torch.tensor([r.step for r in reads])
    logits, maps = watched(forward, lambda: forward.replay(examples, steps))
    _tell(logits, reads, seen)
    every, apart = _leaves(forward), forward.tap.parts
    grads = gradients_of(_total(logits, reads), (*maps, *every))
    products = _products(every, grads[len(maps) :], len(reads))
    if apart:  # a step ran a part of the answer, and took the rest from a cache
        products[:, forward.request.layout.prefix_length :] = torch.nan
    return [
        TargetGradients(
            r.target,
            tuple(m[i].detach() for m in maps),
            tuple(g[i] for g in grads[: len(maps)]),
            products[i] if every else None,
        )
        for i, r in enumerate(reads)
    ]
