r"""Block diffusion on a causal prefix: what its families share.

The sequence is cut into blocks of L positions; a position sees its own block and all before it. The
prompt's whole blocks are computed once, and their keys and values stored. Every further block is
denoised behind them, step by step, until none of its positions is masked; one more pass, which is
no step, then stores its keys and values. So images are in the prefill alone, and gradients of every
block reach them through the cache, of later blocks also by way of the blocks before.

Where blocks are counted from the sequence's start, the prompt's last P mod L positions stand in the
first block, with the answer's first tokens behind them, and no prefill holds them. A family may
also prefill its prompt whole, and begin its blocks behind it.

A step of a generation runs one block. Its replay runs the whole answer in one pass, which computes
the same: no block sees a later one. Logits of other blocks than the step's are no generation's, and
``read_at`` says which are. A token commits at the step that changed it last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from captum_dcam.adapters.common.compat import shadowed
from captum_dcam.adapters.common.conversations import ConversationAdapter
from captum_dcam.adapters.common.holes import started
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.qwen import unchanged
from captum_dcam.adapters.common.recording import CanvasLog, seeded
from captum_dcam.adapters.common.settings import Settings, count, need_generator
from captum_dcam.adapters.common.text import special_ids
from captum_dcam.adapters.common.visuals import Family
from captum_dcam.errors import InfeasibleStepError, InputError
from captum_dcam.model.adapter import Request
from captum_dcam.model.tap import wide
from captum_dcam.model.trajectory import Given, Trajectory


@dataclass(frozen=True)
class Blocks:
    r"""Where the blocks of a sequence lie.

    Args:
        length (int): L, positions of a block.
        prompt (int): P, tokens of the prompt.
        origin (int): where blocks are counted from: 0, or P where the prompt is prefilled whole.

    Examples::

        >>> blocks = Blocks(4, prompt=10, origin=0)
        >>> blocks.stored, blocks.tail  # the prefill's positions, and what is left of the prompt
        (8, 2)
        >>> blocks.whole(5)  # tokens of an answer up to the end of its last block
        6
        >>> blocks.seen(8, 12).int().tolist()  # doctest: +ELLIPSIS
        [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], ...
    """

    length: int
    prompt: int
    origin: int

    @property
    def tail(self) -> int:
        """Positions of the prompt that stand in the answer's first block."""
        return (self.prompt - self.origin) % self.length

    @property
    def stored(self) -> int:
        """Positions of the prefill."""
        return self.prompt - self.tail

    def whole(self, tokens: int) -> int:
        """The number of an answer's tokens, rounded up to whole blocks."""
        return -(-(self.tail + tokens) // self.length) * self.length - self.tail

    def span(self, number: int) -> tuple[int, int]:
        """Of block ``number`` the first position and one past the last, counted in the answer."""
        start = number * self.length - self.tail
        return max(0, start), start + self.length

    def seen(self, start: int, stop: int) -> Tensor:
        """(stop - start, stop) bool: what the positions from ``start`` on see."""
        number = torch.arange(stop).sub(self.origin).div(self.length, rounding_mode="floor")
        return number <= number[start:, None]


# -- recording ------------------------------------------------------------------------------------


@dataclass
class BlockLog(CanvasLog):
    r"""The record of one answer (1, T) that is written block after block.

    Args:
        blocks (Blocks): where they lie.
        total (int): T, in whole blocks.
        given (Given, optional): (1, T) tokens that stand in the canvas from the start.

    Attributes:
        spans (list): of every step its block's (first, one past the last) position.
    """

    blocks: Blocks = field(kw_only=True)
    total: int = field(kw_only=True)
    given: Given | None = field(kw_only=True, default=None)
    spans: list[tuple[int, int]] = field(default_factory=list)
    _open: bool = False
    _last: int = 0

    def __post_init__(self) -> None:
        empty = torch.full((1, self.total), self.mask_id)
        self.canvas = empty if self.given is None else self.given.canvas(self.mask_id)

    def begun(self, number: int) -> Tensor:
        """What stands in block ``number`` (1, n) before its first step."""
        first, last = self.blocks.span(number)
        return self.canvas[:, first:last].clone()

    def step(self, number: int, own: Tensor) -> None:
        """What stands in block ``number`` (1, n) before a step."""
        self._step(self.blocks.span(number), own)

    def _step(self, span: tuple[int, int], own: Tensor) -> None:
        """What stands in a span (1, n), the only one that the step reads."""
        self.spans.append(span)
        self._open = True
        self._fill(span, own)
        self.see(self.canvas)

    def scored(self, logits: Tensor) -> None:
        """Logits (1, L, V) of the step's block, the tail's too."""
        first, last = self.spans[-1]
        self.read(logits[:, first - last :], first)

    def stored(self, number: int, own: Tensor) -> None:
        """What stands in block ``number`` (1, n) in the end."""
        self._open, self._last = False, number
        self._fill(self.blocks.span(number), own)

    def _fill(self, span: tuple[int, int], own: Tensor) -> None:
        first, last = span
        self.canvas = self.canvas.to(own.device)
        self.canvas[:, first:last] = own

    def close(self, answer: Tensor) -> None:
        """The decoder's answer (1, …), for a last block that was not stored because masks are left
        in it; blocks that were not begun are cut."""
        first, last = self.spans[-1]
        if self._open:
            self._open = False
            self.canvas[:, first:last] = answer[:, first:last]
        else:
            last = self.blocks.span(self._last)[1]  # a block that is all given takes no step
        self.cut(last)
        self.finish(self.canvas[:, :last])

    @property
    def read_at(self) -> Tensor:
        """(S, 1, T) bool, the block of every step."""
        return reads(self.spans, self.states)

    @contextmanager
    def listening(self, decoder: nn.Module, words: nn.Module, head: nn.Module) -> Iterator[None]:
        r"""Record a decoder that hands embeddings to its transformer, while the context is open.

        Where a block's embeddings have changed, a step has written the ids that were embedded last.

        Args:
            decoder (nn.Module): is called with ``inputs_embeds``, ``position_ids`` and
                ``store_kv``, which is False in the steps; the first call is the prefill.
            words (nn.Module): embeds what a step would write, (1, L) ids.
            head (nn.Module): gives its logits.
        """
        number = -1  # of the block
        before: Tensor | None = None
        ids = own = torch.empty(0)

        def embedded(_module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal ids
            ids = args[0]

        def called(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal number, before, own
            if number >= 0:
                first, last = self.blocks.span(number)
                if int(kwargs["position_ids"].max()) + 1 - self.blocks.prompt != last:
                    raise left(last)
                now = kwargs["inputs_embeds"][:, first - last :]
                if before is None:
                    own = self.begun(number).to(ids.device)
                else:
                    own = torch.where((now != before).any(-1), ids[:, first - last :], own)
                if not kwargs["store_kv"]:
                    before = now.clone()  # decoders change theirs in place
                    self.step(number, own)
                    return
                self.stored(number, own)
            number, before = number + 1, None

        def headed(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if before is not None:
                self.scored(output)

        with (
            words.register_forward_pre_hook(embedded),
            decoder.register_forward_pre_hook(called, with_kwargs=True),
            head.register_forward_hook(headed),
        ):
            yield


def reads(spans: Sequence[tuple[int, int]], states: Tensor) -> Tensor:
    """(S, 1, T) bool, the span of every step, like the canvases."""
    found = torch.zeros_like(states, dtype=torch.bool)
    for step, (first, last) in enumerate(spans):
        found[step, :, first:last] = True
    return found


def left(last: int) -> InputError:
    """The error about a block with masks in it, behind which no other is decoded."""
    return InputError(
        f"the block that ends at position {last} of the answer was left with masks when its steps "
        "ran out: nothing is recorded behind such a block, which most decoders do not store; give "
        "more steps, or another seed"
    )


# -- the adapter's part ---------------------------------------------------------------------------


class _Handed(Exception):
    """Ends a forward in front of the transformer: what comes behind it is not wanted."""


class BlockAdapter(ConversationAdapter):
    r"""What the adapters of such families share; what they declare stands below.

    Args:
        model (nn.Module): of the family.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    unfillable: ClassVar[str] = ""
    #: paths in the model: of the transformer (``layers``, ``embed_tokens``, ``norm``), of the head,
    #: and of what has the decoding loop (empty: the model itself)
    parts: ClassVar[tuple[str, str, str]]
    #: the loop's name there; it is called with the prompt's ``inputs_embeds``. Empty: the model has
    #: none, and its own forward hands them to the transformer
    loop: ClassVar[str] = ""
    #: blocks begin behind the prompt, which is prefilled whole
    whole_prompt: ClassVar[bool] = False
    #: of a generation; ``gen_length`` is one of them
    settings: ClassVar[Settings]
    #: what prepares the images
    pictures: ClassVar[type[Family]]
    #: what notes a generation
    record: ClassVar[type[BlockLog]] = BlockLog

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        if not self.owns(model):
            raise InputError(
                f"the model is a {type(model).__name__}: expected "
                f"{' or '.join(self.classes) or self.family}, as its authors load it"
            )
        self.decoder, self.head, self._looper = self._found(model)
        super().__init__(model, processor, cache)

    def _found(self, model: nn.Module) -> Sequence[Any]:
        """The modules at :attr:`parts`."""
        return [model.get_submodule(path) for path in self.parts]

    def _family_of(self, parts: Parts) -> Family:
        return self.pictures(self.model.config, parts.tokenizer, parts.image_processor)

    # what a family says besides

    @property
    @abstractmethod
    def block_length(self) -> int:
        """L, positions of a block."""

    @property
    @abstractmethod
    def mask_id(self) -> int:
        """The id of the mask token."""

    @abstractmethod
    def masked(self, seen: Tensor, dtype: torch.dtype) -> Any:
        """(n, m) bool, what n positions see of m, as the family's transformer takes it."""

    @abstractmethod
    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments of the family's ``generate`` for a request."""

    def options(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Those for checked settings. Default: the settings"""
        return dict(made)

    def drawn(self, made: Mapping[str, Any]) -> bool:
        """Whether a generation with these settings draws random numbers."""
        return bool(made["temperature"] > 0)

    def _given(self, given: Given | None, made: Mapping[str, Any]) -> Given | None:
        """Given tokens up to the end of the last block."""
        if given is None:
            return None
        longer = given.longer(made["gen_length"], self._filler)
        self.check_given(longer, made)
        return longer

    def check_given(self, given: Given, made: Mapping[str, Any]) -> None:
        """Raise for checked settings with which given tokens would not stay. Default: none"""

    # what follows from it

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.decoder.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return super().stop_ids | special_ids(self._tokenizer) | {self.mask_id}

    def _blocks(self, prompt: int) -> Blocks:
        """Where blocks lie behind a prompt of so many tokens."""
        return Blocks(self.block_length, prompt, prompt if self.whole_prompt else 0)

    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        r"""Images and prompts to a request.

        As :meth:`~captum_dcam.adapters.common.conversations.ConversationAdapter.prepare`.

        Raises:
            InfeasibleStepError: the prefill, which holds whole blocks of the prompt, does not hold
                the whole image span: nothing could be explained.
        """
        request = super().prepare(images, prompts)
        blocks, end = self._blocks(request.layout.prefix_length), request.layout.image_end
        if blocks.stored < end:
            raise InfeasibleStepError(
                f"image span ends at {end} but the prefill holds {blocks.stored} of the prompt's "
                f"{blocks.prompt} tokens, whole blocks of {blocks.length}: the other "
                f"{blocks.tail} are decoded with the answer, so no call holds the image; put "
                f"{end - blocks.stored} tokens or more of text behind it, or take a smaller block"
            )
        return request

    def checked(
        self, given: Mapping[str, Any], generator: torch.Generator | None
    ) -> dict[str, Any]:
        """Settings with defaults; raises before any work on what cannot work."""
        given = {name: value for name, value in given.items() if value is not None}
        asked = given.pop("block_length", self.block_length)
        if asked != self.block_length:
            raise InputError(
                f"block_length is {asked!r}: the prefill was cut into blocks of "
                f"{self.block_length}; {self.block_advice}"
            )
        made = self.settings.read(given)
        need_generator(self.drawn(made), generator)
        return made

    #: what to do for blocks of another length
    block_advice: ClassVar[str] = (
        "give it to load or wrap, captum_dcam.wrap(model, processor, block_length=…), and leave it "
        "out here"
    )

    def _whole(self, made: dict[str, Any], blocks: Blocks) -> int:
        """T, tokens of the answer's whole blocks, if the model's context holds them."""
        total = blocks.whole(made["gen_length"])
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and blocks.prompt + total > context:
            raise InputError(
                f"the prompt has {blocks.prompt} tokens and {total} are asked for (whole blocks of "
                f"{blocks.length}), but the model's context is {context}: ask for fewer, or give "
                "smaller or fewer images"
            )
        return total

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode as the family does, and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            given (Given, optional): tokens that stand in the canvas from the start; what fills its
                last block up is given, too.
            **settings: the family's, see its class. ``gen_length`` is rounded up to whole blocks.

        Returns:
            Trajectory: of the blocks that were begun. The passes that store a block are no steps.

        Raises:
            TypeError, ValueError: settings that cannot work.
        """
        made = self.checked(settings, generator)
        blocks = self._blocks(request.layout.prefix_length)
        made["gen_length"] = self._whole(made, blocks)
        log = self.record(
            self.mask_id, blocks=blocks, total=made["gen_length"], given=self._given(given, made)
        )
        with torch.no_grad(), seeded(generator, bits=31):
            log.close(self.decode(request, made, log))
        return self.recorded(
            request,
            settings,
            log,
            [log.states],
            self.visible_state(log.tokens),
            lengths=(blocks.stored, *[blocks.length] * len(log.spans)),
            read_at=log.read_at,
        )

    def retraced(self, request: Request, tokens: Tensor, steps: Tensor) -> dict[str, Any]:
        """As the base has it, where every step writes in one block, and blocks follow each other.
        A decoder that writes over tokens leaves steps that revealed none of what is there."""
        blocks, count = self._blocks(request.layout.prefix_length), tokens.shape[1]
        whole = blocks.whole(count)
        if whole != count:
            raise InputError(
                f"the answer has {count} tokens, its last block ends at {whole}: the steps of a "
                f"block of {blocks.length} see all of it; give its other tokens, too, with steps"
            )
        made = super().retraced(request, tokens, steps)
        spans, before = [], -1
        kept, commits = (tokens != self.mask_id)[0], made["commit_step"][0]
        for step in range(len(made["states"][0])):
            at = (kept & (commits == step)).nonzero()[:, 0].tolist()
            if not at:
                raise InputError(
                    f"step {step} reveals no token of the answer: expected steps from 0, with none "
                    "left out; a decoder that writes over tokens (with fewer steps than a block "
                    "has tokens) is not told by ids and steps"
                )
            numbers = sorted({(t + blocks.tail) // blocks.length for t in at})
            if numbers[-1] > numbers[0] or not before <= numbers[0] <= before + 1:
                raise InputError(
                    f"step {step} reveals tokens {at}, of block {', '.join(map(str, numbers))} "
                    f"behind block {max(before, 0)}: expected one block per step, of "
                    f"{blocks.length} positions, one block after the other"
                )
            begun, before = numbers[0] == before, numbers[0]
            spans.append(self._span_of(blocks.span(before), at, begun))
        lengths = (blocks.stored, *[blocks.length] * len(spans))
        read_at = reads(spans, made["states"][0])
        return {**made, "lengths": lengths, "own_calls": True, "read_at": read_at}

    def _span_of(self, block: tuple[int, int], at: Sequence[int], begun: bool) -> tuple[int, int]:
        """What a step reads of the block in which it reveals tokens ``at``; ``begun``: it is not
        the block's first. Default: all of it"""
        return block

    def decode(self, request: Request, made: dict[str, Any], log: BlockLog) -> Tensor:
        """Decode with the family's own ``generate``; returns its answer (1, …)."""
        inputs = self.inputs(request.pixels, request.extras)
        words = self.decoder.embed_tokens
        with (
            log.listening(self.decoder, words, self.head),
            started(log.given, log.blocks.prompt, self.mask_id, words),
        ):
            found = self.model.generate(**inputs, **self.options(made))
        answer: Tensor = found[0] if isinstance(found, tuple) else found
        return answer

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        return Prefix(self.handed(pixels, extras)["inputs_embeds"])

    def handed(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        """What the family's own code hands to its decoding loop, or where the model has none, to
        its transformer: ``inputs_embeds`` (B, P, D) and more."""
        caught: list[dict[str, Any]] = []
        inputs = self.inputs(pixels, extras)

        def stop(*_args: Any, **kwargs: Any) -> Tensor:
            caught.append(kwargs)
            embeds: Tensor = kwargs["inputs_embeds"]
            return embeds

        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            stop(*args, **kwargs)
            raise _Handed

        if self.loop:
            with shadowed(self._looper, **{self.loop: stop}):
                unwrap(type(self.model).generate)(self.model, **inputs)
            return caught[0]
        with unchanged(self.model), self.decoder.register_forward_pre_hook(hook, with_kwargs=True):
            try:
                self.model(**inputs, use_cache=False)
            except _Handed:
                return caught[0]
        raise InputError(f"the {type(self.model).__name__} did not run its language model")

    def prefill(self, embedded: Prefix) -> Prefix:
        blocks, cache = self._blocks(embedded.embeds.shape[1]), DynamicCache()
        self.run(embedded.embeds[:, : blocks.stored], blocks, cache, 0, store=True)
        return embedded.filled(pairs(cache))

    def run(
        self, embeds: Tensor, blocks: Blocks, cache: DynamicCache, start: int, *, store: bool
    ) -> Tensor:
        """Normed states (B, n, D) of embeddings (B, n, D) at ``start`` behind what the cache
        holds; ``store``: it then holds these, too."""
        places = torch.arange(start, start + embeds.shape[1], device=embeds.device)
        seen = blocks.seen(start, start + embeds.shape[1]).to(embeds.device)
        return self.call(embeds, seen, places[None], cache, store_kv=store)

    def call(
        self, embeds: Tensor, seen: Tensor, places: Tensor, cache: DynamicCache, **options: Any
    ) -> Tensor:
        """Normed states (B, n, D) of embeddings at ``places`` (…, n) that see (n, m) bool of what
        the cache holds and of themselves."""
        states: Tensor = self.decoder(
            inputs_embeds=embeds,
            attention_mask=self.masked(seen, embeds.dtype),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            **options,
        )[0]
        return states

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        """Logits (R, T, V) of the whole answer. Where a given one ends inside a block, tokens that
        end an answer fill the block."""
        (canvas,) = state
        blocks = self._blocks(memory.embeds.shape[1])
        missing = blocks.whole(canvas.shape[1]) - canvas.shape[1]
        words = self.decoder.embed_tokens(pad(canvas, (0, missing), value=self._filler))
        tail = memory.embeds[:, blocks.stored :].to(words.dtype)
        cache = stored(memory)
        hidden = self.run(torch.cat((tail, words), 1), blocks, cache, blocks.stored, store=False)
        return wide(self.head(hidden[:, blocks.tail : blocks.tail + canvas.shape[1]]))

    def unembed(self, hidden: Tensor) -> Tensor:
        return wide(self.head(self.decoder.norm(hidden)))


def length_of(given: Any) -> int:
    """The length of a block, as the constructor of an adapter takes it."""
    count("block_length", given)
    return int(given)


def stored(memory: Prefix) -> DynamicCache:
    """A cache of a prefix's keys and values; what is put into it leaves the prefix as it is."""
    cache = DynamicCache()
    for layer, pair in enumerate(memory.cache or ()):
        cache.update(*pair, layer)
    return cache


def pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, in transformers 4 and 5."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))
