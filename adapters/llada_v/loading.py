r"""Loading LLaDA-V through its authors' package, repaired for newer transformers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from captum_dcam.adapters.common.compat import (
    empty_tower,
    moved_names,
    parents_constructor,
    siglip_token,
    tied_by_map,
)
from captum_dcam.adapters.common.loading import (
    check_complete,
    given,
    named,
    placed,
    reading,
    upstream,
)
from captum_dcam.adapters.llada_v.facts import CHECKPOINT, INSTALL, VIDEO_INSTALL
from captum_dcam.adapters.llada_v.packing import VIDEO
from captum_dcam.errors import WeightsError
from captum_dcam.model.versions import in_type, transformers_major


def loaded(
    source: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float16,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, tuple[Any, Any]]:
    r"""Model and ``(tokenizer, image_processor)`` of a checkpoint.

    Args:
        source (str): folder or hub name.
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: float16, as upstream's builder
        device_map, revision, trust_remote_code: as ``from_pretrained`` has them. Remote code is
            off: the model's code is the installed package's.

    Raises:
        ImportError: upstream's package is missing.
        WeightsError: files are missing, damaged, or of another model.
    """
    from transformers import AutoTokenizer

    source = named("llada_v", source, CHECKPOINT)
    hub, options = given(revision=revision), given(device_map=device_map)
    with repaired() as module, reading(source, ValueError):
        video = video_module() if _is_video(source, hub) else None
        made = module.LlavaLLaDAModelLM if video is None else video.LlavaLLaDAVideoModelLM
        config = made.config_class.from_pretrained(source, **hub)
        _check_kind(source, config)
        for name, value in VIDEO.items() if video is not None else ():
            setattr(config, name, value)
        config.use_cache = False  # the model has no key-value cache and asserts so
        tokenizer = AutoTokenizer.from_pretrained(
            source, use_fast=False, trust_remote_code=trust_remote_code, **hub
        )
        model, info = made.from_pretrained(
            source,
            config=config,
            attn_implementation="sdpa",
            output_loading_info=True,
            **in_type(dtype),
            **hub,
            **options,
        )
    check_complete(source, info["missing_keys"], "LLaDA-V checkpoint, vision tower included")
    model = placed(model, device, device_map)
    return model, (tokenizer, model.get_vision_tower().image_processor)


def _is_video(source: str, hub: dict[str, Any]) -> bool:
    from transformers import PretrainedConfig

    found, _ = PretrainedConfig.get_config_dict(source, **hub)
    return found.get("model_type") == "llava_llada_video"


def _check_kind(source: str, config: Any) -> None:
    kinds = getattr(config, "architectures", None) or []
    if kinds and not {"LlavaLLaDAModelLM", "LlavaLLaDAVideoModelLM"} & set(kinds):
        raise WeightsError(
            f"{source} holds a {' or '.join(kinds)}: expected LlavaLLaDAModelLM; other families "
            "with model_type llava_llada are LaViDa's, family='lavida' or 'lavida_o'"
        )


def package() -> Any:
    r"""Upstream's module ``llava.model.language_model.llava_llada``, repaired.

    Raises:
        ImportError: no such package, or that of another LLaVA-type project (they share the name).
    """
    moved_names()
    name = "llava.model.language_model.llava_llada"
    (module,) = upstream("LLaDA-V", INSTALL, name, has=["LlavaLLaDAModelLM"])
    if transformers_major() >= 5:
        _repair(module, module.LlavaLLaDAModelLM)
        siglip_token()
        if importlib.util.find_spec(f"{name}_video") is not None:
            video_module()
    return module


def video_module() -> Any:
    r"""VidLaDA's module ``llava.model.language_model.llava_llada_video``, repaired.

    Raises:
        ImportError: no such package, or another project's of this name.
    """
    moved_names()
    name = "llava.model.language_model.llava_llada_video"
    (module,) = upstream("VidLaDA", VIDEO_INSTALL, name, has=["LlavaLLaDAVideoModelLM"])
    if transformers_major() >= 5:
        _repair(module, module.LlavaLLaDAVideoModelLM)
    return module


def _repair(module: Any, cls: Any) -> None:
    plain_ropes(module.LLaDAConfig)
    parents_constructor(cls.config_class, module.LLaDAConfig)
    tied_by_map(module.LLaDAModelLM, cls)


@contextmanager
def repaired() -> Iterator[Any]:
    r"""LLaDA-V's code can be imported, and loads its checkpoints, inside the context; vision towers
    are built empty, to be filled from the checkpoint.

    Yields:
        module: as :func:`package` returns it.
    """
    module = package()
    with empty_tower():
        yield module


def plain_ropes(cls: Any) -> None:
    """Every configuration of a class gets a plain ``rope_scaling``, see :func:`plain_rope`."""
    original = cls.__init__
    if hasattr(original, "plain_rope"):  # repaired before
        return

    @functools.wraps(original)
    def made(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        plain_rope(self)

    made.plain_rope = True  # type: ignore[attr-defined]
    cls.__init__ = made


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
