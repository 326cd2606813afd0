"""Loading of checkpoints: what all families say in the same words, and what several do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_dcam.errors import DcamError, InputTypeError, WeightsError


def named(family: str, source: str | None, example: str) -> str:
    """The checkpoint that was named; WeightsError for None, which gives an ``example``."""
    if source is None:
        raise WeightsError(
            f"{family} has no weights of its own: name a checkpoint or a folder, such as {example}"
        )
    return source


@contextmanager
def reading(source: str, *also: type[Exception]) -> Iterator[None]:
    """What upstream's code raises at files that are missing or damaged is a WeightsError that names
    the checkpoint; our own errors stay. ``also``: further kinds that a family's code raises."""
    from safetensors import SafetensorError

    kinds: tuple[type[Exception], ...] = (OSError, RuntimeError, SafetensorError, *also)
    try:
        yield
    except DcamError:
        raise
    except kinds as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error


def check_complete(source: str, missing: Collection[str], whole: str) -> None:
    """WeightsError where a checkpoint does not hold all parameters; ``whole``: what is expected."""
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} of the model's tensors "
            f"({', '.join(sorted(missing)[:3])}, …): they would be random; expected a whole {whole}"
        )


def folder_of(source: str, revision: str | None) -> str:
    """The checkpoint's folder, for builders that cannot be told a revision."""
    if revision is None or Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    return snapshot_download(source, revision=revision)


#: LaViDa-type builders know these two types only; at others they stop in a debugger
BUILT = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def built_type(dtype: torch.dtype | str) -> tuple[torch.dtype, str]:
    """The type that is wanted, and that in which such a builder loads: bfloat16 for others."""
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return wanted, BUILT.get(wanted, "bfloat16")


# -- processors -----------------------------------------------------------------------------------


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


# -- families that transformers has ---------------------------------------------------------------


def image_text_model(
    source: str,
    kinds: Collection[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    r"""Model and processor of a checkpoint, by ``AutoModelForImageTextToText``.

    Args:
        source (str): folder or hub name.
        kinds (collection of str): ``model_type`` values that are expected.
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: the checkpoint's
        device_map, revision, trust_remote_code, attn_implementation: as ``from_pretrained`` has
            them; remote code is off, these families need none.

    Raises:
        WeightsError: files are missing, damaged, or of another kind of model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    hub = {k: v for k, v in hub.items() if v is not None}
    options = {"device_map": device_map, "attn_implementation": attn_implementation}
    options = {k: v for k, v in options.items() if v is not None}
    with reading(source):
        config = AutoConfig.from_pretrained(source, **hub)
        if config.model_type not in kinds:
            raise WeightsError(
                f"{source} holds a {config.model_type}: expected one of {', '.join(kinds)}"
            )
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **hub, **options)
        processor = _processor(source, hub)
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
    from transformers.utils import cached_file

    path = cached_file(
        source,
        "chat_template.jinja",
        revision=hub.get("revision"),
        _raise_exceptions_for_missing_entries=False,
    )
    return None if path is None else Path(path).read_text(encoding="utf-8")
