r"""From options to what they name: words, refinements, methods, settings, image, model, answer.

Methods are written as ``quick``, ``tam``, ``tam:eci=false,filter=5``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from captum_dcam.cli.options import NAMES, Answer, Model, Written, as_number
from captum_dcam.errors import DcamError, InputError, UsageError, WeightsError, near

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from captum_dcam.cli.printing import Say
    from captum_dcam.data.scenes import Scene
    from captum_dcam.methods import Method
    from captum_dcam.model.adapter import Adapter
    from captum_dcam.model.foils import FoilLike
    from captum_dcam.model.forward import DenoisingForward
    from captum_dcam.model.prompts import Video
    from captum_dcam.model.trajectory import Score
    from captum_dcam.model.words import WordsLike
    from captum_dcam.refine import Refinement

#: the held-out scene that is drawn when none is asked for: the one in README
SHOWN = 12
#: settings of loading that have an option of their own
OWN = frozenset(("device", "dtype", "cache"))
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
#: how a setting is read from text, and what is expected
READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: _TRUTH[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


# -- methods and settings as texts -----------------------------------------------------------------


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    r"""Methods of one or several comma lists, without repeats.

    A method is written as its name, a colon and settings, ``name:setting=value,setting=value``;
    what follows a comma and has an equals sign is one more setting of the method before it.
    ``quick`` is :data:`captum_dcam.comparing.QUICK`, ``all`` is every method.

    Raises:
        UnknownNameError: no such method, with near names.
        ValueError: a setting that the method does not have, or a value of another type.
        MissingPackageError: a method that is named itself lacks a package; of ``all`` it fails
            later, alone.
    """
    from captum_dcam.comparing import QUICK
    from captum_dcam.methods import METHODS, method_names

    several = {"all": method_names(), "quick": QUICK}
    found: list[tuple[str, dict[str, str]]] = []
    named: set[str] = set()
    for part in ",".join(texts).split(","):
        name, colon, setting = part.partition(":")
        if not colon and "=" in part:
            name, setting = "", part
        name = name.strip()
        if name:
            NAMES["methods"].check(name)
            name = METHODS.own(name) if name in METHODS else name
            found += [(one, {}) for one in several.get(name, (name,))]
            named |= {name} - several.keys()
        elif not found or not setting:
            raise InputError(f"--methods {','.join(texts)}: there is no name before {part!r}")
        if setting.strip() or colon:
            key, equals, value = (text.strip() for text in setting.partition("="))
            if not equals or not key:
                raise InputError(
                    f"setting {setting!r} of {found[-1][0]}: expected name=value, as in "
                    "tam:filter=5"
                )
            found[-1][1][key] = value
    made = [built(name, settings) for name, settings in found]
    for one in made:
        if one.name in named:
            one.check_packages()
    return tuple(one for n, one in enumerate(made) if one not in made[:n])


def built(name: str, settings: Mapping[str, str]) -> Method:
    """A method with settings that are written as text."""
    from captum_dcam.methods import METHODS, method

    known, hints = METHODS.settings(name), get_type_hints(METHODS[name])
    for key in settings:
        if key not in known:
            hint = near(key, known) if known else "; it has none"
            raise InputError(f"method {name!r} has no setting {key!r}{hint}")
    values = {key: value_of(s, hints[key], f"{name}:{key}") for key, s in settings.items()}
    return method(name, **values)


def value_of(text: str, kind: Any, where: str) -> Any:
    r"""A setting's value by the type of its field; ``none`` for None, ``+`` between items.

    Args:
        text (str): ``"5"``, ``"false"``, ``"0.5+1"``, ``"none"``.
        kind: bool, int, float, str, a tuple of these, or one of these or None.
        where (str): named in the error.
    """
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        if text.lower() == "none" and NoneType in inner:
            return None
        kinds = [k for k in inner if k is not NoneType]
        if len(kinds) > 1 and int in kinds and (number := as_number(text)) is not None:
            return number
        kind = kinds[0] if len(kinds) == 1 else str if str in kinds else None
    if get_origin(kind) is tuple:
        return tuple(value_of(item, get_args(kind)[0], where) for item in text.split("+"))
    if kind is str:
        return text
    if kind not in READERS:
        raise InputError(f"{where} cannot be set on the command line: use the library")
    read, wanted = READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise InputError(f"{where} is {text!r}: expected {wanted}") from None


#: flags whose settings go to a call that has arguments of its own
_CALLS = {"--load": "load", "--generation": "generation", "--data": "dataset"}


def setting_pairs(flag: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` settings, each once; a value is read as JSON, anything else is text."""
    out: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{flag} {text!r}: expected name=value, such as split=val2014")
        if name in out:
            raise InputError(f"{flag} {text!r}: {name} is given twice; give it once")
        try:
            out[name] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or more of it than anybody types
            out[name] = value
    if out and flag in _CALLS:
        from captum_dcam.evaluation.plan import check_taken

        check_taken(_CALLS[flag], out, flag)
        if flag == "--data" and "name" in out:
            raise InputError(f"--data name={out['name']}: give it as --dataset")
    return out


# -- what is explained -----------------------------------------------------------------------------


def _alone(flag: str, given: Sequence[str], groups: Sequence[str]) -> bool:
    """Whether a word that stands for several or for none is given; others beside it are refused."""
    found = [one for one in given if one in groups]
    if found and len(given) > 1:
        raise InputError(f"{flag} {found[0]} stands alone: leave out the other {flag}")
    return bool(found)


def chosen_words(words: list[str] | None) -> WordsLike:
    """What ``--words`` asks for; None where it is not given."""
    if not words:
        return None
    return words[0] if _alone("--words", words, ("all", "nouns")) else list(words)


def chosen_foil(texts: list[str] | None) -> FoilLike:
    """What ``--foil`` asks for: one text, or texts by word; None where it is not given."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    out: dict[str, str] = {}
    for text in texts:
        word, equals, foil = text.partition("=")
        if not equals or not word.strip() or word in out:
            raise InputError(
                f"--foil {text!r}: expected one text alone, or WORD=TEXT once for each word"
            )
        out[word] = foil
    return out


def chosen_score(text: str | None) -> Score | None:
    """What ``--score`` asks for: a name, or a step's number; None where it is not given."""
    number = as_number(text)
    return text if number is None else number


def chosen_refinements(names: list[str] | None) -> list[Refinement] | None:
    """What ``--refine`` asks for; None where it is not given."""
    from captum_dcam.refine import refinement

    if not names:
        return None
    return [] if _alone("--refine", names, ("none",)) else [refinement(name) for name in names]


def chosen_comparison(options: Any, methods: str) -> dict[str, Any]:
    r"""What ``compare`` and ``compare-models`` ask alike, checked before any work.

    Args:
        options (Options): of either command.
        methods (str): which run where none is named.

    Returns:
        dict: arguments that both functions of :mod:`captum_dcam.comparing` take.
    """
    from captum_dcam.model.foils import check_foil
    from captum_dcam.model.tagging import DEFAULT_TAGGER, check_tagger
    from captum_dcam.model.trajectory import check_score

    found = {
        "words": chosen_words(options.words or ["nouns"]),
        "refinements": chosen_refinements(options.refine) or (),
        "methods": parse_methods(options.methods or [methods]),
        "score": check_score(chosen_score(options.score or "commit")),
        "foil": chosen_foil(options.foil),
        "backward": options.backward or "exact",
        "seed": options.seed,
        "tagger": options.tagger or DEFAULT_TAGGER,
    }
    check_foil(found["foil"])
    check_tagger(found["tagger"])
    return found


@dataclass(frozen=True)
class Subject:
    r"""What one question is about.

    Args:
        paths (tuple of Path): images.
        videos (tuple of Path): files or folders of frames, shown after the images.
        scene (Scene or None): the scene that is drawn in place of files.
        frames (int or None): number of frames of a video; None: all.
    """

    paths: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()
    scene: Scene | None = None
    frames: int | None = None

    @property
    def source(self) -> str:
        """Where it is from, for people."""
        if self.scene is not None:
            return f"held-out scene {self.scene.index}"
        return ", ".join(map(str, (*self.paths, *self.videos)))

    def read(self) -> list[Image.Image | Video]:
        """The images and videos themselves."""
        from captum_dcam.files import reading
        from captum_dcam.model.images import as_image
        from captum_dcam.model.prompts import Video

        if self.scene is not None:
            return [self.scene.image]
        found: list[Image.Image | Video] = []
        for path in self.paths:
            with reading(path):
                found.append(as_image(path))
        for path in self.videos:
            with reading(path):
                found.append(Video.read(path, self.frames))
        return found


def subjects(
    images: Sequence[Path] | None,
    scene: int | None,
    videos: Sequence[Path] | None = None,
    frames: int | None = None,
    together: bool = False,
) -> list[Subject]:
    r"""What is explained: every image and video by itself, or all in one question.

    Args:
        images (sequence of Path or None): files, and folders of files.
        scene (int or None): ``--scene``.
        videos (sequence of Path or None): ``--video``.
        frames (int or None): ``--frames``.
        together (bool): one question about all of them.
    """
    from captum_dcam.data.scenes import HELD_OUT, make_scene
    from captum_dcam.files import reading
    from captum_dcam.model.images import images_in

    if scene is not None and (images or videos):
        raise InputError("--scene draws an image of its own: leave out --scene, or the IMAGE")
    if not images and not videos:
        return [Subject(scene=make_scene(HELD_OUT, SHOWN if scene is None else scene))]
    paths: list[Path] = []
    for path in images or ():
        with reading(path):
            paths += images_in(path) if path.is_dir() else [path]
    if together:
        return [Subject(tuple(paths), tuple(videos or ()), frames=frames)]
    alone = [Subject((path,)) for path in paths]
    return alone + [Subject(videos=(path,), frames=frames) for path in videos or ()]


# -- the model and its answer ----------------------------------------------------------------------


def check_answer(options: Answer, score: Score = "commit") -> torch.device:
    """Check what is otherwise looked up only while the answer is written; returns the device."""
    from captum_dcam.model.answers import check_answer
    from captum_dcam.model.hub import check_device

    setting_pairs("--load", options.load)
    check_answer(options.given, score, None, decoding(options))
    return check_device(options.device)


def decoding(options: Written) -> dict[str, Any]:
    """Settings of decoding that the user gave: the others are the family's."""
    names = ("decoding", "gen_length", "steps", "block_length", "temperature")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    others = setting_pairs("--generation", options.generation)
    if twice := sorted(given.keys() & others.keys()):
        raise InputError(f"--generation {twice[0]}: --{twice[0].replace('_', '-')} is given too")
    return given | others


def loaded(options: Answer, device: torch.device, say: Say) -> Adapter:
    """The model that the options ask for."""
    say("Loading the model")
    return load_chosen(options, device)


def written(
    options: Answer,
    adapter: Adapter,
    pictures: Sequence[Image.Image | Video],
    say: Say,
    layer: int | None = None,
) -> DenoisingForward:
    """The model with the answer that it wrote, at ``layer`` where ``--layer`` is not given."""
    from captum_dcam.model.answers import bind_answer, check_answer, without_steps
    from captum_dcam.model.forward import DenoisingForward

    how = f" in {str(adapter.dtype).removeprefix('torch.')} on {adapter.device}"
    check_answer(options.answer, "commit", None, decoding(options), adapter)
    size = options.internal_batch_size
    block = layer if options.layer is None else options.layer
    forward = DenoisingForward(adapter, block, internal_batch_size=size)
    request = adapter.prepare([list(pictures)], [options.prompt])
    say(("Reading the answer" if without_steps(options.given) else "Writing the answer") + how)
    drawn = generator(options.seed)
    bind_answer(forward, request, options.given, drawn, decoding(options))
    return forward


def generator(seed: int) -> torch.Generator:
    """Generator of everything that is drawn; InputError where ``--seed`` is no 64-bit number."""
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
    dtype: str | None,
) -> Adapter:
    r"""Load ``--model``.

    Args:
        source (str): a family's name, a folder, or a name on the hub.
        settings (mapping): of ``--load``: what :func:`captum_dcam.load` and the family take. A
            ``device_map`` takes the place of the device.
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
    given = {"device": device, "cache": cache, **settings}
    if dtype is not None:
        given["dtype"] = getattr(torch, dtype)
    if settings.get("device_map") is not None:
        del given["device"]
    try:
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
