r"""What a model family implements, and what it is asked.

An adapter splits one denoising call into three parts, so that an attribution differentiates only
the part that it needs: :meth:`Adapter.embed` (tower, projector, word embeddings),
:meth:`Adapter.prefill` (what all steps share) and :meth:`Adapter.denoise` (one step). Adapters know
nothing of methods.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam import checks
from captum_dcam.errors import (
    InputError,
    InputTypeError,
    LayerError,
    MethodError,
    RegistrationError,
    UnknownNameError,
    WeightsError,
)
from captum_dcam.model.facts import (
    Checkpoint,
    FamilyFacts,
    ModelFamily,
    last_but_one,
    third_of,
)
from captum_dcam.model.families import ADAPTERS, GROUP, built_in
from captum_dcam.model.guard import Guard, alone, guard_of
from captum_dcam.model.layout import Layout
from captum_dcam.model.prompts import Video
from captum_dcam.model.trajectory import Trajectory

__all__ = ["Adapter", "Checkpoint", "FamilyFacts", "Request", "register"]

R = TypeVar("R", bound="Request")


@dataclass(frozen=True)
class Request:
    r"""Prepared input of B examples with one layout.

    Args:
        pixels (Tensor): (B, …), the differentiable input: what Captum calls ``inputs``.
        extras (tuple of Tensor): flat, batch first: the rest of the model's input.
        layout (Layout): shared by all examples.
        prompts (tuple of str): one per example.
        images (tuple): for every example its images, for drawing.
        dialogue (Tensor): (B, P) bool, on the CPU: the places of the prefix that hold what the
            prompt itself says, the texts of its user's and assistant's messages in all turns. What
            the template writes is not of it: system messages, roles, markers, line breaks.
    """

    pixels: Tensor
    extras: tuple[Tensor, ...]
    layout: Layout
    prompts: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    dialogue: Tensor = field(repr=False)

    @property
    def batch(self) -> int:
        return self.pixels.shape[0]

    def single(self: R, example: int) -> R:
        """The request of one example (B = 1)."""
        one = slice(example, example + 1)
        return replace(
            self,
            pixels=self.pixels[one],
            extras=tuple(e[one] for e in self.extras),
            prompts=self.prompts[one],
            images=self.images[one],
            dialogue=self.dialogue[one],
        )

    def rows(self: R, examples: Sequence[int], pixels: Tensor) -> R:
        """The request of examples, each as often as it is named, that show ``pixels`` (R, …)."""
        return replace(
            self,
            pixels=pixels,
            extras=tuple(e[torch.tensor(examples, device=e.device)] for e in self.extras),
            prompts=tuple(self.prompts[e] for e in examples),
            images=tuple(self.images[e] for e in examples),
            dialogue=self.dialogue[list(examples)],
        )


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter; where that is offloaded, the device on which accelerate
    computes it. WeightsError for a model that was never filled: all of it is on meta."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    hooks += [inner for hook in hooks for inner in getattr(hook, "hooks", ())]  # in a sequence
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    places = [torch.device(place) for place in found if place is not None]
    computing = next((place for place in places if place.type != "meta"), None)
    if computing is None:
        raise WeightsError(
            f"the weights of this {type(model).__name__} are on the device meta, which holds no "
            "numbers: fill them first, as from_pretrained, load_state_dict(…, assign=True) and "
            "accelerate.load_checkpoint_and_dispatch do"
        )
    return computing


#: settings that say the same in two ways: one of them overrides the other of a named decoding
SAME = (("gen_length", "max_new_tokens"), ("steps", "step_ratio"))
#: positions whose probabilities are computed at once, in float64
ROWS = 64
#: methods that run a model or its processor: they take the model's lock (tokenizers of Hugging Face
#: do not let two threads in either)
RUNNING = (
    *("prepare", "generate", "embed", "prefill", "denoise", "unembed"),
    *("encode", "token_texts", "prompt_tokens"),
)


class Adapter(ModelFamily, ABC):
    r"""One model family.

    Args:
        model (nn.Module): as its authors load it.
        processor (object): the family's processor.
        cache (str, optional): what its calls reuse: ``prefix`` (image and prompt are computed
            once) or ``none`` (the whole sequence at every step). Default: the first of ``caches``
    """

    #: ``model_type`` values of the family's Hugging Face configurations
    model_types: ClassVar[tuple[str, ...]] = ()
    #: class names in ``architectures`` of these configurations, where ``model_type`` is shared
    architectures: ClassVar[tuple[str, ...]] = ()
    #: a context in which the authors' code can be imported and loads its checkpoints, with repairs
    #: for versions of its packages that it was not written for
    repaired: ClassVar[Callable[[], AbstractContextManager[Any]]] = nullcontext
    #: why holes of an answer cannot be filled; empty: :meth:`generate` takes ``given``
    unfillable: ClassVar[str] = "its adapter's generate takes no given tokens"
    #: the next generation's replay is checked, see :mod:`captum_dcam.model.verification`; then not
    unverified: bool = True
    #: what it was loaded from, as :func:`captum_dcam.load` was told; None: it was wrapped
    source: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in RUNNING:
            if name in vars(cls):
                setattr(cls, name, alone(vars(cls)[name]))

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        cache = self.caches[0] if cache is None else cache
        if cache not in self.caches:
            raise InputError(f"cache is {cache!r}: {self.family} knows {self.caches}")
        self.model, self.processor, self.cache = model, processor, cache

    @classmethod
    @abstractmethod
    def load(cls, source: str | None, **options: Any) -> Adapter:
        """Load from a folder or hub name; None: the family's own default."""

    @staticmethod
    @abstractmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model belongs to this family."""

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        """Whether a checkpoint's ``config.json`` is this family's, where others have the same
        ``architectures`` or ``model_type``."""
        return True

    @property
    def guard(self) -> Guard:
        """What all adapters of this model share; its ``lock`` is :attr:`lock`."""
        return guard_of(self.blocks[0])

    @property
    def lock(self) -> threading.RLock:
        r"""The model's lock, which all explanations of the model take by themselves.

        A thread that calls the model directly, ``model.generate`` in a server, say, beside threads
        that explain it, does so inside ``with adapter.lock:``. It is re-entrant. One forward
        belongs to one thread, or is used inside the lock as well.
        """
        return self.guard.lock

    # -- what a family declares ---------------------------------------------------------------

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks in order; each returns hidden states (B, L, D), perhaps in a tuple."""

    @property
    def step_blocks(self) -> Sequence[nn.Module]:
        """The modules that a step runs in place of the blocks, where these run in the prefill alone
        (encoder and decoder); the same number is the same block. Empty: the blocks themselves."""
        return ()

    @property
    def deepest_block(self) -> int:
        """Deepest block with a path from image tokens to the response; the last has none."""
        return last_but_one(len(self.blocks))

    @property
    def recommended_block(self) -> int:
        """Block used when the user names none: a third of the depth, as the paper's 10 of 32."""
        return min(self.deepest_block, third_of(len(self.blocks)))

    @property
    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """Ids that end or pad an answer and are never explained."""

    @property
    def vocabulary(self) -> int:
        """V: ids 0 to V - 1 have a logit."""
        model: Any = self.model
        return int(model.get_input_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where requests are put, see :func:`device_of`."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter: quantised ones are integers."""
        every = self.model.parameters()
        return next(p.dtype for p in every if p.is_floating_point())

    # -- what a family computes ---------------------------------------------------------------

    @abstractmethod
    def prepare(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> Request:
        """A request of the images and prompts of B examples; raises for bad input before any work.

        A prompt is a string, or a conversation as :mod:`captum_dcam.model.prompts` takes it. Where
        the family takes videos, a :class:`~captum_dcam.model.prompts.Video` may stand in the place
        of an image, with one grid per group of frames.
        """

    def check_request(self, images: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> None:
        """Raise for input of a kind that the family does not take; ``prepare`` calls it first."""
        if not prompts or len(images) != len(prompts):
            raise InputError(
                f"{len(images)} lists of images for {len(prompts)} prompts: every example of a "
                "batch needs one prompt and one list of images"
            )
        if len(prompts) > 1 and not self.batches:
            raise InputError(
                f"a batch of {len(prompts)} examples: {self.family} runs one at a time; prepare "
                "and explain them one by one"
            )
        for number, shown in enumerate(images):
            if not isinstance(shown, list | tuple):
                raise InputTypeError(
                    f"the images of example {number} are a {type(shown).__name__}: expected a list "
                    "of images for each example, as in prepare([[image]], [prompt])"
                )
            if len(shown) > 1 and not self.several_images:
                raise InputError(
                    f"example {number} has {len(shown)} images: {self.family} takes one"
                )
            if not self.takes_video and any(isinstance(one, Video) for one in shown):
                raise InputError(
                    f"example {number} has a video: {self.family} takes none; give single frames "
                    "as images instead"
                )

    @abstractmethod
    def generate(
        self, request: Request, *, generator: torch.Generator | None, **settings: Any
    ) -> Trajectory:
        """Decode without gradients. The caller fills the trajectory's ``lengths`` and ``kept``,
        unless it has ``own_calls``: then a replay calls the blocks in another way, the adapter
        gives the lengths, and nothing is kept.

        Where :attr:`unfillable` is empty it also takes ``given``
        (:class:`~captum_dcam.model.trajectory.Given`, or None): tokens that stand in the canvas
        from the start, and stay."""

    @abstractmethod
    def embed(self, pixels: Tensor, *extras: Tensor) -> Any:
        """Everything below the first block, differentiable in ``pixels``."""

    @abstractmethod
    def prefill(self, embedded: Any) -> Any:
        """What all steps share: with a prefix cache one call of the blocks over the prefix."""

    @abstractmethod
    def select(self, memory: Any, index: Tensor) -> Any:
        """The memory of examples ``index`` (R,), so that R states can run in one batch."""

    def memory_tensors(self, memory: Any) -> list[Tensor]:
        """Tensors (B, …) of the cache through which steps see the prefix (prefix cache)."""
        raise MethodError(f"{self.family} does not cache its prefix")

    def replace_memory(self, memory: Any, tensors: Sequence[Tensor]) -> Any:
        """The memory with other tensors in place of those of the cache that require grad."""
        raise MethodError(f"{self.family} does not cache its prefix")

    @abstractmethod
    def denoise(self, memory: Any, *state: Tensor) -> Tensor:
        """Logits (B, T, V) of one step; row t predicts response position t, whatever the family."""

    @abstractmethod
    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (…, D) to (…, V)."""

    @abstractmethod
    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of every token, with a leading blank where it begins a word."""

    def decoding(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a decoding by its name, see ``decodings`` of the family's facts, with single
        settings ``given`` in place of its own."""
        known = self.facts.decodings if self.facts else {}
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "none of its decodings has a name"
            raise UnknownNameError(
                f"unknown decoding {name!r} of {self.family}: {has}; or give single settings"
            )
        told = {other for pair in SAME for other in pair if set(pair) & given.keys()}
        return {**{n: v for n, v in known[name].items() if n not in told}, **given}

    def confidence_of(self, logits: Tensor, tokens: Tensor, *state: Tensor) -> Tensor:
        """Probabilities (R, T) of tokens (R, T) by the logits (R, T, V) of a state, as
        ``generate`` records them. Default: the softmax"""
        found = [
            rows.double().softmax(-1).gather(-1, ids[..., None])[..., 0]
            for rows, ids in zip(logits.split(ROWS, 1), tokens.split(ROWS, 1), strict=True)
        ]
        return torch.cat(found, 1).float()

    def warning(self, pictures: Sequence[Image.Image]) -> str:
        """What a reader must know before anything else of an answer about pictures: that they are
        of a kind that the model never saw. Default: empty, nothing"""
        return ""

    # -- what some methods ask for beyond the above ------------------------------------------------

    def prepare_again(self, request: Request, pictures: Sequence[Image.Image]) -> Request:
        """The same prompts with other images in place of those of ``request.images[0]``."""
        return self.prepare([list(pictures)] * request.batch, list(request.prompts))

    def forced_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """States (T, B, …) in which a given answer (B, T) is read, token t in state t, where all
        tokens but t are visible. Causal families: the tokens before t."""
        if self.mask_id is None:
            raise MethodError(
                f"{self.family} has no mask token: a given answer cannot be masked token by token"
            )
        count = tokens.shape[1]
        own = torch.eye(count, dtype=torch.bool, device=tokens.device)
        return (tokens[None].where(~own[:, None], self.mask_id),)

    def visible_state(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The state (B, …) in which the whole answer (B, T) is visible."""
        return (tokens,)

    def whole_answer(self, ids: Sequence[int]) -> list[int]:
        """A given answer as the family would have written it: with padding, where its answers have
        lengths of their own."""
        return list(ids)

    def retraced(self, request: Request, tokens: Tensor, steps: Tensor) -> dict[str, Any]:
        r"""What a trajectory holds of an answer (1, T) whose tokens were revealed at ``steps`` (1,
        T): states, final_state, commit_step, lengths, own_calls, read_at. Default: a decoder that
        fills in masks, and computes the whole canvas at every step.

        Raises:
            MethodError: ids and steps do not tell this family's canvases.
            InputError: steps that its decoder cannot take.
        """
        if self.mask_id is None:
            raise MethodError(
                f"{self.family} has no mask token: when a token was written does not tell what "
                "stood on the canvas before; give the answer alone, as a text or as ids"
            )
        kept, count = tokens != self.mask_id, tokens.shape[1]
        early = (kept & (steps < 0)).nonzero()
        if len(early):
            at = int(early[0, 1])
            raise InputError(
                f"token {at} of the answer has step {int(steps[0, at])}: expected the step that "
                "revealed it, from 0; a token that no step has revealed is the mask, "
                f"{self.mask_id}"
            )
        total = int(torch.where(kept, steps, 0).max()) + 1
        commits = torch.where(kept, steps, total - 1)
        number = torch.arange(total, device=tokens.device)[:, None, None]
        prefix = request.layout.prefix_length
        whole = (prefix + count,) * total
        return {
            "states": (tokens.masked_fill(commits >= number, self.mask_id),),
            "final_state": self.visible_state(tokens),
            "commit_step": commits,
            "lengths": (prefix, *[count] * total) if self.cache == "prefix" else whole,
        }

    #: images of any size keep their size; False: they are resized to the model's
    any_size: ClassVar[bool] = False

    def pixel_tokens(self, request: Request) -> Tensor:
        """(1, …) int64 like one example's pixels: the image token (counted over all grids, row by
        row) that every element of the pixel tensor belongs to, -1 for none."""
        raise MethodError(
            f"{self.family} does not tell which image token a pixel belongs to: methods that read "
            "or mask pixels cannot run on it; use one that reads the tapped block"
        )

    @abstractmethod
    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        """Positions (K,) in the hooked sequence and ids (K,) of the prompt's text tokens, without
        image tokens, padding and markers. All of its text: ``request.dialogue`` at these positions
        tells what the prompt itself says from what the template adds."""

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token; None for families without one."""
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without markers: the inverse of joining :meth:`token_texts`."""
        raise MethodError(f"{self.family} cannot encode a text: give token ids")

    def query_position(self, layout: Layout, position: int) -> int:
        """The hooked position whose output predicts a response position; one less in models that
        predict the next token."""
        return layout.prefix_length + position

    def attention_module(self, block: nn.Module) -> nn.Module:
        """The part of a block whose output is its attention (after the output projection)."""
        for name, part in block.named_children():
            if "attn" in name or "attention" in name:
                return part
        raise MethodError(
            f"{self.family}: no part of {type(block).__name__} is called attention: methods that "
            "change attention cannot run on it"
        )

    # -- shared ----------------------------------------------------------------------------------

    def check_layer(self, layer: int | None) -> int:
        """The block to hook, counted from 0 (negative: from the end); LayerError when unusable."""
        count = len(self.blocks)
        if layer is None:
            return self.recommended_block
        found = checks.as_whole(layer)
        if found is None:
            raise InputTypeError(f"layer is {layer!r}: expected a block's number, 0 to {count - 1}")
        index = found + count if found < 0 else found
        if not 0 <= index < count:
            raise LayerError(
                f"layer {layer} is not in the model: {self.family} has {count} blocks, 0 to "
                f"{count - 1}; the deepest usable one is {self.deepest_block}"
            )
        if index > self.deepest_block:
            raise LayerError(
                f"block {index} has no path from its image tokens to the response: the deepest "
                f"usable block of {self.family} is {self.deepest_block}"
            )
        return index


A = TypeVar("A", bound=type[Adapter])


def register(cls: A) -> A:
    r"""Class decorator: make a family known by its ``family`` name.

    Raises:
        RegistrationError: the name belongs to another class, or to a family of this library,
            imported or not.
    """
    if cls.family in built_in() and not cls.__module__.startswith(f"{GROUP}.{cls.family}"):
        raise RegistrationError(
            f"model family {cls.family!r} is one of captum_dcam's, so {cls.__qualname__} was not "
            "entered: choose another name"
        )
    return ADAPTERS.register(cls.family)(cls)
