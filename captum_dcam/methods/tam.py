r"""Token activation map: the logit lens without what context tokens explain, denoised.

:class:`TokenActivationMap` is the method; :class:`TamOver` applies its two parts, estimated causal
inference and the rank Gaussian filter, to the maps of another method. Estimated causal inference is
written as pure functions on maps of image tokens laid out in a row, (N,): Eq. 3–5, and the same
subtraction with other weights in ARC (Eq. 7–9).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import BudgetExhaustedError, InputError
from captum_dcam.methods.attention import Attentions
from captum_dcam.methods.base import (
    METHODS,
    AttributionTask,
    Method,
    PerWord,
    WordMaps,
    check_choices,
    entered,
    method,
    pairs_of,
)
from captum_dcam.methods.lens import ORDERS, Lens, context_of, own_steps, reads
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target
from captum_dcam.refine import rank_gaussian_filter

#: ε of Eq. 4
EPS = 1e-8
#: bases whose map depends on the token and the image's state alone: any token has one
READS_IMAGE_TOKENS = ("logit_lens", "msea", "architecture_surgery", "feature_surgery")
#: what presets of Diffusion-CAM are asked for: the plain map in the task's state
PLAIN = {"score": "task", "refined": False}

#: a response position, whose state is read, and a token id
Pair = tuple[int, int]


# -- estimated causal inference ------------------------------------------------------------------


def interference(context_maps: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted mean of the context's maps: :math:`\sum_k w_k A_k / (\sum w + ε)` (TAM Eq. 4).

    Args:
        context_maps (Tensor): (C, N); C may be 0.
        weights (Tensor): (C,), non-negative.

    Returns:
        Tensor: (N,); zero where no context token has weight.
    """
    return (weights / (weights.sum() + EPS)) @ context_maps


def least_squares_scale(target_map: Tensor, other: Tensor) -> Tensor:
    r"""The s that minimises :math:`\|A - sE\|^2`: ⟨A, E⟩ / ⟨E, E⟩, 0 where E = 0 (TAM Eq. 5)."""
    energy = other.square().sum()
    fit = (target_map * other).sum() / energy.where(energy > 0, torch.ones_like(energy))
    return fit.where(energy > 0, torch.zeros_like(fit))


def without_interference(
    target_map: Tensor, context_maps: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Positive part of a map minus the scaled interference map: (N,), and the scale.

    Computed in float64, so that the scale does not depend on the maps' size.
    """
    target, other = target_map.double(), interference(context_maps.double(), weights.double())
    scale = least_squares_scale(target, other)
    refined = (target - scale * other).relu()
    return refined.to(target_map.dtype), scale.to(target_map.dtype)


def estimated_causal_inference(
    target_map: Tensor, context_maps: Tensor, relevance: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    r"""TAM's estimated causal inference (Eq. 2 without the filter, Eq. 4 and 5).

    Args:
        target_map (Tensor): (N,) raw map of the token that is explained.
        context_maps (Tensor): (C, N) raw maps of the context tokens.
        relevance (Tensor): (C,) of every context token for the target, non-negative.
        same (Tensor): (C,) bool: the same token as the target; its relevance counts as 0, so that
            it does not wipe out its own object.

    Returns:
        tuple: refined map (N,), non-negative, and the scale s.
    """
    weights = relevance.where(~same, torch.zeros_like(relevance))
    return without_interference(target_map, context_maps, weights)


def rank_biased_overlap(rankings: Tensor, reference: Tensor, p: float) -> Tensor:
    r"""Rank-biased overlap of rankings with one other, cut off at their common depth k.

    .. math:: ρ = \frac{1 - p}{1 - p^k} \sum_{d=1}^{k} p^{d-1} \frac{|S_{:d} \cap T_{:d}|}{d}

    The factor makes the weights of the k depths add up to 1: identical rankings give 1, disjoint
    ones 0, and p → 1 the plain mean of the overlaps. (Webber et al. 2010, Eq. 4, stops at depth k
    without it, and identical rankings give 1 - p^k there.)

    Args:
        rankings (Tensor): (C, k) ids, best first, no id twice in a row.
        reference (Tensor): (k,) ids, likewise.
        p (float): in ]0, 1[: how slowly the weight of a depth falls.

    Returns:
        Tensor: (C,) float64 in [0, 1].
    """
    count, depth = rankings.shape
    equal = rankings[:, :, None] == reference[None, None, :]
    ranks = torch.arange(depth, device=rankings.device)
    # A pair of equal ids is in both prefixes from the deeper of its two ranks on.
    joined = torch.maximum(ranks[:, None], ranks[None, :]).expand(count, depth, depth)
    found = torch.zeros(count, depth, dtype=torch.float64, device=rankings.device)
    found.scatter_add_(1, joined.flatten(1), equal.flatten(1).to(found.dtype))
    shared = found.cumsum(1) / (ranks + 1)
    weights = p ** ranks.to(found.dtype)
    return shared @ (weights / weights.sum())


def joint_min_max(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    r"""Stretch image tokens (…, N) and text tokens (…, K) to [0, 1] together (TAM Eq. 3).

    NaN marks text tokens that take no part, and stays NaN. All equal: 0 everywhere.
    """
    both = torch.cat((image, text), dim=-1)
    absent = both.isnan()
    low = both.masked_fill(absent, float("inf")).amin(-1, keepdim=True)
    high = both.masked_fill(absent, float("-inf")).amax(-1, keepdim=True)
    span = high - low
    scaled = (both - low) / span.where(span > 0, torch.ones_like(span))
    return scaled[..., : image.shape[-1]], scaled[..., image.shape[-1] :]


# -- the methods ---------------------------------------------------------------------------------


class _Tam(PerWord):
    """What TAM and TAM over another method have in common; their tokens' maps differ."""

    relevances: ClassVar[tuple[str, ...]]
    relevance: str
    order: str
    filter: int

    def __post_init__(self) -> None:
        check_choices(self, relevance=self.relevances)
        check_order_and_filter(self)

    def word(self, task: AttributionTask, reader: Any, target: Target) -> WordMaps:
        image, text = joint_min_max(*self.activation(task, reader, target))
        return filtered(split_grids(image, task.forward), self.filter), text

    def activation(
        self, task: AttributionTask, reader: Any, target: Target
    ) -> tuple[Tensor, Tensor]:
        r"""A word's activation before Eq. 3: image tokens (N,), and text tokens (K,) with NaN where
        they are no context."""
        images, shown = [], []
        for position, token in pairs_of(target):
            image, text, context = self.token(task, reader, position, token)
            images.append(image)
            shown.append(torch.full_like(text, float("nan")).index_copy(0, context, text[context]))
        texts = torch.stack(shown)
        absent = texts.isnan().all(0)
        absent[[reader.lens.tokens.prompt + p for p in target.positions]] = True
        text = texts.nansum(0).masked_fill(absent, float("nan"))
        return torch.stack(images).sum(0), text

    @abstractmethod
    def token(
        self, task: AttributionTask, reader: Any, position: int, token: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A token's map (N,) without its context, the relevance (K,) of all text tokens, and which
        of them (C,) are its context."""


@dataclass(frozen=True)
class Reader:
    """The lens on a task, the step at which each text token's own map is read, and the attention
    weights if they are wanted."""

    lens: Lens
    steps: list[int]
    attentions: Attentions | None


@entered(
    "tam",
    "TAM",
    "logit lens",
    "TAM, Li et al. 2025, Eq. 1–7",
    "1 (no cache: 1 per state)",
    text=True,
)
class TokenActivationMap(_Tam):
    r"""TAM (Li et al. 2025, ICCV).

    The logit lens of the word (Eq. 1), minus what the maps of its context tokens explain of it
    (estimated causal inference, Eq. 2, 4, 5), brought to [0, 1] together with the relevance of the
    context tokens (Eq. 3), then the rank Gaussian filter (Eq. 6, 7): the order of the authors'
    code. So maps are not negative, and maps and text are on one scale. NaN in the text: a token
    that is no context, as the word itself.

    Every token's map is read at its own state, text relevance at the state of the word. In a model
    that denoises, "earlier" is a matter of steps (``order``). A word of several tokens is the sum
    of theirs before Eq. 3. (The authors keep tokens apart and score the best of a word.)

    Where the authors' code differs from the paper, the paper is followed: their map of the prompt's
    first token is that of the token predicted there, and their map of the answer's first token is
    that of the prompt's last.

    Args:
        relevance (str): weights of the context (Eq. 4): ``activation``, the word's positive logit
            at the context token; ``mean``, all alike; ``attention``, what the position that
            predicts the word pays to it, averaged over heads and blocks (one more pass per state;
            needs attention weights). The text shown is the activation always. Default:
            ``"activation"``
        order (str): ``commit`` (context: tokens committed at an earlier step) or ``position``
            (tokens to the left). What the prompt itself says always is, the chat template's text
            never. Default: ``"commit"``
        eci (bool): subtract the context. Default: True
        filter (int): odd window of the rank Gaussian filter; 0 for none. Default: 3
    """

    relevance: str = "activation"
    order: str = "commit"
    eci: bool = True
    filter: int = 3

    relevances: ClassVar[tuple[str, ...]] = ("activation", "mean", "attention")

    def reader(self, task: AttributionTask) -> Reader:
        wanted = reads(task, self.order if self.eci else None)
        attentions = Attentions(task) if self.relevance == "attention" else None
        return Reader(Lens(task.forward, wanted), own_steps(task), attentions)

    def token(
        self, task: AttributionTask, reader: Reader, position: int, token: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        lens, step = reader.lens, task.step(position)
        image, text = lens.image(step, token).relu(), lens.text(step, token).relu()
        context = context_of(task, position, self.order)
        if self.eci and len(context):
            ids = lens.tokens.ids[context]
            maps = [lens.image(reader.steps[k], int(i)) for k, i in zip(context, ids, strict=True)]
            weights = self._weights(reader, text, position)[context]
            image, _ = estimated_causal_inference(
                image, torch.stack(maps).relu(), weights, ids == token
            )
        return image, text, context

    def _weights(self, reader: Reader, text: Tensor, position: int) -> Tensor:
        """(K,) relevance of all text tokens for the token at a response position."""
        if self.relevance == "mean":
            return torch.ones_like(text)
        if reader.attentions is None:
            return text
        row = reader.attentions.row(position, range(len(reader.attentions.blocks)))
        return row.to(text.dtype)[reader.lens.tokens.positions]


class OverReader:
    r"""The base's maps of all words and their context, and the lens on the text tokens.

    Args:
        task (AttributionTask): batch 1.
        base (Method): whose maps are refined.
        order (str): of the context.
    """

    def __init__(self, task: AttributionTask, base: Method, order: str) -> None:
        self.lens = Lens(task.forward, ())
        self._task, self._base, self._order = task, base, order
        answer = range(task.forward.trajectory.tokens.shape[1])
        self._first = min(answer, key=task.step)  # where prompt tokens are read

    def context(self, position: int) -> tuple[Tensor, Tensor, list[Pair]]:
        r"""The context of a response position.

        Returns:
            tuple: (C,) indices of context tokens among the text tokens; those of them that the
            base has a map of; and the pairs under which it has it.
        """
        context = context_of(self._task, position, self._order)
        prompt, ids = self.lens.tokens.prompt, self.lens.tokens.ids
        mapped = context
        if self._base.name not in READS_IMAGE_TOKENS:
            mapped = context[context >= prompt]
        at = [k - prompt if k >= prompt else self._first for k in mapped.tolist()]
        return context, mapped, list(zip(at, ids[mapped].tolist(), strict=True))

    def map(self, pair: Pair) -> Tensor:
        """(N,) positive part of the base's map of a token at all image tokens."""
        maps, note = self._found
        if pair not in maps:
            raise BudgetExhaustedError(note)
        return maps[pair]

    @cached_property
    def _found(self) -> tuple[dict[Pair, Tensor], str]:
        """One call of the base for everything: the maps that its budget reached, and its note."""
        pairs: dict[Pair, None] = {}  # in the order of the words, each with its context
        for target in self._task.targets:
            for pair in pairs_of(target):
                pairs |= dict.fromkeys((pair, *self.context(pair[0])[2]))
        token_texts = self._task.forward.adapter.token_texts
        tokens = [Target(token_texts([t])[0].strip(), (p,), (t,)) for p, t in pairs]
        found = self._base.attribute(replace(self._task, targets=tuple(tokens)))
        maps = torch.cat([m.flatten(1) for m in found.maps], dim=1).relu()
        every = zip(pairs, maps, found.done, strict=True)
        note = found.note or f"the budget ended inside {self._base.name}"
        return {pair: own for pair, own, done in every if done}, note


@entered(
    "tam_over",
    "TAM over Grad-CAM",
    "logit lens",
    "TAM, Li et al. 2025, Table 3 (+ Ours)",
    "2 + 1 back (both for every state of the context)",
    "gradients",
    text=True,
)
class TamOver(_Tam):
    r"""TAM over another method's maps: the rows "+ Ours" of TAM's Table 3.

    From the positive part of the base's map of a token, what the maps of its context tokens by the
    same base explain is taken out (Eq. 2, 4, 5). The result is stretched to [0, 1] together with
    the relevance of the context tokens (Eq. 3) and filtered (Eq. 6, 7). Every token is read at its
    own state, the one that the task's score tells; Diffusion-CAM's presets are asked for their
    unrefined maps in that state. A word of several tokens is the sum of theirs before Eq. 3.

    The text, and the weights of the context, are those of
    :class:`TokenActivationMap`: positive logits at the text tokens,
    whatever the base. Two things follow:

    - Eq. 3 puts numbers of two units on one scale where the base's maps are no logits. The maps of
      an image's words keep their proportions if text outweighs them, and each has a maximum of 1
      if not. The paper does not say what it did.
    - Prompt tokens are context of the words only for bases that read image tokens
      (:data:`READS_IMAGE_TOKENS`). Every other base explains a logit at a position of the answer:
      it has no map of a prompt token, and the context is the answer's earlier tokens alone. The
      prompt's relevance still takes part in Eq. 3 and is shown.

    With the base ``logit_lens`` the method is ``tam``. A base that draws from the task's
    generator makes the method draw.

    Args:
        base (str): a registered method, with its default settings; not this one, nor one whose map
            is the same for all words. Default: ``"diffusion_cam_base"``, Grad-CAM
        product (str, optional): handed to a base that has this setting; ``plus_plus`` makes the
            default base Grad-CAM++. Default: the base's own
        relevance (str): weights of the context (Eq. 4): ``activation``, the word's positive logit
            at the context token; ``mean``, all alike. Default: ``"activation"``
        order (str): ``commit`` (context: tokens committed at an earlier step) or ``position``
            (tokens to the left). Default: ``"commit"``
        filter (int): odd window of the rank Gaussian filter; 0 for none. Default: 3

    Raises:
        UnknownNameError: no such base.
        ValueError: a base that cannot be one, a product for a base without that setting, or
            another setting out of range.
    """

    base: str = "diffusion_cam_base"
    product: str | None = None
    relevance: str = "activation"
    order: str = "commit"
    filter: int = 3

    relevances: ClassVar[tuple[str, ...]] = ("activation", "mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.inner  # whatever is wrong with the base is said now

    @property
    def inner(self) -> Method:
        """The base as a method."""
        cls = METHODS[self.base]
        if cls is TamOver or cls.facts.target_blind:
            why = "has one map for all words" if cls.facts.target_blind else "is this method"
            raise InputError(f"base is {self.base!r}, which {why}: choose another method")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # dataclasses all
        settings: dict[str, Any] = dict(PLAIN) if "refined" in known else {}
        if self.product is not None:
            if "product" not in known:
                raise InputError(
                    f"product is {self.product!r}, and the base {self.base!r} has no such setting: "
                    "leave it out, or choose a preset of Diffusion-CAM"
                )
            settings["product"] = self.product
        return method(self.base, **settings)

    def check_packages(self) -> None:
        super().check_packages()
        self.inner.check_packages()

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        self.inner.check(task)

    def reader(self, task: AttributionTask) -> OverReader:
        return OverReader(task, self.inner, self.order)

    def token(
        self, task: AttributionTask, reader: OverReader, position: int, token: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        image = reader.map((position, token))
        text = reader.lens.text(task.step(position), token).relu().float()
        context, mapped, pairs = reader.context(position)
        if pairs:
            weights = torch.ones_like(text) if self.relevance == "mean" else text
            maps = torch.stack([reader.map(pair) for pair in pairs])
            same = reader.lens.tokens.ids[mapped] == token
            image, _ = estimated_causal_inference(image, maps, weights[mapped], same)
        return image, text, context


def check_order_and_filter(method: Any) -> None:
    """Check settings that TAM and ARC have in common."""
    check_choices(method, order=ORDERS)
    window = method.filter
    whole = checks.as_whole(window)
    if whole is None or whole < 0 or (whole and whole % 2 == 0):
        raise InputError(f"filter is {window!r}: expected an odd window such as 3, or 0 for none")


def filtered(maps: tuple[Tensor, ...], window: int) -> tuple[Tensor, ...]:
    """The rank Gaussian filter (TAM Eq. 6, 7) on non-negative maps (h, w); window 0: none."""
    return tuple(rank_gaussian_filter(m, window) for m in maps) if window else maps


@dataclass(frozen=True)
class Rival:
    """A token that the model might have written, and its probability among the candidates."""

    token: int
    text: str
    probability: float


def top_candidates(task: AttributionTask, position: int, k: int = 3) -> tuple[Rival, ...]:
    r"""The k likeliest tokens of a response position, in the state that the score reads.

    Args:
        task (AttributionTask): its targets do not matter here.
        position (int): of the response.
        k (int, optional): how many; the probabilities are a softmax over these. Default: 3

    Returns:
        tuple of Rival: likeliest first.
    """
    adapter = task.forward.adapter
    if not 1 <= k <= adapter.vocabulary:
        raise InputError(f"k is {k}: expected 1 to {adapter.vocabulary}, the vocabulary")
    with torch.no_grad():
        step = torch.tensor([task.step(position)])
        logits = task.forward.replay(torch.tensor([0]), step)[0, position].float()
    best = logits.topk(k)
    probabilities = best.values.softmax(0).tolist()
    ids = best.indices.tolist()
    every = zip(ids, adapter.token_texts(ids), probabilities, strict=True)
    return tuple(Rival(*one) for one in every)
