r"""From options to what they name: words, refinements, methods, settings, picture, model, answer.

Methods are written as ``quick``, ``tam``, ``tam:eci=false,filter=5``.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from captum_dcam.cli.options import NAMES, Answer, Model
from captum_dcam.errors import (
    DcamError,
    InputError,
    UnknownNameError,
    UsageError,
    WeightsError,
    near,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from captum_dcam.cli.printing import Say
    from captum_dcam.data.scenes import Scene
    from captum_dcam.methods import Method
    from captum_dcam.model.adapter import Adapter
    from captum_dcam.model.forward import DenoisingForward
    from captum_dcam.model.words import WordsLike
    from captum_dcam.refine import Refinement

#: the held-out scene that is drawn when none is asked for, README's picture
SHOWN = 12
#: what has an option of its own
OWN = frozenset(("device", "dtype", "cache"))
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


# -- methods and settings as texts -----------------------------------------------------------------


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    r"""Methods of one or several comma lists, without repeats.

    A name, a colon and settings, ``name:setting=value,setting=value``; what follows a comma and
    has an equals sign is one more setting of the method before. ``quick`` is
    :data:`captum_dcam.comparing.QUICK`, ``all`` is every method.

    Raises:
        UnknownNameError: no such method, with near names.
        ValueError: a setting that the method does not have, or a value of another type.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for part in ",".join(texts).split(","):
        name, colon, setting = part.partition(":")
        if not colon and "=" in part:
            name, setting = "", part
        name = name.strip()
        if name:
            found += _begun(name)
        elif not found or not setting:
            raise InputError(f"--methods {','.join(texts)}: there is no name before {part!r}")
        if setting.strip() or colon:
            _enter(found, setting)
    out: list[Method] = []
    for name, settings in found:
        one = built(name, settings)
        if one not in out:
            out.append(one)
    return tuple(out)


def _begun(name: str) -> list[tuple[str, dict[str, str]]]:
    """The method or methods of a name, without settings so far."""
    from captum_dcam.comparing import QUICK
    from captum_dcam.methods import method_names

    NAMES["methods"].check(name)
    names = {"all": method_names(), "quick": QUICK}.get(name, (name,))
    return [(one, {}) for one in names]


def _enter(found: list[tuple[str, dict[str, str]]], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name.strip():
        raise InputError(
            f"setting {setting!r} of {found[-1][0]}: expected name=value, as in tam:filter=5"
        )
    found[-1][1][name.strip()] = value.strip()


def built(name: str, settings: dict[str, str]) -> Method:
    """A method with settings that are written as text."""
    from captum_dcam.methods import METHODS, method

    if name not in METHODS:
        raise UnknownNameError(f"unknown method {name!r}{near(name, METHODS)}")
    known = [f.name for f in fields(METHODS[name])]  # type: ignore[arg-type]  # dataclasses all
    hints = get_type_hints(METHODS[name])
    values = {}
    for key, text in settings.items():
        if key not in known:
            hint = near(key, known) if known else "; it has none"
            raise InputError(f"method {name!r} has no setting {key!r}{hint}")
        values[key] = value_of(text, hints[key], f"{name}:{key}")
    return method(name, **values)


def value_of(text: str, kind: Any, where: str) -> Any:
    r"""A setting's value by the type of its field; ``none`` for None, ``+`` between items.

    Args:
        text (str): ``"5"``, ``"false"``, ``"0.5+1"``, ``"none"``.
        kind: bool, int, float, str, a tuple of these, or one of these or None.
        where (str): named in the error.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in inner:
            return None
        kinds = [k for k in inner if k is not type(None)]
        if len(kinds) == 1:
            return value_of(text, kinds[0], where)
        kind = str if str in kinds else kinds
    if origin is tuple:
        return tuple(value_of(item, inner[0], where) for item in text.split("+"))
    if kind is str:
        return text
    if kind is bool and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
    if wanted is None:
        raise InputError(f"{where} cannot be set on the command line: use the library")
    raise InputError(f"{where} is {text!r}: expected {wanted}")


def setting_pairs(flag: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` settings; values as JSON writes them, anything else is a text."""
    out: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} {text!r}: expected name=value, such as split=val2014")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


# -- what is explained -----------------------------------------------------------------------------


def chosen_words(words: list[str] | None) -> WordsLike:
    """What ``--words`` asks for; None where it is not given."""
    if not words:
        return None
    groups = [w for w in words if w in ("all", "nouns")]
    if groups and len(words) > 1:
        raise InputError(f"--words {groups[0]} stands alone: leave out the other --words")
    return words[0] if groups else list(words)


def chosen_refinements(names: list[str] | None) -> list[Refinement] | None:
    """What ``--refine`` asks for; None where it is not given."""
    from captum_dcam.refine import refinement

    if not names:
        return None
    if "none" in names:
        if len(names) > 1:
            raise InputError("--refine none stands alone: leave out the other --refine")
        return []
    return [refinement(name) for name in names]


def picture_of(options: Answer) -> tuple[Image.Image, Scene | None]:
    """The picture, and the scene it was drawn from (None for a file)."""
    if options.image is not None:
        from captum_dcam.files import reading
        from captum_dcam.model.prompts import open_picture

        with reading(options.image):
            return open_picture(options.image), None
    from captum_dcam.data.scenes import make_scene
    from captum_dcam.data.synthetic import HELD_OUT

    scene = make_scene(HELD_OUT, SHOWN if options.scene is None else options.scene)
    return scene.image, scene


def source_of(options: Answer, scene: Scene | None) -> str:
    """The picture's path, or which scene was drawn."""
    return str(options.image) if scene is None else f"held-out scene {scene.index}"


# -- the model and its answer ----------------------------------------------------------------------


def check_answer(options: Answer) -> torch.device:
    """What would be looked up only while the answer is written; returns the device."""
    from captum_dcam.model.hub import check_device

    if options.image is not None and options.scene is not None:
        raise InputError("--scene draws a picture of its own: leave out --scene, or the IMAGE")
    setting_pairs("--load", options.load)
    decoding(options)
    return check_device(options.device)


def decoding(options: Answer) -> dict[str, Any]:
    """Only what the user gave: the rest is the family's."""
    names = ("gen_length", "steps", "block_length", "temperature")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    others = setting_pairs("--generation", options.generation)
    if twice := sorted(given.keys() & others.keys()):
        raise InputError(f"--generation {twice[0]}: --{twice[0].replace('_', '-')} is given too")
    return given | others


def written(
    options: Answer, picture: Image.Image, device: torch.device, say: Say
) -> DenoisingForward:
    """The model with the answer that it wrote."""
    from captum_dcam.model.forward import DenoisingForward

    say("Loading the model")
    adapter = load_chosen(options, device)
    size = options.internal_batch_size
    forward = DenoisingForward(adapter, options.layer, internal_batch_size=size)
    request = adapter.prepare([[picture]], [options.prompt])
    say("Writing the answer")
    forward.generate(request, generator=generator(options.seed), **decoding(options))
    return forward


def generator(seed: int) -> torch.Generator:
    """Of everything that is drawn; InputError where ``--seed`` does not fit into 64 bits."""
    import torch

    try:
        return torch.Generator().manual_seed(seed)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--seed is {seed}: expected a whole number of 64 bits") from error


def load_chosen(options: Model, device: torch.device) -> Adapter:
    """The model that a command's options ask for; raises as :func:`load_model`."""
    settings = setting_pairs("--load", options.load)
    return load_model(
        options.model, settings, cache=options.cache, device=device, dtype=options.dtype
    )


def load_model(
    source: str,
    settings: Mapping[str, Any],
    *,
    cache: str | None,
    device: torch.device | None,
    dtype: str,
) -> Adapter:
    r"""Load ``--model``.

    Args:
        source (str): a family's name, a folder, or a name on the hub.
        settings (mapping): of ``--load``: what :func:`captum_dcam.load` and the family take. With
            a ``device_map`` the device is left to it.
        cache, device, dtype: as in :func:`captum_dcam.load`; the dtype by its name.

    Raises:
        UsageError: a setting that the family or its upstream code refuses, or a package that is
            missing.
        WeightsError: files that are missing or damaged, as the family's own code says.
        DcamError: as :func:`captum_dcam.load` has them.
    """
    import torch
    from safetensors import SafetensorError

    from captum_dcam.model.hub import load

    for name in OWN & settings.keys():
        raise UsageError(f"--load {name}={settings[name]}: give it as --{name}")
    given = {"device": device, "dtype": getattr(torch, dtype), "cache": cache, **settings}
    if settings.get("device_map") is not None:
        del given["device"]
    try:
        with quiet_transformers():
            return load(source, **given)
    except DcamError:
        raise
    except ImportError as error:
        raise UsageError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:
        unknown = "unexpected keyword argument" in str(error) or isinstance(error, ValueError)
        if settings and unknown:  # others' code refuses it
            raise UsageError(f"--load {', '.join(settings)}: {error}") from error
        raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars of its own beside ours, as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
