r"""Repairs that the code of several families needs under newer versions of what it is built on.

Every function says what breaks and since when, and changes nothing where nothing is broken.
Contexts undo their repair; what ``load`` repairs on upstream's classes stays. Repairs of one family
alone are in its own ``compat.py``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import Tensor

from captum_dcam.errors import MissingPackageError
from captum_dcam.model.adapter import device_of
from captum_dcam.model.buffers import plain_frequencies
from captum_dcam.model.versions import transformers_major


@contextmanager
def shadowed(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes in front of those that ``owner`` inherits, while the context is open."""
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes in place of those that ``owner`` itself has, while the context is open."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def lent(owner: Any, **values: Any) -> AbstractContextManager[None]:
    """Attributes that ``owner`` lacks, while the context is open."""
    return shadowed(owner, **{n: v for n, v in values.items() if not hasattr(owner, n)})


# -- names and classes ----------------------------------------------------------------------------


def moved_names() -> None:
    r"""Names that LLaVA-type packages import from ``transformers.modeling_utils``.

    transformers 5 keeps ``apply_chunking_to_forward`` and ``prune_linear_layer`` in
    ``pytorch_utils`` only and has dropped ``find_pruneable_heads_and_indices``. All are used by a
    resampler that these families do not have; the dropped one raises where it is called.
    """
    here: Any = importlib.import_module("transformers.modeling_utils")
    there = importlib.import_module("transformers.pytorch_utils")
    moved = ("apply_chunking_to_forward", "prune_linear_layer")
    for name in (*moved, "find_pruneable_heads_and_indices"):
        if not hasattr(here, name):
            setattr(here, name, getattr(there, name, functools.partial(_gone, name)))


def _gone(name: str, *_args: Any, **_kwargs: Any) -> None:
    raise MissingPackageError(f"transformers.modeling_utils.{name} is gone since transformers 5")


def tied_by_map(*classes: Any) -> None:
    """``_tied_weights_keys`` must map since transformers 5; these classes tie nothing."""
    for cls in classes:
        if not isinstance(cls._tied_weights_keys, dict):
            cls._tied_weights_keys = {}


def tied_to_words(*classes: Any) -> None:
    """``_tied_weights_keys`` must map since transformers 5; these classes tie their head to the
    word embedding, where their configuration says so."""
    for cls in classes:
        if transformers_major() >= 5 and not isinstance(cls._tied_weights_keys, dict):
            cls._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}


def without_arguments(cls: Any) -> None:
    """``tie_weights`` of a class takes the arguments that transformers 5 calls it with."""
    original = cls.tie_weights
    kinds = [p.kind for p in inspect.signature(original).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def tie_weights(self: Any, *_args: Any, **_kwargs: Any) -> None:
        original(self)

    cls.tie_weights = tie_weights


def parents_constructor(config: Any, parent: Any) -> None:
    """transformers 5 gives a configuration class a constructor of its own that knows none of its
    parent's arguments: the parent's is put in its place."""
    if config.__init__ is not parent.__init__:
        config.__init__ = parent.__init__


def unchecked(*_args: Any, **_kwargs: Any) -> None:
    """``validate`` of upstream's generation configurations, which checks nothing, with the
    arguments that transformers 5 calls it with."""


@contextmanager
def deepspeed() -> Iterator[None]:
    """A module ``deepspeed`` inside the context, where none is installed: LLaVA-type packages
    import it for the checkpointing of training, the one function that this has."""
    if importlib.util.find_spec("deepspeed") is not None:
        yield
        return
    made: Any = types.ModuleType("deepspeed")
    made.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    made.checkpointing = types.SimpleNamespace(
        checkpoint=functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    )
    sys.modules["deepspeed"] = made
    try:
        yield
    finally:
        del sys.modules["deepspeed"]


@contextmanager
def around_loading(around: Callable[..., Any]) -> Iterator[None]:
    """Inside the context ``from_pretrained`` of every model of transformers goes through
    ``around(cls, load, *args, **options)``, whose ``load`` is what it would have called."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    original: Any = vars(base)["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        return around(cls, functools.partial(original.__func__, cls), *args, **options)

    base.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        base.from_pretrained = original


# -- LLaVA-type vision towers ---------------------------------------------------------------------


def siglip() -> Any:
    """Upstream's module of the SigLIP tower."""
    return importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")


def siglip_token() -> None:
    """``SigLipVisionConfig.from_pretrained`` calls ``_set_token_in_kwargs``, gone since
    transformers 5."""
    config = siglip().SigLipVisionConfig
    if not hasattr(config, "_set_token_in_kwargs"):
        config._set_token_in_kwargs = staticmethod(lambda kwargs: None)


def empty_tower() -> AbstractContextManager[None]:
    """SigLIP towers are built empty, to be filled from a LLaVA-type checkpoint that holds them.

    Upstream loads them inside the model's constructor; transformers 5 refuses that, as constructors
    run without storage.
    """
    cls = siglip().SigLipVisionModel

    def empty(name: str, **_options: Any) -> Any:
        return cls(cls.config_class.from_pretrained(name))

    return shadowed(cls, from_pretrained=empty)


def reachable(tower: Any) -> None:
    """LLaVA-type towers move images to where their weights are, which is meta once accelerate has
    offloaded these: their class then says where it computes (any version)."""
    weights = next(tower.parameters(), None)
    if (
        weights is not None
        and weights.is_meta
        and isinstance(getattr(type(tower), "device", None), property)
    ):
        type(tower).device = property(device_of)


# -- positions -----------------------------------------------------------------------------------


def default_frequencies(config: Any, device: Any = None, **_other: Any) -> tuple[Tensor, float]:
    """What ``ROPE_INIT_FUNCTIONS["default"]`` was: transformers 5 computes plain embeddings in
    every model's own code. ``inv_freq`` (d / 2,), and the attention's scaling."""
    given = getattr(config, "rope_parameters", None) or {}
    base = given.get("rope_theta") or config.rope_theta
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return plain_frequencies(base, width, device), 1.0


def plain_tables(model: Any) -> None:
    """LLaDA's sines and cosines of positions are cached at the first call; if that ran under
    ``torch.inference_mode`` they can be in no graph. Ordinary copies replace them (any version)."""
    for block in model.model.transformer.blocks:
        # one dictionary that all blocks share upstream
        held = vars(block.rotary_emb) if hasattr(block, "rotary_emb") else {}
        for table in (v for name, v in held.items() if name.endswith("__cache")):
            for key, value in table.items():
                if value.is_inference():
                    table[key] = value.clone()
