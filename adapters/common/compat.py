r"""Small repairs that upstream code needs under newer versions of what it is built on.

Every function repairs one family, says what breaks and since when, and changes nothing where
nothing is broken. Contexts undo their repair; what ``load`` repairs on upstream's classes stays.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from captum_dcam.errors import InputError, MissingPackageError

# -- MMaDA --------------------------------------------------------------------------------------

MMADA_INSTALL = (
    "git clone https://github.com/Gen-Verse/MMaDA && pip install diffusers einops jaxtyping "
    "omegaconf pandas requests typeguard, and put the folder MMaDA on PYTHONPATH (its package is "
    "called models)"
)


def mmada_package() -> Any:
    r"""Upstream's package ``models``, repaired.

    - diffusers 0.42 has no ``FLAX_WEIGHTS_NAME``, which upstream imports and never uses.
    - transformers 5: ``LLaDAModelLM`` never calls ``post_init``, so that loading finds no
      ``all_tied_weights_keys``; its ``tie_weights`` takes none of the arguments it is called with;
      ``MMadaConfig`` has lost the default of ``use_cache``, which the model reads at every call.

    Raises:
        ImportError: no such package, or one of another project.
    """
    try:
        with _flax_name():
            package = importlib.import_module("models")
    except ImportError as error:
        raise MissingPackageError(
            f"MMaDA's own code is needed and cannot be imported ({error}): {MMADA_INSTALL}"
        ) from error
    missing = [n for n in ("MMadaModelLM", "MAGVITv2") if not hasattr(package, n)]
    if missing:
        raise MissingPackageError(
            f"the package models in {getattr(package, '__file__', None)} has no "
            f"{' and no '.join(missing)}: another project's is in front; {MMADA_INSTALL}"
        )
    mmada_classes(package.MMadaModelLM)
    return package


@contextmanager
def _flax_name() -> Iterator[None]:
    """``diffusers.utils.FLAX_WEIGHTS_NAME`` inside the context, where diffusers has it no more."""
    utils: Any = importlib.import_module("diffusers.utils")
    if hasattr(utils, "FLAX_WEIGHTS_NAME"):
        yield
        return
    utils.FLAX_WEIGHTS_NAME = "diffusion_flax_model.msgpack"
    try:
        yield
    finally:
        del utils.FLAX_WEIGHTS_NAME


def mmada_classes(cls: Any) -> None:
    """The repairs of upstream's model class and its configuration; see :func:`mmada_package`."""
    if not hasattr(cls, "all_tied_weights_keys"):
        cls.all_tied_weights_keys = {}
    if not hasattr(cls.config_class, "use_cache"):
        cls.config_class.use_cache = False
    without_arguments(cls)


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


@contextmanager
def mmada_callable(model: nn.Module) -> Iterator[None]:
    r"""MMaDA's model can be called, with gradients too, while the context is open.

    - transformers 5: ``config.use_cache`` is missing, see :func:`mmada_package`; here it is set for
      models that were loaded without that repair.
    - any version: sines and cosines of positions are cached at the first call; if that ran under
      ``torch.inference_mode`` they can be in no graph. They are replaced by ordinary copies.
    """
    config: Any = model.config
    for table in _position_tables(model):
        for key, value in table.items():
            if value.is_inference():
                table[key] = value.clone()
    if hasattr(config, "use_cache"):
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        del config.use_cache


def _position_tables(model: Any) -> list[dict[str, Tensor]]:
    """Cached tables of every block's rotary embedding (one shared dictionary upstream)."""
    found = [vars(b.rotary_emb) for b in model.model.transformer.blocks if hasattr(b, "rotary_emb")]
    return [v for held in found for name, v in held.items() if name.endswith("__cache")]


# -- LLaDA-V --------------------------------------------------------------------------------------


def moved_names() -> None:
    r"""Names that LLaVA-type packages import from ``transformers.modeling_utils``.

    transformers 5 keeps ``apply_chunking_to_forward`` and ``prune_linear_layer`` in
    ``pytorch_utils`` only and has dropped ``find_pruneable_heads_and_indices``. All are used by a
    resampler that these families do not have; the dropped one raises where it is called.
    """
    here: Any = importlib.import_module("transformers.modeling_utils")
    there = importlib.import_module("transformers.pytorch_utils")
    for name in (
        "apply_chunking_to_forward",
        "find_pruneable_heads_and_indices",
        "prune_linear_layer",
    ):
        if not hasattr(here, name):
            setattr(here, name, getattr(there, name, _dropped(name)))


def _dropped(name: str) -> Any:
    def dropped(*_args: Any, **_kwargs: Any) -> None:
        raise MissingPackageError(
            f"transformers.modeling_utils.{name} is gone since transformers 5"
        )

    return dropped


def llada_v_classes(module: Any) -> None:
    r"""Upstream's classes under transformers 5.

    - ``LlavaLLaDAConfig`` gets a constructor of its own that knows none of its parent's arguments:
      the parent's is put in its place.
    - ``_tied_weights_keys`` must map; the family ties nothing.
    - ``SigLipVisionConfig.from_pretrained`` calls ``_set_token_in_kwargs``, which is gone.
    """
    if _transformers() < 5:
        return
    config, parent = module.LlavaLLaDAConfig, module.LLaDAConfig
    if config.__init__ is not parent.__init__:
        config.__init__ = parent.__init__
    for cls in (module.LLaDAModelLM, module.LlavaLLaDAModelLM):
        if not isinstance(cls._tied_weights_keys, dict):
            cls._tied_weights_keys = {}
    siglip = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
    if not hasattr(siglip.SigLipVisionConfig, "_set_token_in_kwargs"):
        siglip.SigLipVisionConfig._set_token_in_kwargs = staticmethod(lambda kwargs: None)


def plain_rope(config: Any) -> None:
    r"""``rope_scaling`` None where the checkpoint has none.

    transformers 5 turns None into ``{"rope_type": "default", …}``, in which upstream looks for
    ``type`` and ``factor``.
    """
    scaling = getattr(config, "rope_scaling", None)
    if isinstance(scaling, dict) and "factor" not in scaling:
        theta = scaling.get("rope_theta", getattr(config, "rope_theta", None))
        config.rope_scaling = None
        if theta is not None:
            config.rope_theta = theta


def rotary_frequencies(model: nn.Module) -> int:
    r"""Recompute ``inv_freq`` of LLaMA-type rotary embeddings; returns how many were wrong.

    They are in no checkpoint, and transformers 5 fills buffers that are in none with whatever the
    memory held: the model runs and answers nonsense.
    """
    wrong = 0
    for part in model.modules():
        if not all(hasattr(part, n) for n in ("inv_freq", "base", "dim")):
            continue
        rotary: Any = part
        even = torch.arange(0, rotary.dim, 2, dtype=torch.int64).float()
        right = (1.0 / rotary.base ** (even / rotary.dim)).to(rotary.inv_freq.device)
        if rotary.inv_freq.shape != right.shape or not torch.equal(rotary.inv_freq.float(), right):
            rotary.inv_freq = right
            wrong += 1
    return wrong


def position_ids(model: nn.Module) -> int:
    """Recompute ``position_ids`` of vision towers (see :func:`rotary_frequencies`)."""
    wrong = 0
    for part in model.modules():
        ids = getattr(part, "position_ids", None)
        count = getattr(part, "num_positions", None)
        if not isinstance(ids, Tensor) or not isinstance(count, int):
            continue
        right = torch.arange(count, device=ids.device).expand(1, -1)
        if not torch.equal(ids, right):
            part.position_ids = right
            wrong += 1
    return wrong


@contextmanager
def empty_tower() -> Iterator[None]:
    """SigLIP towers are built empty, to be filled from a LLaVA-type checkpoint that holds them.

    Upstream loads them inside the model's constructor; transformers 5 refuses that, as constructors
    run without storage.
    """
    siglip = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
    cls = siglip.SigLipVisionModel

    def empty(name: str, **_options: Any) -> Any:
        return cls(cls.config_class.from_pretrained(name))

    cls.from_pretrained = empty
    try:
        yield
    finally:
        del cls.from_pretrained


# -- LaViDa ---------------------------------------------------------------------------------------

LAVIDA_INSTALL = (
    "git clone https://github.com/jacklishufan/LaViDa && pip install --no-deps -e LaViDa && "
    "pip install einops requests deepspeed"
)


def lavida_package() -> Any:
    r"""Upstream's package ``llava``, repaired; returns its ``llava.model.builder``.

    - ``deepspeed`` is imported for the checkpointing of training alone: where it is not installed
      a stand-in with that function takes its place.
    - names that have moved, see :func:`moved_names`; classes, see :func:`lavida_classes`.

    Raises:
        ImportError: no such package, or one of another project of LLaVA's kind.
    """
    moved_names()
    try:
        with _deepspeed():
            llada = importlib.import_module("llava.model.language_model.llava_llada")
            dream = importlib.import_module("llava.model.language_model.llava_dream")
            builder = importlib.import_module("llava.model.builder")
    except ImportError as error:
        raise MissingPackageError(
            f"LaViDa's own code is needed and cannot be imported ({error}): {LAVIDA_INSTALL}. "
            "Other projects have a package llava too (LLaDA-V, LLaVA): one at a time can be "
            "installed"
        ) from error
    lavida_classes(llada, dream)
    return builder


@contextmanager
def _deepspeed() -> Iterator[None]:
    """A module ``deepspeed`` inside the context, where none is installed."""
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


def lavida_classes(llada: Any, dream: Any) -> None:
    r"""Upstream's classes under transformers 5; the arguments are its two modules.

    - configurations get constructors of their own that know none of their parents' arguments.
    - ``tie_weights`` takes none of its new arguments; ``_tied_weights_keys`` must map.
    - ``SigLipVisionConfig.from_pretrained`` calls ``_set_token_in_kwargs``, which is gone.
    - ``ROPE_INIT_FUNCTIONS`` has no ``default``, and ``Cache`` cannot be made without layers.
    - the generation configuration's ``validate`` takes none of its new arguments, and
      ``from_model_config`` looks for Dream's settings in transformers' own configuration.
    """
    if _transformers() < 5:
        return
    for config, parent in (
        (llada.LlavaLladaConfig, llada.LLaDAConfig),
        (dream.LlavaDreamConfig, dream.DreamConfig),
    ):
        if config.__init__ is not parent.__init__:
            config.__init__ = parent.__init__
    without_arguments(llada.LLaDAModelLM)
    for cls in (llada.LlavaLladaForMaskedDiffusion, dream.LlavaDreamForMaskedDiffusion):
        if not isinstance(cls._tied_weights_keys, dict):
            cls._tied_weights_keys = {}
    siglip = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
    if not hasattr(siglip.SigLipVisionConfig, "_set_token_in_kwargs"):
        siglip.SigLipVisionConfig._set_token_in_kwargs = staticmethod(lambda kwargs: None)
    language: Any = importlib.import_module(dream.DreamBaseModel.__module__)
    known = language.ROPE_INIT_FUNCTIONS
    if "default" not in known:
        language.ROPE_INIT_FUNCTIONS = {**known, "default": default_frequencies}
    language.DreamPrefixLMCache.__init__ = _empty_cache
    language.DreamGenerationConfig.validate = _unchecked
    language.DreamGenerationConfig.from_model_config = classmethod(_from_model)


def _empty_cache(self: Any) -> None:
    self.past_key_values, self.layers = {}, []


def _from_model(cls: Any, config: Any) -> Any:
    """A generation configuration of a model's; ``top_k`` as transformers 4 filled it in."""
    names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    return cls(top_k=50, **{n: getattr(config, n, None) for n in names})


def _unchecked(_self: Any, *_args: Any, **_kwargs: Any) -> None:
    """Upstream's own ``validate`` checks nothing, and takes none of today's arguments."""


def default_frequencies(config: Any, device: Any = None, **_other: Any) -> tuple[Tensor, float]:
    """``inv_freq`` (d / 2,) and scaling of plain rotary embeddings, which transformers 5 computes
    in every model's own code."""
    given = getattr(config, "rope_parameters", None) or {}
    base = given.get("rope_theta") or config.rope_theta
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    even = torch.arange(0, size, 2, dtype=torch.int64, device=device).float()
    return 1.0 / base ** (even / size), 1.0


@contextmanager
def lavida_loading(classes: Sequence[Any]) -> Iterator[list[str]]:
    r"""Upstream's builder loads with the vision tower that its checkpoint holds.

    Under transformers 5 towers are built empty, see :func:`empty_tower`; see also
    :func:`lavida_tower`.

    Args:
        classes (sequence of type): the model classes that the builder loads.

    Yields:
        list of str: filled with the names of parameters that the checkpoint does not hold.
    """
    from transformers import PreTrainedModel

    missing: list[str] = []
    original: Any = vars(PreTrainedModel)["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls not in classes:
            return original.__func__(cls, *args, **kwargs)
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        missing.extend(info["missing_keys"])
        return model

    base: Any = PreTrainedModel  # Dream's class calls its parent's, and takes a model only
    base.from_pretrained = classmethod(from_pretrained)
    try:
        with nullcontext() if _transformers() < 5 else empty_tower():
            yield missing
    finally:
        base.from_pretrained = original


def lavida_tower(tower: Any, missing: Sequence[str]) -> list[str]:
    """Fill parts of a vision tower that the checkpoint does not hold from the tower's own; returns
    the names of what is missing elsewhere."""
    left = [n for n in missing if "vision_tower" not in n]
    if len(left) == len(missing) or _transformers() < 5:  # older ones fill it in its constructor
        return left
    siglip = importlib.import_module("llava.model.multimodal_encoder.siglip_encoder")
    held = siglip.SigLipVisionModel.from_pretrained(tower.vision_tower_name).state_dict()
    own = tower.vision_tower.state_dict()
    short = [n.rpartition("vision_tower.")[2] for n in missing if n not in left]
    tower.vision_tower.load_state_dict({**own, **{n: held[n] for n in short}})
    return left


def _transformers() -> int:
    """The major version."""
    import transformers

    return int(transformers.__version__.partition(".")[0])


def lavida_buffers(model: nn.Module) -> int:
    r"""Recompute what is in no checkpoint and transformers 5 leaves uninitialised; returns how many
    were wrong: the tower's ``position_ids``, and Dream's ``inv_freq``."""
    wrong = position_ids(model)
    for part in model.modules():
        if hasattr(part, "inv_freq") and hasattr(part, "rope_init_fn"):
            rotary: Any = part
            right = rotary.rope_init_fn(rotary.config, rotary.inv_freq.device)[0]
            if not torch.equal(rotary.inv_freq, right):
                rotary.inv_freq = rotary.original_inv_freq = right
                wrong += 1
    return wrong


def plain_tables(model: Any) -> None:
    """Cached sines and cosines made under ``torch.inference_mode`` can be in no graph: ordinary
    copies replace them (LLaDA, any version)."""
    for table in _position_tables(model):
        for key, value in table.items():
            if value.is_inference():
                table[key] = value.clone()


# -- Dream-VL -------------------------------------------------------------------------------------


@contextmanager
def dream_vl_importable() -> Iterator[None]:
    r"""Upstream's modules can be imported, and its models built, inside the context.

    transformers 5 moved ``VideoInput`` from ``image_utils`` to ``video_utils``, and has no function
    for plain rotary embeddings (``ROPE_INIT_FUNCTIONS["default"]``).
    """
    from transformers import image_utils
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    moved = not hasattr(image_utils, "VideoInput")
    if moved:
        image_utils.VideoInput = importlib.import_module("transformers.video_utils").VideoInput
    missing = "default" not in ROPE_INIT_FUNCTIONS
    if missing:
        ROPE_INIT_FUNCTIONS["default"] = _plain_frequencies
    try:
        yield
    finally:
        if moved:
            del image_utils.VideoInput
        if missing:
            del ROPE_INIT_FUNCTIONS["default"]


def _plain_frequencies(config: Any, device: Any = None, **_kwargs: Any) -> tuple[Tensor, float]:
    """Inverse frequencies (head width / 2,) and the attention's scaling."""
    width = config.hidden_size // config.num_attention_heads
    even = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    return 1.0 / (config.rope_theta ** (even / width)), 1.0


def dream_vl_classes(cls: Any) -> None:
    r"""Repairs of upstream's model class and its generation's configuration.

    transformers 5 wants ``_tied_weights_keys`` as a dictionary, and validates a generation's
    configuration with arguments that upstream's empty check does not take.
    """
    if _transformers() < 5:
        return
    if not isinstance(cls._tied_weights_keys, dict):
        cls._tied_weights_keys = {}
    mixin = next(c for c in cls.__mro__ if c.__name__ == "DreamVLGenerationMixin")
    config = importlib.import_module(mixin.__module__).DreamVLGenerationConfig
    config.validate = _accepting


def _accepting(_self: Any, *_args: Any, **_kwargs: Any) -> None:
    """Upstream's check of a generation's configuration: none."""


@contextmanager
def dream_vl_callable(model: Any) -> Iterator[None]:
    r"""Dream-VL's ``diffusion_generate`` can be called while the context is open.

    transformers 5 made ``GenerationMixin._expand_inputs_for_generation`` an ordinary method, which
    upstream calls without an object. For one sequence an example it changes nothing.
    """
    from transformers.generation.utils import GenerationMixin

    name = "_expand_inputs_for_generation"
    if isinstance(inspect.getattr_static(GenerationMixin, name), staticmethod):
        yield
        return
    setattr(model, name, _unexpanded)
    try:
        yield
    finally:
        delattr(model, name)


def _unexpanded(
    expand_size: int = 1, input_ids: Tensor | None = None, **inputs: Any
) -> tuple[Tensor | None, dict[str, Any]]:
    """Input as it is; several sequences an example are not asked for here."""
    if expand_size != 1:
        raise InputError(f"num_return_sequences is {expand_size}: expected 1")
    return input_ids, inputs


def dream_vl_frequencies(model: Any) -> int:
    r"""Recompute the inverse frequencies of all rotary embeddings; returns how many were wrong.

    As in :func:`rotary_frequencies`: they are in no checkpoint, and transformers 5 leaves them
    uninitialised when it loads one, silently.
    """
    right: Tensor
    wrong = 0
    for part in model.modules():
        held = getattr(part, "inv_freq", None)
        if not isinstance(held, Tensor):
            continue
        if hasattr(part, "rope_init_fn"):
            right, part.attention_scaling = part.rope_init_fn(part.config, held.device)
        else:  # the vision tower's, whose width its length tells
            even = torch.arange(0, 2 * len(held), 2, dtype=torch.float, device=held.device)
            right = 1.0 / (10000.0 ** (even / (2 * len(held))))
        if held.shape != right.shape or not torch.equal(held.float(), right):
            wrong += 1
        part.inv_freq = right
        if hasattr(part, "original_inv_freq"):
            part.original_inv_freq = right
    return wrong
