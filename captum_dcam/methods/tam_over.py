r"""TAM's estimated causal inference and denoising on the maps of another method."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError, InputError
from captum_dcam.methods.base import (
    METHODS,
    AttributionTask,
    Method,
    MethodFacts,
    method,
    register_method,
)
from captum_dcam.methods.causal import estimated_causal_inference, joint_min_max
from captum_dcam.methods.lens import Lens, PerWord, context_of
from captum_dcam.methods.tam import check_order_and_filter, filtered
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target

RELEVANCES = ("activation", "mean")
#: bases whose map depends on the token and the image's state alone: any token has one
READS_IMAGE_TOKENS = ("logit_lens", "msea", "architecture_surgery", "feature_surgery")
#: what presets of Diffusion-CAM are asked for: the plain map in the task's state
PLAIN = {"score": "task", "refined": False}

#: a response position, whose state is read, and a token id
Pair = tuple[int, int]


class Reader:
    r"""The base's maps of all words and their context, and the lens on the text tokens.

    Args:
        task (AttributionTask): batch 1.
        base (Method): whose maps are refined.
        order (str): of the context.
    """

    def __init__(self, task: AttributionTask, base: Method, order: str) -> None:
        self.task, self.lens = task, Lens(task.forward, ())
        self._base, self._order = base, order
        self._found: dict[Pair, Tensor | None] | None = None
        self._note = ""
        answer = range(task.forward.trajectory.tokens.shape[1])
        self._first = min(answer, key=task.step)  # where prompt tokens are read

    def context(self, position: int) -> tuple[Tensor, Tensor, list[Pair]]:
        r"""The context of a response position.

        Returns:
            tuple: (C,) indices of context tokens among the text tokens; those of them that the
            base has a map of; and the pairs under which it has it.
        """
        context = context_of(self.task, position, self._order)
        prompt, ids = self.lens.tokens.prompt, self.lens.tokens.ids
        mapped = context
        if self._base.name not in READS_IMAGE_TOKENS:
            mapped = context[context >= prompt]
        at = [k - prompt if k >= prompt else self._first for k in mapped.tolist()]
        return context, mapped, list(zip(at, ids[mapped].tolist(), strict=True))

    def map(self, pair: Pair) -> Tensor:
        """(N,) positive part of the base's map of a token at all image tokens."""
        if self._found is None:
            self._found = self._all()
        found = self._found[pair]
        if found is None:
            raise BudgetExhaustedError(self._note)
        return found

    def _all(self) -> dict[Pair, Tensor | None]:
        """One call of the base for everything; None where its budget ended before."""
        pairs: dict[Pair, None] = {}  # in the order of the words, each with its context
        for target in self.task.targets:
            for pair in zip(target.positions, target.token_ids, strict=True):
                pairs |= dict.fromkeys((pair, *self.context(pair[0])[2]))
        token_texts = self.task.forward.adapter.token_texts
        tokens = [Target(token_texts([t])[0].strip(), (p,), (t,)) for p, t in pairs]
        task = AttributionTask(
            self.task.forward, tuple(tokens), self.task.score, self.task.generator
        )
        found = self._base.attribute(task)
        self._note = found.note or f"the budget ended inside {self._base.name}"
        maps = torch.cat([m.flatten(1) for m in found.maps], dim=1).relu()
        return {p: m if d else None for p, m, d in zip(pairs, maps, found.done, strict=True)}


@register_method("tam_over")
@dataclass(frozen=True)
class TamOver(PerWord):
    r"""TAM over another method's maps: the rows "+ Ours" of TAM's Table 3.

    From the positive part of the base's map of a token, what the maps of its context tokens by the
    same base explain is taken out (Eq. 2, 4, 5). The result is stretched to [0, 1] together with
    the relevance of the context tokens (Eq. 3) and filtered (Eq. 6, 7). Every token is read at its
    own state, the one that the task's score tells; Diffusion-CAM's presets are asked for their
    unrefined maps in that state. A word of several tokens is the sum of theirs before Eq. 3.

    The text, and the weights of the context, are those of
    :class:`captum_dcam.methods.tam.TokenActivationMap`: positive logits at the text tokens,
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

    facts: ClassVar[MethodFacts] = MethodFacts(
        "TAM over Grad-CAM",
        "logit lens",
        "TAM, Li et al. 2025, Table 3 (+ Ours)",
        "2 + 1 back (both for every state of the context)",
        ("gradients",),
        text=True,
    )

    def __post_init__(self) -> None:
        if self.relevance not in RELEVANCES:
            raise InputError(f"relevance is {self.relevance!r}: expected one of {RELEVANCES}")
        check_order_and_filter(self.order, self.filter)
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

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        self.inner.check(task)

    def reader(self, task: AttributionTask) -> Reader:
        return Reader(task, self.inner, self.order)

    def word(self, reader: Reader, target: Target) -> tuple[tuple[Tensor, ...], Tensor | None]:
        pairs = zip(target.positions, target.token_ids, strict=True)
        parts = [self._token(reader, position, token) for position, token in pairs]
        images, texts = (torch.stack(values) for values in zip(*parts, strict=True))
        absent = texts.isnan().all(0)
        absent[[reader.lens.tokens.prompt + p for p in target.positions]] = True
        text = texts.nansum(0).masked_fill(absent, float("nan"))
        image, text = joint_min_max(images.sum(0), text)
        return filtered(split_grids(image, reader.task.forward), self.filter), text

    def _token(self, reader: Reader, position: int, token: int) -> tuple[Tensor, Tensor]:
        """A token's map (N,) without its context, and the context's relevance (K,), else NaN."""
        image = reader.map((position, token))
        text = reader.lens.text(reader.task.step(position), token).relu().float()
        context, mapped, pairs = reader.context(position)
        if pairs:
            weights = torch.ones_like(text) if self.relevance == "mean" else text
            maps = torch.stack([reader.map(pair) for pair in pairs])
            same = reader.lens.tokens.ids[mapped] == token
            image, _ = estimated_causal_inference(image, maps, weights[mapped], same)
        shown = torch.full_like(text, float("nan"))
        shown[context] = text[context]
        return image, shown
