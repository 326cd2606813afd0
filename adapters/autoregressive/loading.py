"""Loading of a checkpoint, and the parts of a processor that the adapter works with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_dcam.adapters.autoregressive.internvl import InternVL
from captum_dcam.adapters.autoregressive.llava import Llava
from captum_dcam.adapters.autoregressive.qwen import Qwen, Qwen3, Qwen25
from captum_dcam.adapters.common.visuals import Family
from captum_dcam.errors import InputError, InputTypeError, WeightsError

FAMILIES: dict[str, type[Family]] = {
    kind: cls for cls in (Qwen, Qwen25, Qwen3, Llava, InternVL) for kind in cls.model_types
}


@dataclass(frozen=True)
class Parts:
    r"""A processor's parts; also stands in for a processor that cannot be built as a whole.

    Without torchvision transformers builds no video processor, and so no processor that has one,
    although tokenizer and image processor work.

    Args:
        tokenizer (object): fast, or with ``apply_chat_template``.
        image_processor (object): of the family.
        video_processor (object, optional): its sizes are used for videos.
        chat_template (str, optional): Default: the tokenizer's, else the family's published format
    """

    tokenizer: Any
    image_processor: Any
    video_processor: Any = None
    chat_template: str | None = None


def parts_of(processor: Any) -> Parts:
    """The parts of any processor that has them."""
    missing = [n for n in ("tokenizer", "image_processor") if getattr(processor, n, None) is None]
    if missing:
        raise InputTypeError(
            f"the processor is a {type(processor).__name__} without {' and '.join(missing)}: "
            "expected what AutoProcessor.from_pretrained returns for the checkpoint, or Parts("
            "tokenizer, image_processor)"
        )
    template = getattr(processor, "chat_template", None)
    if not isinstance(template, str):
        template = getattr(processor.tokenizer, "chat_template", None)
    return Parts(
        processor.tokenizer,
        processor.image_processor,
        getattr(processor, "video_processor", None),
        template if isinstance(template, str) else None,
    )


def family_of(model: nn.Module, parts: Parts) -> Family:
    """The family of a model, checked against its processor."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise InputError(
            f"a {type(model).__name__} of type {kind!r} is not among {', '.join(FAMILIES)}: give a "
            "model of one of them, with its language-model head"
        )
    return FAMILIES[kind](config, parts.tokenizer, parts.image_processor, parts.video_processor)


def loaded(
    source: str,
    kinds: Collection[str] = FAMILIES,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    r"""Model and processor of a checkpoint.

    Args:
        source (str): folder or hub name.
        kinds (collection of str, optional): ``model_type`` values that are expected. Default: the
            autoregressive families
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: the checkpoint's
        device_map, revision, trust_remote_code, attn_implementation: as ``from_pretrained`` has
            them; remote code is off, these families need none.

    Raises:
        WeightsError: files are missing, damaged, or of another kind of model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText

    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    hub = {k: v for k, v in hub.items() if v is not None}
    options = {"device_map": device_map, "attn_implementation": attn_implementation}
    options = {k: v for k, v in options.items() if v is not None}
    try:
        config = AutoConfig.from_pretrained(source, **hub)
        if config.model_type not in kinds:
            raise WeightsError(
                f"{source} holds a {config.model_type}: expected one of {', '.join(kinds)}"
            )
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **hub, **options)
        processor = _processor(source, hub)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval(), processor


def _processor(source: str, hub: dict[str, Any]) -> Any:
    """The processor; without torchvision its parts."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source, **hub)
    tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    template = getattr(tokenizer, "chat_template", None) or _saved_template(source, hub)
    return Parts(tokenizer, AutoImageProcessor.from_pretrained(source, **hub), None, template)


def _saved_template(source: str, hub: dict[str, Any]) -> str | None:
    """The chat template that processors save beside the tokenizer."""
    from pathlib import Path

    from transformers.utils import cached_file

    path = cached_file(
        source,
        "chat_template.jinja",
        revision=hub.get("revision"),
        _raise_exceptions_for_missing_entries=False,
    )
    return None if path is None else Path(path).read_text(encoding="utf-8")
