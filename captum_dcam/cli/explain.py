r"""What ``captum-dcam explain`` and ``captum-dcam models`` do, without their printing.

``captum-dcam compare`` shares its first half: options, picture, model, answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from captum_dcam.cli.parsing import DTYPES, load_model, setting_pairs
from captum_dcam.errors import InputError, UnknownNameError, near
from captum_dcam.explaining import explain_bound, sign_check
from captum_dcam.maps import PRODUCTS
from captum_dcam.metrics import LocalizationScores
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.hub import check_device
from captum_dcam.model.hub import list_models as list_models
from captum_dcam.model.prompts import open_picture
from captum_dcam.model.trajectory import SCORES
from captum_dcam.model.words import WordsLike
from captum_dcam.presets import preset as find_preset
from captum_dcam.refine import Refinement, refinement
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.summary import scene_scores
from captum_dcam.viewer import prepare_folder, write_folder

if TYPE_CHECKING:
    from captum_dcam.data.scenes import Scene

#: the held-out scene that is drawn when none is asked for, README's picture
SHOWN = 12
#: told before every part of the work
Say = Callable[[str], None]


@dataclass(frozen=True)
class Common:
    """Options that every command has that writes an answer, as its help describes them."""

    image: Path | None
    prompt: str
    words: list[str] | None
    scene: int | None
    model: str
    load: list[str] | None
    regime: str | None
    layer: int | None
    internal_batch_size: int | None
    score: str | None
    refine: list[str] | None
    gen_length: int | None
    steps: int | None
    block_length: int | None
    temperature: float | None
    generation: list[str] | None
    seed: int
    device: str
    dtype: str
    output: Path
    json: bool


@dataclass(frozen=True)
class Options(Common):
    """The options of ``captum-dcam explain``."""

    preset: str
    product: str | None
    center: bool | None
    check_sign: bool


@dataclass(frozen=True)
class Result:
    r"""What was explained and written.

    Args:
        explanation (Explanation): the maps.
        folder (Path): where everything lies.
        source (str): the picture's path, or which scene was drawn.
        scores (tuple or None): localisation of every target, where masks are known.
        signs (Tensor or None): (N, 2) of :func:`captum_dcam.sign_check`.
    """

    explanation: Explanation
    folder: Path
    source: str
    scores: tuple[LocalizationScores | None, ...] | None
    signs: Tensor | None


def run(options: Options) -> Result:
    """Explain and write; everything that can be checked is checked before any work."""
    words = chosen_words(options.words)
    refinements = chosen_refinements(options.refine)
    find_preset(options.preset)
    check_name("product", options.product, PRODUCTS)
    device = check_options(options)
    folder = prepare_folder(options.output)
    with progress() as say:
        picture, scene = picture_of(options)
        forward = written(options, picture, device, say)
        say("Explaining its words")
        explanation = explain_bound(
            forward,
            words,
            preset=options.preset,
            score=options.score,
            product=options.product,
            center=options.center,
            refinements=refinements,
        )
        signs = _signs(forward, explanation, options, say) if options.check_sign else None
        scores = None if scene is None else scene_scores(explanation, scene)
        write_folder(explanation, folder, progress=lambda name: say(f"Drawing {name}"))
    return Result(explanation, folder, source_of(options, scene), scores, signs)


def written(
    options: Common, picture: Image.Image, device: torch.device, say: Say
) -> DenoisingForward:
    """The model with the answer that it wrote."""
    say("Loading the model")
    adapter = _adapter(options, device)
    size = options.internal_batch_size
    forward = DenoisingForward(adapter, options.layer, internal_batch_size=size)
    request = adapter.prepare([[picture]], [options.prompt])
    say("Writing the answer")
    forward.generate(request, generator=_generator(options.seed), **_generation(options))
    return forward


def source_of(options: Common, scene: Scene | None) -> str:
    """The picture's path, or which scene was drawn."""
    return str(options.image) if scene is None else f"held-out scene {scene.index}"


@contextmanager
def progress() -> Iterator[Say]:
    """A line on stderr that says what is being done; nothing where stderr is no terminal."""
    with Console(stderr=True).status("Starting") as status:
        yield lambda text: status.update(f"{text} …")


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
    if not names:
        return None
    if "none" in names:
        if len(names) > 1:
            raise InputError("--refine none stands alone: leave out the other --refine")
        return []
    return [refinement(name) for name in names]


def check_options(options: Common) -> torch.device:
    """What the library would look up only after the answer was written; returns the device."""
    check_name("score", options.score, SCORES)
    check_name("dtype", options.dtype, DTYPES)
    if options.image is not None and options.scene is not None:
        raise InputError("--scene draws a picture of its own: leave out --scene, or the IMAGE")
    setting_pairs("--load", options.load)
    _generation(options)
    return check_device(options.device)


def check_name(kind: str, name: str | None, known: Collection[str]) -> None:
    """UnknownNameError with near names; None is left to the library."""
    if name is not None and name not in known:
        raise UnknownNameError(f"unknown {kind} {name!r}{near(name, known)}")


def picture_of(options: Common) -> tuple[Image.Image, Scene | None]:
    """The picture, and the scene it was drawn from (None for a file)."""
    if options.image is not None:
        return open_picture(options.image), None
    from captum_dcam.data.scenes import make_scene
    from captum_dcam.mini.evaluate import HELD_OUT_SEED

    scene = make_scene(HELD_OUT_SEED, SHOWN if options.scene is None else options.scene)
    return scene.image, scene


def _adapter(options: Common, device: torch.device) -> Adapter:
    settings = setting_pairs("--load", options.load)
    return load_model(
        options.model, settings, regime=options.regime, device=device, dtype=options.dtype
    )


def _generation(options: Common) -> dict[str, Any]:
    """Only what the user gave: the rest is the family's."""
    given = {
        "gen_length": options.gen_length,
        "steps": options.steps,
        "block_length": options.block_length,
        "temperature": options.temperature,
    }
    named = {name: value for name, value in given.items() if value is not None}
    others = setting_pairs("--generation", options.generation)
    if twice := sorted(named.keys() & others.keys()):
        raise InputError(f"--generation {twice[0]}: --{twice[0].replace('_', '-')} is given too")
    return named | others


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _signs(
    forward: DenoisingForward, explanation: Explanation, options: Options, say: Say
) -> Tensor:
    say("Checking signs")
    generator = _generator(options.seed)
    score = explanation.settings["score"]
    return sign_check(forward, explanation.targets, explanation.maps, generator, score=score)
