r"""CLIP Surgery's two parts on a language model: architecture surgery and feature surgery.

CLIP Surgery compares image tokens with a text embedding. Here the output head takes its place: the
similarity of an image token with a word is the logit that the head gives to the word's token there
(the logit lens).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.methods.attention import (
    INVISIBLE,
    BlockMode,
    Fused,
    inside_blocks,
    is_fused,
    is_written,
)
from captum_dcam.methods.base import (
    AttributionTask,
    PerWord,
    TokenValues,
    WordMaps,
    check_block,
    entered,
    pairs_of,
)
from captum_dcam.methods.lens import lens_logits
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.sequence import image_positions, outputs_of, split_grids, unkept
from captum_dcam.model.tap import hidden_of, replace_hidden, wide
from captum_dcam.model.words import Target


class ValueAttention(BlockMode):
    r"""Inside blocks ``start`` and above, attention weights are softmax(v vᵀ · scale).

    Masks and the scale stay those of the call. Where attention is written out, the scale is
    :math:`d^{-1/2}`, a key that no head attended to counts as masked, and the product of the
    weights with the values is recognised by its first operand.

    Attributes:
        replaced (set of int): blocks whose weights were replaced.
    """

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start
        self.replaced: set[int] = set()
        self._weights: Tensor | None = None  # a softmax that has not met its values yet

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        assert self.block is not None
        if self.block < self.start:
            return func(*args, **kwargs)
        if is_fused(func):
            self.replaced.add(self.block)
            return _value_call(Fused(*args, **kwargs)).run(func)
        if self._weights is not None and args and args[0] is self._weights:
            if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
                self.replaced.add(self.block)
                weights, self._weights = self._weights, None
                return func(_value_weights(args[1], weights), args[1])
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.shape == self._weights.shape:
                self._weights = result  # a cast, dropout and the like
            return result
        result = func(*args, **kwargs)
        if is_written(func, result):
            self._weights = result
        return result


def _value_call(call: Fused) -> Fused:
    """The same attention with values as queries and keys."""
    values = call.value
    groups = call.query.shape[1] // values.shape[1]
    values = values.repeat_interleave(groups, dim=1) if groups > 1 else values
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    queries = values[:, :, -call.query.shape[2] :]  # behind a cache queries are the last keys
    return call._replace(query=queries, key=values, value=values, scale=scale, enable_gqa=False)


def _value_weights(values: Tensor, weights: Tensor) -> Tensor:
    """softmax(v vᵀ / √d) of values (1, heads, k, d), masked where ``weights`` (1, heads, q, k)
    are 0 in all heads."""
    v = wide(values)
    scores = v[:, :, -weights.shape[2] :] @ v.mT * v.shape[-1] ** -0.5
    masked = (weights == 0).all(1, keepdim=True)
    return scores.masked_fill(masked, -torch.inf).softmax(-1).nan_to_num(0).to(values.dtype)


class Surgery:
    r"""Hidden states (N, D) of a task's image tokens, as the surgeries read them.

    Args:
        task (AttributionTask): batch 1.
    """

    def __init__(self, task: AttributionTask) -> None:
        self._forward = unkept(task.forward)
        self._shared = task.forward.trajectory.cache == "prefix"
        self._images = image_positions(task.forward)

    def state(self, step: int) -> int:
        """What image states depend on: behind a cached prefix, on no step."""
        return 0 if self._shared else step

    def _run(self, step: int) -> None:
        """Run the blocks over the image once: in the prefill, or without a cache in a step."""
        memory = self._forward.prefill()
        if not self._shared:
            self._forward.step(memory, torch.tensor([0]), torch.tensor([step]))

    @torch.no_grad()
    def plain(self, step: int, block: int) -> Tensor:
        """A block's output."""
        with outputs_of({block: self._forward.adapter.blocks[block]}) as found:
            self._run(step)
        return found[block][0][0, self._images]

    @torch.no_grad()
    def second_path(self, step: int, start: int) -> Tensor:
        r"""The states that enter block ``start``, plus the value-value attention of every block
        from there on, read from the original path."""
        blocks = list(self._forward.adapter.blocks)
        parts = {i: self._forward.adapter.attention_module(b) for i, b in enumerate(blocks)}
        parts = {i: part for i, part in parts.items() if i >= start}
        entered: list[Tensor] = []
        added: dict[int, Tensor] = {}

        def note(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            values = (*args, *kwargs.values())
            entered.append(next(a for a in values if isinstance(a, Tensor) and a.ndim == 3))

        def swap(index: int) -> Callable[..., Any]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                added[index] = hidden_of(output)[0, self._images]
                return replace_hidden(output, original[index][0])  # the block goes on unchanged

            return hook

        with blocks[start].register_forward_pre_hook(note, with_kwargs=True):
            with outputs_of(parts) as original:
                self._run(step)
        mode = ValueAttention(start)
        with ExitStack() as hooks, inside_blocks(blocks, mode):
            for index, part in parts.items():
                hooks.enter_context(part.register_forward_hook(swap(index)))
            self._run(step)
        if missing := sorted(parts.keys() - mode.replaced):
            raise MethodError(
                f"attention of blocks {missing} ({type(blocks[missing[0]]).__name__}) cannot be "
                f"replaced: it runs in a kernel that torch does not show; {INVISIBLE}"
            )
        states = wide(entered[0][0, self._images])
        return sum((wide(a) for a in added.values()), states).to(entered[0].dtype)


def without_redundancy(logits: Tensor) -> Tensor:
    r"""Feature surgery: what an image token says to all words alike is taken away.

    .. math::
        S_k(i) = w_k a_k(i) - \frac{1}{K} \sum_j w_j a_j(i), \qquad
        w = K \, \mathrm{softmax}(2 s), \qquad
        s_k = \bar a_k / \max_j |\bar a_j|

    with :math:`a_k(i)` the logit of word k at image token i and :math:`\bar a_k` its mean over
    image tokens. CLIP Surgery takes s from the class token's cosine similarity, which a language
    model does not have; the mean logit, brought to [-1, 1], stands for it. Its factor 2 is kept.

    Args:
        logits (Tensor): (K, N).

    Returns:
        Tensor: (K, N). Over the words it adds up to 0; of one word alone nothing is left.
    """
    mean = logits.mean(1)
    largest = mean.abs().max()
    s = mean / largest if largest > 0 else mean
    weighted = (len(s) * (2 * s).softmax(0))[:, None] * logits
    return weighted - weighted.mean(0)


class _LensMaps(PerWord):
    """Methods that put hidden states of image tokens through the output head."""

    features: bool  #: whether feature surgery follows

    @abstractmethod
    def states(self, task: AttributionTask) -> Callable[[Surgery, int], Tensor]:
        """(surgery, step) to the hidden states that are read; checks the settings."""

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        self.states(task)

    def reader(self, task: AttributionTask) -> TokenValues:
        read, surgery = self.states(task), Surgery(task)
        answer = answer_ids(task.forward)
        asked = {t for target in task.targets for t in target.token_ids}
        ids = [*answer, *sorted(asked - set(answer))]
        known: dict[int, Tensor] = {}

        def values(position: int, token: int, _foil: int | None = None) -> Tensor:
            """(N,) logits of a token at the image tokens."""
            state = surgery.state(task.step(position))
            if state not in known:
                with torch.no_grad():
                    hidden = read(surgery, state)
                    known[state] = lens_logits(task.forward.adapter, hidden, ids)
            if not self.features:
                return known[state][ids.index(token)]
            # a token that the answer does not hold joins the words while it is explained
            words = list(dict.fromkeys((*answer, token)))
            logits = known[state][[ids.index(t) for t in words]]
            return without_redundancy(logits)[words.index(token)]

        return values

    def word(self, task: AttributionTask, reader: TokenValues, target: Target) -> WordMaps:
        parts = [reader(position, token, None).float() for position, token in pairs_of(target)]
        return split_grids(torch.stack(parts).sum(0), task.forward), None


def answer_ids(forward: DenoisingForward) -> list[int]:
    """Token ids of the answer, each once, without stop tokens."""
    every = forward.trajectory.tokens[0].tolist()
    return [t for t in dict.fromkeys(every) if t not in forward.adapter.stop_ids]


@entered(
    "architecture_surgery",
    "Architecture surgery",
    "logit lens",
    "CLIP Surgery, Li et al., 2023",
    "2",
)
class ArchitectureSurgery(_LensMaps):
    r"""CLIP Surgery's architecture surgery (Sec. 3.3), read through the logit lens.

    Beside the original path x a second one starts at block ``start``:
    :math:`\hat x \leftarrow \hat x + \mathrm{attention}_{vv}(x)`, the block's own norm, values and
    output projection with weights softmax(v vᵀ · scale), and no feed-forward. The logit of the
    word's token at the second path's image tokens is the map.

    Args:
        start (int, optional): first block of the second path; negative counts from the end.
            Default: the middle of the model
        features (bool, optional): feature surgery as well, as in the paper. Default: False
    """

    start: int | None = None
    features: bool = False

    def states(self, task: AttributionTask) -> Callable[[Surgery, int], Tensor]:
        adapter = task.forward.adapter
        middle = len(adapter.blocks) // 2
        start = middle if self.start is None else check_block(adapter, self.start)
        return lambda surgery, step: surgery.second_path(step, start)

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        step = task.step(task.targets[0].positions[0]) if task.targets else 0
        self.states(task)(Surgery(task), step)


@entered("feature_surgery", "Feature surgery", "logit lens", "CLIP Surgery, Li et al., 2023", "1")
class FeatureSurgery(_LensMaps):
    r"""CLIP Surgery's feature surgery (Sec. 3.4) on the plain logit lens.

    The formula is that of :func:`without_redundancy`; its words are the unique tokens of the
    answer. Together with architecture surgery: ``architecture_surgery`` with ``features=True``.

    Args:
        block (int, optional): whose output is read; negative counts from the end. Default: the
            deepest with a path from image tokens to the answer (nothing trains the last block's)
    """

    block: int | None = None
    features = True

    def states(self, task: AttributionTask) -> Callable[[Surgery, int], Tensor]:
        adapter = task.forward.adapter
        block = adapter.deepest_block if self.block is None else check_block(adapter, self.block)
        return lambda surgery, step: surgery.plain(step, block)
