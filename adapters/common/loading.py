"""Loading of checkpoints: what all families say in the same words, and what several do."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.compat import around_loading, empty_tower, siglip
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.text import Words
from captum_dcam.errors import DcamError, MissingPackageError, ProcessorError, WeightsError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.buffers import repair
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.versions import transformers_major


class FamilyAdapter(Adapter):
    r"""An adapter that is loaded by its family's function, and known by its model's class.

    Its memory is a :class:`~captum_dcam.adapters.common.prefix.Prefix`.
    """

    model: Any
    _words: Words
    #: ``loaded(source, **options)`` of the family: model and processor of a checkpoint
    loader: ClassVar[Callable[..., tuple[Any, Any]]]
    #: names of the model's class, or of one that it inherits from
    classes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load(cls, source: str | None = None, *, cache: str | None = None, **options: Any) -> Any:
        """Load a checkpoint.

        Args:
            source (str): folder or hub name.
            cache (str, optional): as in the constructor.
            **options: the constructor's other arguments, and those of ``loaded`` in the family's
                ``loading`` module.
        """
        known = inspect.signature(cls).parameters.values()
        mine = {p.name for p in known if p.kind is p.KEYWORD_ONLY} & options.keys()
        own = {name: options.pop(name) for name in mine}
        model, processor = cls.loader(source, **options)
        repair(model)
        return cls(model, processor, cache, **own)

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """Whether a loaded model is of one of the family's classes."""
        return any(c.__name__ in cls.classes for c in type(model).__mro__)

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return self._words.token_texts(ids)

    def recorded(
        self,
        request: Request,
        settings: dict[str, Any],
        log: Any,
        states: Sequence[Tensor],
        final_state: Sequence[Tensor],
        *,
        lengths: Sequence[int] = (),
        read_at: Tensor | None = None,
    ) -> Trajectory:
        """The trajectory of what ``log`` has noted; ``lengths`` where a replay makes other calls of
        the blocks than the generation did."""
        return Trajectory(
            tokens=log.tokens,
            states=tuple(states),
            final_state=tuple(final_state),
            commit_step=log.commit_step,
            confidence=log.confidence,
            cache=self.cache,
            image_end=request.layout.image_end,
            settings=settings,
            own_calls=bool(lengths),
            lengths=tuple(lengths),
            read_at=read_at,
        )

    def prefill(self, embedded: Any) -> Any:
        return embedded

    def select(self, memory: Any, index: Tensor) -> Any:
        return memory.select(index)

    def memory_tensors(self, memory: Prefix) -> list[Tensor]:
        return memory.tensors

    def replace_memory(self, memory: Any, tensors: Sequence[Tensor]) -> Any:
        return memory.replaced(tensors)


def placed(model: Any, device: torch.device | str | None, device_map: Any) -> Any:
    """The model in inference mode, on ``device`` unless ``device_map`` has placed it."""
    return (model if device is None or device_map is not None else model.to(device)).eval()


def typed(model: Any, dtype: torch.dtype) -> Any:
    """The model in a type, also where accelerate has spread it: its ``to`` refuses offloaded
    weights, which become of this type when they are fetched."""
    return nn.Module.to(model, dtype)


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def named(family: str, source: str | None, example: str) -> str:
    """The checkpoint that was named; WeightsError for None, which gives an ``example``."""
    if source is None:
        raise WeightsError(
            f"{family} has no weights of its own: name a checkpoint or a folder, such as {example}"
        )
    return source


def upstream(family: str, install: str, *modules: str, has: Sequence[str] = ()) -> list[Any]:
    """Modules of the authors' package; an ImportError repeats the line that installs it.

    ``has`` are names that the last module must have: other projects have packages of the same name.
    """
    try:
        found = [importlib.import_module(name) for name in modules]
    except ImportError as error:
        raise MissingPackageError(
            f"{family}'s own code is needed and cannot be imported ({error}): {install}"
        ) from error
    missing = [name for name in has if not hasattr(found[-1], name)]
    if missing:
        package = modules[-1].partition(".")[0]
        raise MissingPackageError(
            f"the package {package} in {getattr(found[-1], '__file__', None)} has no "
            f"{' and no '.join(missing)}: another project's is in front; {install}"
        )
    return found


#: what upstream's code raises at files whose content is not what it expects
_UPSTREAM = (OSError, RuntimeError, KeyError, AttributeError, IndexError, OverflowError)
_UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError)


@contextmanager
def reading(source: str, *also: type[Exception]) -> Iterator[None]:
    """What upstream's code raises at files that are missing or damaged is a WeightsError that names
    the checkpoint; our own errors stay. ``also``: further kinds that a family's code raises."""
    from safetensors import SafetensorError

    kinds: tuple[type[Exception], ...] = (*_UPSTREAM, *_UNREADABLE, SafetensorError, *also)
    try:
        yield
    except DcamError:
        raise
    except Exception as error:
        # tokenizers raises plain Exceptions; a TypeError may be about an option that is not known
        wrong = isinstance(error, TypeError) and "keyword argument" not in str(error)
        if isinstance(error, kinds) or wrong or type(error) is Exception:
            raise WeightsError(f"{source} cannot be loaded: {str(error) or repr(error)}") from error
        raise


def check_complete(source: str, missing: Collection[str], whole: str) -> None:
    """WeightsError where a checkpoint does not hold all parameters; ``whole``: what is expected."""
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} of the model's tensors "
            f"({', '.join(sorted(missing)[:3])}, …): they would be random; expected a whole {whole}"
        )


@contextmanager
def whole(
    family: str, *classes: type, unused: re.Pattern[str] = re.compile(r"(?!)")
) -> Iterator[None]:
    r"""Checkpoints of LLaVA-type classes are loaded whole inside the context.

    The vision tower is filled from the checkpoint, which holds it: under transformers 5 towers are
    built empty first, see :func:`~captum_dcam.adapters.common.compat.empty_tower`. Parts of it that
    a checkpoint does not hold come from the tower's own folder.

    Args:
        family (str): whose checkpoints they are, for the message.
        *classes (type): the models' classes; others are loaded as ever.
        unused (re.Pattern): what it finds in names of parameters that may be missing. Default: none

    Raises:
        WeightsError: a checkpoint, loaded inside, that lacks other parameters.
    """

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if cls not in classes:
            return load(*args, **options)
        with nullcontext() if transformers_major() < 5 else empty_tower():
            model, info = load(*args, **options, output_loading_info=True)
        lost = fill_tower(model.get_vision_tower(), info["missing_keys"])
        lost = [name for name in lost if not unused.search(name)]
        check_complete(str(args[0]), lost, f"{family} checkpoint")
        return model

    with around_loading(around):
        yield


def fill_tower(tower: Any, missing: Iterable[str]) -> list[str]:
    """Fill parts of a vision tower that the checkpoint does not hold from the tower's own; returns
    the names of what is missing elsewhere."""
    missing = list(missing)
    left = [n for n in missing if "vision_tower" not in n]
    if len(left) == len(missing):
        return left
    held = siglip().SigLipVisionModel.from_pretrained(tower.vision_tower_name).state_dict()
    for name in (n.rpartition("vision_tower.")[2] for n in missing if n not in left):
        _fill(tower.vision_tower, name, held[name])
    return left


def _fill(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter; where it is offloaded, what accelerate fetches in its place."""
    place, _, last = name.rpartition(".")
    owner = model.get_submodule(place)
    own = getattr(owner, last)
    if not own.is_meta:
        own.data.copy_(value)
        return
    kept = vars(owner)["_hf_hook"].weights_map  # a view of all that is offloaded
    kept.dataset.state_dict[f"{kept.prefix}{last}"] = value.to("cpu", own.dtype)


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
        raise ProcessorError(
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

    hub = given(revision=revision, trust_remote_code=trust_remote_code)
    options = given(device_map=device_map, attn_implementation=attn_implementation)
    with reading(source):
        config = AutoConfig.from_pretrained(source, **hub)
        if config.model_type not in kinds:
            raise WeightsError(
                f"{source} holds a {config.model_type}: expected one of {', '.join(kinds)}"
            )
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **hub, **options)
        processor = _processor(source, hub)
    return placed(model, device, device_map), processor


def _processor(source: str, hub: dict[str, Any]) -> Any:
    """The processor; without torchvision its parts."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.utils import cached_file, is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source, **hub)
    tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    template = getattr(tokenizer, "chat_template", None)
    if not template:  # processors save it beside the tokenizer
        path = cached_file(
            source,
            "chat_template.jinja",
            revision=hub.get("revision"),
            _raise_exceptions_for_missing_entries=False,
        )
        template = None if path is None else Path(path).read_text(encoding="utf-8")
    return Parts(tokenizer, AutoImageProcessor.from_pretrained(source, **hub), None, template)
