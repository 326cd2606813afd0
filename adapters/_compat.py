r"""Small repairs that upstream code needs under newer versions of what it is built on.

Every function repairs one family, says what breaks and since when, and changes nothing where
nothing is broken. Contexts undo their repair; what ``load`` repairs on upstream's classes stays.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# -- MMaDA --------------------------------------------------------------------------------------

MMADA_INSTALL = (
    "git clone https://github.com/Gen-Verse/MMaDA && pip install diffusers einops, and put the "
    "folder MMaDA on PYTHONPATH (its package is called models)"
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
        raise ImportError(
            f"MMaDA's own code is needed and cannot be imported ({error}): {MMADA_INSTALL}"
        ) from error
    missing = [n for n in ("MMadaModelLM", "MAGVITv2") if not hasattr(package, n)]
    if missing:
        raise ImportError(
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
        raise ImportError(f"transformers.modeling_utils.{name} is gone since transformers 5")

    return dropped


def llada_v_classes(module: Any) -> None:
    r"""Upstream's classes under transformers 5.

    - ``LlavaLLaDAConfig`` gets a constructor of its own that knows none of its parent's arguments:
      the parent's is put in its place.
    - ``_tied_weights_keys`` must map; the family ties nothing.
    - ``SigLipVisionConfig.from_pretrained`` calls ``_set_token_in_kwargs``, which is gone.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
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
