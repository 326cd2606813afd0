r"""The forward function that Captum differentiates: one state of a denoising generation.

``DenoisingForward(adapter, layer)`` maps ``(pixels, *extras, *state)`` to response logits
(B, T, V). A state is what the model was given before a denoising step (its canvas, for most
families). So the step is an ordinary tensor argument: Captum's methods expand, repeat and perturb
the pixels beside it, and the state of a token's committing call explains that call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_dcam import checks
from captum_dcam.errors import (
    InputError,
    InputTypeError,
    NotBoundError,
    TargetError,
)
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.guard import fingerprint, modes
from captum_dcam.model.tap import (
    Edit,
    SpatialTap,
    finite,
    not_finite,
    opened,
    recorded,
    replace_hidden,
    skipped,
    tapped,
)
from captum_dcam.model.trajectory import Given, Score, Trajectory, check_score, marked
from captum_dcam.model.verification import check_once

T = TypeVar("T")


class DenoisingForward(nn.Module):
    r"""Captum ``forward_func`` of a masked-denoising model, tapped at one block.

    Args:
        adapter (Adapter): the model's family.
        layer (int, optional): block to tap, from 0; negative counts from the end.
            Default: the family's recommended block
        score (str or int, optional): which state a token is read at when the caller passes none:
            ``commit``, ``final``, ``teacher``, or the number of a denoising step.
            Default: ``"commit"``
        internal_batch_size (int, optional): number of words per backward pass; fewer need less
            memory. Default: what fits into a GPU's free memory, 16 at most with a prefix cache,
            whose steps are short, 4 without

    Attributes:
        tap (SpatialTap): the layer to give to Captum (``layer=forward.tap``) or pytorch-grad-cam.
        request (Request), trajectory (Trajectory): bound by :meth:`generate` or :meth:`bind`.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> image = make_scene(0, 3).image
        >>> trajectory = forward.generate(adapter.prepare([[image]], ["describe the image ."]))
        >>> target = (1, int(trajectory.tokens[0, 1]))
        >>> maps = LayerGradCam(forward, forward.tap).attribute(
        ...     forward.request.pixels,
        ...     target,
        ...     additional_forward_args=forward.arguments(target),
        ... )
        >>> maps.shape
        torch.Size([1, 1, 24, 24])
    """

    def __init__(
        self,
        adapter: Adapter,
        layer: int | None = None,
        score: Score = "commit",
        *,
        internal_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        score = check_score(score)
        self.adapter = adapter
        self.layer = adapter.check_layer(layer)
        if internal_batch_size is not None:
            internal_batch_size = checks.whole("internal_batch_size", internal_batch_size)
        self.score, self.internal_batch_size = score, internal_batch_size
        self.model = adapter.model
        self.tap = SpatialTap()
        self._bound: tuple[Request, Trajectory] | None = None
        self._remembered: dict[Any, Any] = {}

    # -- binding a generation -----------------------------------------------------------------

    def twin(self, layer: int | None = None) -> DenoisingForward:
        """Another forward with the same settings, nothing bound. Default: at the same block"""
        return DenoisingForward(
            self.adapter,
            self.layer if layer is None else layer,
            self.score,
            internal_batch_size=self.internal_batch_size,
        )

    @property
    def bound(self) -> bool:
        """Whether a generation is bound."""
        return self._bound is not None

    @property
    def request(self) -> Request:
        """The request that was generated from; NotBoundError when nothing is bound."""
        return self._binding()[0]

    @property
    def trajectory(self) -> Trajectory:
        """The bound generation; NotBoundError when nothing is bound."""
        return self._binding()[1]

    def _binding(self) -> tuple[Request, Trajectory]:
        if self._bound is None:
            raise NotBoundError(
                "no generation is bound to this forward: call forward.generate(request) first"
            )
        return self._bound

    def generate(
        self,
        request: Request,
        *,
        keep: bool = True,
        generator: torch.Generator | None = None,
        decoding: str | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Generate an answer, record it, and bind it to this forward.

        Args:
            request (Request): from ``adapter.prepare``.
            keep (bool, optional): keep the tapped block's output of every call, so that
                explanations compute nothing below the tap again. Default: True
            generator (torch.Generator, optional): for sampled decoding.
            decoding (str, optional): settings by a name that the family knows: ``demo`` (of its
                authors' demo), ``paper`` (of their evaluation). Default: the family's defaults
            given (Given, optional): tokens that stand in the canvas from the start and stay, see
                :mod:`captum_dcam.model.infill`. Default: none
            **settings: the family's own (``gen_length``, ``steps``, ``temperature``, …), which
                override those of ``decoding``.

        Raises:
            ReplayError: a step of the adapter's first generation, computed again, is another.
        """
        check_pixels(request.pixels)
        checks.draws("generator", generator)
        keep = checks.flag("keep", keep)
        if decoding is not None:
            settings = self.adapter.decoding(decoding, settings)
        seed = None if generator is None else generator.initial_seed()
        with self.held():
            with recorded(self._below(), keep) as (lengths, outputs):
                trajectory = self._generated(request, generator, given, settings)
                stamp = self._stamp(request)
            if bool(trajectory.lengths) != trajectory.own_calls:
                raise InputError(
                    f"{self.adapter.family} returned {len(trajectory.lengths)} lengths with "
                    f"own_calls={trajectory.own_calls}: an adapter gives the lengths of its calls "
                    "where a replay makes others, and says so by own_calls=True"
                )
            if not trajectory.own_calls:
                calls = dict(enumerate(outputs)) if keep else {}
                kept = {"layer": self.layer, "calls": calls, "stamp": stamp}
                trajectory = replace(trajectory, lengths=tuple(lengths), kept=kept)
            trajectory = replace(trajectory, seed=seed)
            check_once(self.adapter, request, trajectory)
        self.bind(request, trajectory)
        return trajectory

    def _generated(
        self,
        request: Request,
        generator: torch.Generator | None,
        given: Given | None,
        settings: dict[str, Any],
    ) -> Trajectory:
        """The adapter's generation; NotFiniteError where its probabilities are none."""
        what, dtype = "the logits of the generation", self.adapter.dtype
        try:
            plain = {name: checks.plain(value) for name, value in settings.items()}
            if given is not None:
                plain["given"] = given
            made = self.adapter.generate(request, generator=generator, **plain)
        except RuntimeError as raised:
            if "probability tensor contains" in str(raised):  # torch.multinomial
                raise not_finite(what, dtype) from raised
            raise
        finite(made.confidence, what, dtype)
        if given is None:
            return made
        return marked(made, given, self.adapter.family, self.adapter.stop_ids)

    def bind(self, request: Request, trajectory: Trajectory) -> None:
        """Bind a generation made elsewhere (another layer's forward, a saved one)."""
        if trajectory.tokens.shape[0] != request.batch:
            raise InputError(
                f"the trajectory has {trajectory.tokens.shape[0]} examples, the request "
                f"{request.batch}: bind the request that was generated from"
            )
        self._bound = (request, trajectory)
        self._remembered = {}

    def again(
        self,
        layer: int | None = None,
        *,
        request: Request | None = None,
        trajectory: Trajectory | None = None,
    ) -> DenoisingForward:
        """Another forward that is bound to the same generation, or to another request or
        trajectory, and has nothing remembered yet. Default: at the same block"""
        other = self.twin(layer)
        other.bind(request or self.request, trajectory or self.trajectory)
        return other

    def remembered(self, key: Any, compute: Callable[[], T]) -> T:
        """What ``compute`` found for this generation; it is called once per key.

        It is called again when the model or the pixels have changed, see :meth:`_stamp`. While
        the tap is edited it is called every time, because it then reads another model.
        """
        if self.tap.edit is not None:
            return compute()
        stamp = self._stamp()
        known = self._remembered.get(key)
        if known is None or known[0] != stamp:
            known = self._remembered[key] = (stamp, compute())
        found: T = known[1]
        return found

    def held(self) -> AbstractContextManager[None]:
        """The model is this thread's alone, in evaluation mode and with frozen parameters, while
        the context is open."""
        return self.adapter.guard.held(self.model)

    def _stamp(self, request: Request | None = None) -> bytes:
        """Bytes that change with all that recorded outputs were computed from: weights, buffers,
        active adapters, hooks, precision, and the request's tensors. Default: the bound one's"""
        request = self.request if request is None else request
        guard, model = self.adapter.guard, self.model

        def of_model() -> bytes:
            tensors = itertools.chain(model.parameters(), model.buffers())
            return fingerprint(tensors) + modes(model, self.adapter.device.type)

        def of_request() -> bytes:
            return fingerprint((request.pixels, *request.extras))

        known = guard.fingerprint(model, of_model), guard.fingerprint(request, of_request)
        return guard.hooks(model) + b"".join(known)

    @property
    def _kept(self) -> dict[str, Any]:
        """What was recorded of the bound generation; emptied where it is out of date."""
        kept, stamp = self.trajectory.kept, self._stamp()
        if kept.get("stamp") != stamp:
            kept.clear()
            kept["stamp"] = stamp
        return kept

    def kept_output(self, call: int) -> Any:
        """What the tapped block returned in a call; None where that was not kept."""
        kept = self._kept
        outputs = kept.get("calls", {}).get(call) if kept.get("layer") == self.layer else None
        return None if outputs is None else outputs[-1]

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """Inside the context nothing is remembered from before: all work is done, and counted."""
        with self.held():
            before, self._remembered = self._remembered, {}
            try:
                yield
            finally:
                self._remembered = before

    # -- Captum's contract ----------------------------------------------------------------------

    def arguments(self, target: Any = None, score: Score | None = None) -> tuple[Tensor, ...]:
        r"""The flat ``additional_forward_args`` of the bound request for one target per example.

        Args:
            target (tuple or list of tuples, optional): Captum's ``(t, token_id)``. It decides the
                step of the ``commit`` score; the others do not need it.
            score (str or int, optional): Default: the forward's own

        Returns:
            tuple of Tensor: extras and state, each (B, …).
        """
        trajectory, request = self.trajectory, self.request
        score = trajectory.check_score(self.score if score is None else score)
        if target is None and score == "commit":
            raise TargetError(
                "the commit score reads every token at its own step: pass the target, "
                "forward.arguments((position, token_id)), or score='final'"
            )
        positions = positions_of(target, request.batch, trajectory.tokens.shape[1])
        examples = torch.arange(request.batch)
        steps = [
            score if target is None and isinstance(score, int) else trajectory.step_of(b, p, score)
            for b, p in enumerate(positions)
        ]
        return (*request.extras, *trajectory.state_at(examples, torch.tensor(steps)))

    def forward(self, pixels: Tensor, *args: Tensor) -> Tensor:
        r"""Response logits (B, T, V) of pixels (B, …) in the state given by ``args``.

        Args:
            pixels (Tensor): as ``request.pixels``.
            *args (Tensor): the request's extras, then the state. Default: those of the bound
                request, in the state of the forward's score (not defined for ``commit``)
        """
        check_pixels(pixels, self.request.pixels)
        if not args:
            args = self.arguments()
        extras, state = self._split(args)
        if any(len(a) != len(pixels) for a in args):
            raise InputError(
                f"{len(pixels)} rows of pixels with {[len(a) for a in args]} rows of additional "
                "arguments: expected as many of each; take the rows of both that belong together"
            )
        with self.held():
            with self._tapped("prefix", len(pixels)):
                memory = self.adapter.prefill(self.adapter.embed(pixels, *extras))
            with self._tapped("none", len(state[0])):
                return finite_logits(self.adapter.denoise(memory, *state))

    def _split(self, args: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(self.request.extras)
        wanted = count + len(self.trajectory.states)
        if len(args) != wanted:
            raise InputError(
                f"{len(args)} additional arguments: expected {wanted} ({count} of the request, "
                "then the state); take them from forward.arguments(target)"
            )
        return args[:count], args[count:]

    def _tapped(self, cache: str, rows: int) -> Any:
        """The tap, where the part inside this context runs the blocks over ``rows`` images; the
        step behind a cached prefix gives the tap its own tokens' leaves, where they are wanted."""
        if self.trajectory.cache == cache:
            return tapped(self.adapter.blocks[self.layer], self.tap, self.request.layout, rows)
        if cache == "prefix" or self.tap.leaves is None:
            return nullcontext()
        every = (self.adapter.blocks, self.adapter.step_blocks)
        return opened([blocks[self.layer] for blocks in every if blocks], self.tap)

    # -- replay without recomputing what is known -----------------------------------------------

    def replay(self, examples: Tensor, steps: Tensor) -> Tensor:
        r"""Logits (R, T, V) of examples (R,) of the bound request at steps (R,).

        With a prefix cache all rows share one prefill, and the tap sees the B examples; without
        a cache the tap sees the R rows. Where the block's output was kept, nothing below the
        tap is computed again. A single row equals the generation bit for bit; several rows equal
        it within rounding.
        """
        rows = examples.cpu()  # indexes tensors of any device, and layers may lie on several
        with self.held():
            if self.trajectory.cache == "none":
                memory = self.adapter.select(self._embedded(), rows)
            else:
                memory = self.prefill()
                if self.request.batch > 1 or len(examples) > 1:
                    memory = self.adapter.select(memory, rows)
            return self.step(memory, examples, steps)

    def prefill(self) -> Any:
        """What all steps of the bound request share; runs through the tap with a prefix cache."""
        with self.held(), self._tapped("prefix", self.request.batch), self._known([0]):
            return self.adapter.prefill(self._embedded())

    def step(self, memory: Any, examples: Tensor, steps: Tensor) -> Tensor:
        """Logits (R, T, V) of examples (R,) at steps (R,) from the memory of R rows."""
        state = self.trajectory.state_at(examples, steps)
        first = 1 if self.trajectory.cache == "prefix" else 0  # the prefill is a call of its own
        calls = [first + int(s) for s in steps]
        with self.held(), self._tapped("none", len(examples)):
            with self._known(calls, examples.tolist()):
                return finite_logits(self.adapter.denoise(memory, *state))

    def _embedded(self) -> Any:
        """Tower, projector and word embeddings, computed once per generation."""
        with torch.no_grad(), self.held():  # as generated: kernels depend on it
            kept, request = self._kept, self.request
            if "embedded" not in kept:
                kept["embedded"] = self.adapter.embed(request.pixels, *request.extras)
        return kept["embedded"]

    def _known(self, calls: list[int], examples: list[int] | None = None) -> Any:
        """Context in which blocks up to the tap return what they returned in a call, or each row
        what its example had in its own call; an empty one where that was not kept."""
        kept = self._kept
        known = kept.get("calls", {})
        if kept.get("layer") != self.layer or any(call not in known for call in calls):
            return nullcontext()
        outputs = known[calls[0]]
        if examples is not None:
            every = range(self.layer + 1)
            outputs = [_rows([known[call][i] for call in calls], examples) for i in every]
        return skipped(self._below(), outputs)

    def _below(self) -> list[nn.Module]:
        return list(self.adapter.blocks[: self.layer + 1])

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Replace feature maps at the tap while the context is open (ablations)."""
        with self.held():
            before, self.tap.edit = self.tap.edit, edit
            try:
                yield
            finally:
                self.tap.edit = before


def _rows(outputs: list[Any], examples: list[int]) -> Any:
    """Row r of the result is example ``examples[r]`` of output r; caches must be absent."""
    first = outputs[0]
    if first is None or (isinstance(first, tuple) and first[0] is None):
        return first
    pick = [o[0] if isinstance(o, tuple) else o for o in outputs]
    hidden = torch.stack([h[e] for h, e in zip(pick, examples, strict=True)])
    return replace_hidden(first, hidden)


F = TypeVar("F", bound=Callable[..., Any])


def holding(function: F) -> F:
    """Decorator: the forward that a function is given first, or that a Captum object has, is held
    while it runs."""

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        forward = first if isinstance(first, DenoisingForward) else first.forward_func
        with forward.held():
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


def finite_logits(logits: Tensor) -> Tensor:
    """The logits; NotFiniteError where they are NaN or plus infinity. Decoders rule tokens out by
    minus infinity."""
    finite(logits.detach().amax(-1), "the logits", logits.dtype)
    return logits


def check_pixels(pixels: Tensor, like: Tensor | None = None) -> None:
    """Raise for pixels that cannot be explained: NaN, infinite, or no rows of the request's own, as
    whose pixels (B, …) they must be ``like``."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        kind = str(pixels.dtype) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputTypeError(f"pixels are {kind}: expected a floating-point tensor, request.pixels")
    if like is not None:
        _check_like(pixels, like)
    if not bool(torch.isfinite(pixels).all()):
        bad = int((~torch.isfinite(pixels)).sum())
        raise InputError(
            f"pixels {tuple(pixels.shape)} hold {bad} values that are NaN or infinite: check the "
            "image and its preprocessing"
        )


def _check_like(pixels: Tensor, like: Tensor) -> None:
    """Raise for pixels that are no rows of the same kind."""
    if pixels.shape[1:] != like.shape[1:] or not len(pixels):
        raise InputError(
            f"pixels have shape {tuple(pixels.shape)}: expected rows {tuple(like.shape[1:])} as "
            "forward.request.pixels has them; an image of another size is a request of its own "
            "(adapter.prepare)"
        )
    if pixels.dtype != like.dtype:
        raise InputTypeError(
            f"pixels are {pixels.dtype}: expected {like.dtype} as forward.request.pixels; give "
            "pixels.to(forward.request.pixels)"
        )
    if pixels.device != like.device:
        raise InputError(
            f"pixels are on {pixels.device}: expected {like.device} as forward.request.pixels; "
            "give pixels.to(forward.request.pixels)"
        )


def positions_of(target: Any, batch: int, length: int) -> list[int]:
    """Response position of every example's Captum target ``(t, token_id)``."""
    if target is None:
        return [0] * batch
    targets = target if isinstance(target, list) else [target] * batch
    if len(targets) != batch:
        raise TargetError(
            f"{len(targets)} targets for {batch} examples: give one (position, token_id), or a "
            "list with one for each example"
        )
    for one in targets:
        pair = isinstance(one, tuple) and len(one) == 2
        if not pair or any(checks.as_whole(v) is None for v in one):
            raise TargetError(
                f"target {one!r} is not (position, token_id): two integers, as Captum indexes "
                "logits (B, T, V)"
            )
        if not 0 <= one[0] < length:
            raise TargetError(
                f"position {one[0]} is not in the answer of {length} positions, 0 to {length - 1}"
            )
        if one[1] < 0:
            raise TargetError(f"token id {one[1]} is negative: expected an id of the vocabulary")
    return [int(one[0]) for one in targets]


def check_example(request: Request, example: Any) -> int:
    """The number of an example of the batch."""
    found = checks.whole("example", example, least=None)
    if not 0 <= found < request.batch:
        raise TargetError(f"example {found} is not in the bound batch of {request.batch}")
    return found


def single(forward: DenoisingForward, example: int = 0) -> DenoisingForward:
    """A forward of the same model and block, bound to one example of the generation alone."""
    request, trajectory = forward.request, forward.trajectory
    example = check_example(request, example)
    if request.batch == 1:
        return forward
    narrowed = forward.twin()
    narrowed.tap.edit = forward.tap.edit
    narrowed.bind(request.single(example), trajectory.single(example))
    return narrowed
