r"""Loading LaViDa-O through its authors' package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from captum_dcam.adapters.common.compat import (
    deepspeed,
    moved_names,
    parents_constructor,
    siglip_token,
    tied_by_map,
    without_arguments,
)
from captum_dcam.adapters.common.loading import (
    built_type,
    folder_of,
    named,
    placed,
    reading,
    typed,
    upstream,
    whole,
)
from captum_dcam.adapters.lavida_o.facts import CHECKPOINT, INSTALL
from captum_dcam.errors import InputError
from captum_dcam.model.versions import transformers_major

#: names of parameters that only the making of pictures reads
PICTURES = re.compile(r"_vision\.|vqvae|gen_|_gen\b")


def loaded(
    source: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, tuple[Any, Any]]:
    r"""Model and ``(tokenizer, image_processor)`` of a checkpoint, by upstream's builder.

    Args:
        source (str): folder or hub name.
        device (device, optional): where the model goes. Default: as ``device_map`` says
        dtype (dtype, optional): float16 or bfloat16, else converted. Default: bfloat16
        device_map (optional): Default: upstream's ``auto``
        revision, trust_remote_code (optional): upstream's builder takes neither; the revision's
            files are fetched first.

    Raises:
        ImportError: upstream's package is missing, or another project's is in front.
        ValueError: the environment that upstream needs is not set.
        WeightsError: files are missing, damaged, or of another model.
    """
    source = named("lavida_o", source, CHECKPOINT)
    wanted, built = built_type(dtype)
    with repaired() as builder, reading(source):
        tokenizer, model, image_processor, _ = builder.load_pretrained_model(
            folder_of(source, revision),
            None,
            "llava_llada",
            device_map="auto" if device_map is None else device_map,
            torch_dtype=built,
        )
    return typed(placed(model, device, device_map), wanted), (tokenizer, image_processor)


@contextmanager
def repaired() -> Iterator[Any]:
    r"""LaViDa-O's code can be imported, and loads its checkpoints, inside the context.

    Names that have moved, deepspeed where it is not installed, and under transformers 5 classes.
    Its checkpoints are loaded whole, see :func:`~captum_dcam.adapters.common.loading.whole`; parts
    that make pictures may be missing.

    Yields:
        module: upstream's ``llava.model.builder``.

    Raises:
        ImportError: upstream's package is missing, or another project's is in front.
        ValueError: the environment that upstream needs is not set.
    """
    if not os.environ.get("NOT_ALWASY_DO_2DPOOL"):
        raise InputError(
            "LaViDa-O's code needs NOT_ALWASY_DO_2DPOOL=1 in the environment when it is imported: "
            "set it before Python starts"
        )
    moved_names()
    modules = ("llava.model.builder", "llava.model.language_model.llava_llada")
    with deepspeed():
        builder, llada = upstream("LaViDa-O", INSTALL, *modules, has=["generate_with_dual_cache"])
    repair_classes(llada)
    with whole("LaViDa-O", llada.LlavaLladaForMaskedDiffusion, unused=PICTURES):
        yield builder


def repair_classes(llada: Any) -> None:
    """Upstream's classes under transformers 5; the argument is its module."""
    if transformers_major() < 5:
        return
    parents_constructor(llada.LlavaLladaConfig, llada.LLaDAConfig)
    without_arguments(llada.LlavaLladaForMaskedDiffusion)
    tied_by_map(llada.LlavaLladaForMaskedDiffusion)
    siglip_token()
