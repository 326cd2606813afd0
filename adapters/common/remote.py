r"""Loading of checkpoints that bring the code of their model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers

from captum_dcam import checks
from captum_dcam.adapters.common.loading import given, named, placed, reading
from captum_dcam.errors import RemoteCodeError, WeightsError
from captum_dcam.model.versions import in_type

#: the classes by which ``auto_map`` may name a model, the first that it has
AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


def remote_model(
    family: str,
    source: str | None,
    example: str,
    kinds: Collection[str] = (),
    repaired: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    processing: str = "AutoProcessor",
) -> tuple[Any, Any]:
    r"""Model and processor of a checkpoint, by the code inside it.

    Args:
        family (str): its name.
        source (str): folder or hub name.
        example (str): a checkpoint of the family, for the message where none is named.
        kinds (collection of str, optional): ``model_type`` values that are expected. Default: all
        repaired (callable, optional): context in which the code loads. Default: none
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: the checkpoint's
        device_map, revision, attn_implementation: as ``from_pretrained`` has them.
        trust_remote_code (bool, optional): the code in the checkpoint runs on this machine: it must
            be allowed. Default: False
        processing (str, optional): transformers' class for what goes with the model: a family may
            have a tokenizer alone. Default: ``"AutoProcessor"``

    Raises:
        RemoteCodeError: remote code is not allowed.
        WeightsError: files are missing, damaged, or of another family.
    """
    source = named(family, source, example)
    if not checks.flag("trust_remote_code", trust_remote_code):
        raise RemoteCodeError(
            f"{source} brings its own code ({family} is in no version of transformers): read it, "
            "fix its revision, and pass trust_remote_code=True to let it run; or load the model "
            "yourself and wrap(model, processor)"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    hub = given(revision=revision)
    options = given(device_map=device_map, attn_implementation=attn_implementation)
    with reading(source), repaired():
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True, **hub)
        places = getattr(config, "auto_map", {})
        place = next((places[name] for name in AUTO if name in places), None)
        if (kinds and config.model_type not in kinds) or place is None:
            raise WeightsError(
                f"{source} holds a {config.model_type}: expected "
                f"{' or '.join(kinds) or family}, with its code"
            )
        cls = get_class_from_dynamic_module(place, source, **hub)
        model = cls.from_pretrained(source, config=config, **in_type(dtype), **hub, **options)
        kind = getattr(transformers, processing)
        processor = kind.from_pretrained(source, trust_remote_code=True, **hub)
    return placed(model, device, device_map), processor


def remote(
    family: str, example: str, *kinds: str, **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """``loaded(source, **options)`` of a family with such checkpoints alone; arguments as
    :func:`remote_model` has them."""
    return partial(_of_source, family, example, kinds, options)


def _of_source(
    family: str,
    example: str,
    kinds: Collection[str],
    own: dict[str, Any],
    source: str | None,
    **options: Any,
) -> tuple[Any, Any]:
    return remote_model(family, source, example, kinds, **own, **options)
