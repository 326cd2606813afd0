r"""The result: maps of the words of one answer, with everything that made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import TargetError
from captum_dcam.files import write_tensors
from captum_dcam.model.images import to_rgb
from captum_dcam.model.infill import template_of
from captum_dcam.model.layout import Layout, layout_record, layout_tensors, read_layout
from captum_dcam.model.trajectory import STORED_CACHES, Trajectory, stored_cache
from captum_dcam.model.words import Target
from captum_dcam.results.display import Displayed, viewer
from captum_dcam.results.manifests import (
    hashes,
    listed,
    new_folder,
    note_of,
    opened,
    read_tensors,
    write_manifest,
)
from captum_dcam.results.schema import check_explanation
from captum_dcam.results.steps import StepMaps, read_steps
from captum_dcam.results.trust import Trust, read_trust

TENSORS = "tensors.safetensors"
#: fields that a manifest holds as they are
AS_IS = ("prompt", "answer", "settings", "versions")


@dataclass(frozen=True, repr=False)
class Explanation(Displayed):
    r"""Maps of N targets of one answer.

    Args:
        prompt (str), answer (str): the question and the whole answer.
        targets (tuple of Target): what was explained, in order.
        maps (tuple of Tensor): one (N, h, w) float32 per grid, non-negative, after refinements.
        peaks (tuple of Tensor): one (N,) per grid: the maximum of each map before refinements, so
            that maps can be compared across words after they were normalised.
        token_texts (tuple of str): text of every token of the answer.
        layout (Layout): from token to pixel.
        trajectory (Trajectory): of the generation (one example).
        settings (dict): layer, score, product, refinements, …: JSON-able.
        versions (dict): of this package and what it computes with.
        images (tuple): what the model was shown.
        note (str, optional): what a reader must know of a loaded one: ``"without checksum"`` where
            an earlier version saved it. Default: empty
        steps (StepMaps, optional): the words at every denoising step, where ``every_step`` asked
            for them. Default: None
        trust (Trust, optional): what the explanation says of itself, and, in ``trust.scores``, of
            whether its words are so; None where an earlier version saved it. Default: None
        masks (tuple, optional): (H, W) bool of every word whose object is known, in the first
            image. Default: None
    """

    prompt: str
    answer: str
    targets: tuple[Target, ...]
    maps: tuple[Tensor, ...]
    peaks: tuple[Tensor, ...]
    token_texts: tuple[str, ...]
    layout: Layout
    trajectory: Trajectory
    settings: dict[str, Any]
    versions: dict[str, str]
    images: tuple[Image.Image, ...] = field(repr=False)
    note: str = ""
    steps: StepMaps | None = None
    trust: Trust | None = None
    masks: tuple[Tensor | None, ...] | None = None

    def __repr__(self) -> str:
        s, grids = self.settings, ", ".join("×".join(map(str, m.shape[1:])) for m in self.maps)
        return (
            f"Explanation({shortened(self.answer)!r}, words={shortened(', '.join(self.words))!r}, "
            f"maps={len(self.targets)} on {grids}, family={s.get('family')!r}, "
            f"layer={s.get('layer')}, preset={s.get('preset')!r}, score={s.get('score')!r})"
        )

    @property
    def words(self) -> tuple[str, ...]:
        """Text of every target."""
        return tuple(t.text for t in self.targets)

    def index(self, word: str | int) -> int:
        """Number of a word's first target, or the number itself."""
        if isinstance(word, int):
            if not 0 <= word < len(self.targets):
                raise TargetError(f"target {word} is not one of the {len(self.targets)} explained")
            return word
        if word not in self.words:
            known = ", ".join(self.words)
            raise TargetError(f"word {word!r} was not explained; explained: {known}")
        return self.words.index(word)

    def pixel_maps(self, grid: int = 0, mode: str = "bilinear") -> Tensor:
        """Maps (N, H, W) of a grid in the pixels of its image."""
        return self.layout.grids[grid].to_pixels(self.maps[grid], mode)

    def commit_steps(self) -> tuple[tuple[int, ...], ...]:
        """For every target, the step that committed each of its tokens; -1 where it was given."""
        return tuple(self.trajectory.commits(0, t.positions) for t in self.targets)

    @property
    def template(self) -> str:
        """What was given of an answer with holes, as ``"a [MASK] circle"``; empty for others."""
        given = self.trajectory.given
        return "" if given is None else template_of(self.token_texts, given[0].tolist())

    def focus(self, word: str | int, grid: int = 0) -> dict[str, Any]:
        r"""Where a word looks: the box of its peak in pixels, the centre of its mass, its area.

        Returns:
            dict: ``peak`` (x0, y0, x1, y1), ``center`` (x, y) as fractions of the image,
            ``region`` in words, ``area`` the fraction of tokens that hold half of the mass (1:
            diffuse).
        """
        number = self.index(word)
        values = self.maps[grid][number].double()
        box = self.layout.grids[grid]
        h, w = box.shape
        total = float(values.sum())
        if total <= 0:
            return {"peak": None, "center": None, "region": "nowhere", "area": 1.0}
        peak = int(values.argmax())
        height, width = box.image_size
        x = float((values.sum(0) * box.x_edges.mean(1)).sum()) / total / width
        y = float((values.sum(1) * box.y_edges.mean(1)).sum()) / total / height
        ranked = values.flatten().sort(descending=True).values.cumsum(0)
        half = int((ranked < total / 2).sum()) + 1
        return {
            "peak": box.box(peak // w, peak % w),
            "center": (x, y),
            "region": region(x, y),
            "area": half / (h * w),
        }

    # -- looking --------------------------------------------------------------------------------

    def plot(self, words: Iterable[str | int] | None = None, **how: Any) -> Any:
        r"""A matplotlib figure of chosen words, for papers: text stays text in PDF and SVG.

        Args:
            words (iterable of str or int, optional): words, or numbers of targets from 0.
                Default: all
            **how: as :func:`captum_dcam.viewer.word_figure` takes it.

        Returns:
            matplotlib.figure.Figure: every map with a colour scale of its own.
        """
        return viewer().plot(self, words, **how)

    def animate(self, path: str | Path, **how: Any) -> Path:
        r"""Write a GIF: the answer filling in, and every word's map as it commits.

        Args:
            path (path): where to; an earlier file is replaced.
            **how: as :func:`captum_dcam.viewer.write_animation` takes it.
        """
        return viewer().animate(self, path, **how)

    # -- saving ---------------------------------------------------------------------------------

    def save(self, folder: str | Path, beside: Sequence[Path] = ()) -> Path:
        r"""Write the explanation into a new folder, all or nothing.

        Files: ``manifest.json`` (versioned, with a digest and a hash of each file),
        ``tensors.safetensors``, ``image-0.png``, … Maps of every step, where there are any, are
        tensors ``steps.maps.0`` (S, N, h, w), … per grid, ``steps.peaks.0`` (S, N), … and
        ``steps.probabilities`` (S, N). Of :class:`Trust`, what is there is saved; nothing is
        computed.

        Args:
            folder (path): where to; an earlier explanation is replaced.
            beside (sequence of Path, optional): files that lie beside the folder and belong to it:
                their hashes are noted, so that a later output may replace them. Default: none

        Raises:
            OccupiedError: the folder exists and is not an earlier explanation, or a file of it was
                changed since.
            FileError: it cannot be written; nothing is left behind.
        """
        t = self.trajectory
        record = {
            "prompt": self.prompt,
            "answer": self.answer,
            "targets": target_records(self.targets),
            "pieces": self.token_texts,
            "settings": self.settings,
            "versions": self.versions,
            **layout_record(self.layout),
            "trajectory": {
                "regime": STORED_CACHES[t.cache],
                "lengths": t.lengths,
                "image_end": t.image_end,
                "settings": t.settings,
                "states": len(t.states),
            },
        }
        record |= {"note": self.note} if self.note else {}
        record |= {} if self.trust is None else {"trust": self.trust.record()}
        record |= {"beside": hashes(beside)} if beside else {}
        with new_folder(folder) as new:
            write_tensors(new / TENSORS, self._tensors())
            save_images(self.images, new)
            write_manifest(new, record)
        return Path(folder)

    def _tensors(self) -> dict[str, Tensor]:
        t = self.trajectory
        out = {"tokens": t.tokens, "commit_step": t.commit_step, "confidence": t.confidence}
        for i, (state, final) in enumerate(zip(t.states, t.final_state, strict=True)):
            out[f"state.{i}"], out[f"final_state.{i}"] = state, final
        out |= {n: v for n in ("read_at", "given") if (v := getattr(t, n)) is not None}
        for i, (maps, peaks) in enumerate(zip(self.maps, self.peaks, strict=True)):
            out[f"maps.{i}"], out[f"peaks.{i}"] = maps, peaks
        out |= {} if self.steps is None else self.steps.tensors()
        out |= {} if self.trust is None else self.trust.tensors()
        out |= {f"mask.{n}": m for n, m in enumerate(self.masks or ()) if m is not None}
        return out | layout_tensors(self.layout)

    @classmethod
    def load(cls, folder: str | Path) -> Explanation:
        """Read a saved explanation; ExplanationError says what is missing or damaged."""
        with opened(folder) as manifest:
            tensors = read_tensors(listed(Path(folder), manifest, TENSORS))
            images = read_images(
                folder, sum(name.startswith("image-") for name in manifest["files"])
            )
            check_explanation(manifest, tensors, images)
            layout = read_layout(manifest, tensors)
            grids, stored = range(len(layout.grids)), manifest["trajectory"]
            trajectory = Trajectory(
                tokens=tensors["tokens"],
                states=tuple(tensors[f"state.{i}"] for i in range(stored["states"])),
                final_state=tuple(tensors[f"final_state.{i}"] for i in range(stored["states"])),
                commit_step=tensors["commit_step"],
                confidence=tensors["confidence"],
                cache=stored_cache(stored["regime"]),
                lengths=tuple(stored["lengths"]),
                image_end=stored["image_end"],
                settings=stored["settings"],
                read_at=_read_at(tensors),
                given=tensors.get("given"),
            )
            targets = read_targets(manifest["targets"])
            masks = tuple(tensors.get(f"mask.{n}") for n in range(len(targets)))
            return cls(
                **{name: manifest[name] for name in AS_IS},
                targets=targets,
                maps=tuple(tensors[f"maps.{i}"] for i in grids),
                peaks=tuple(tensors[f"peaks.{i}"] for i in grids),
                token_texts=tuple(manifest["pieces"]),
                layout=layout,
                trajectory=trajectory,
                images=images,
                note=note_of(manifest),
                steps=read_steps(tensors, targets, len(grids)),
                trust=read_trust(manifest.get("trust"), tensors, len(grids)),
                masks=None if all(mask is None for mask in masks) else masks,
            )


def _read_at(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens each step reads; of the versions before 3, which held the last step alone, all
    up to it."""
    if "final_step" not in tensors:
        return tensors.get("read_at")
    steps = torch.arange(len(tensors["state.0"]))
    return steps[:, None, None] <= tensors["final_step"]


def target_records(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Targets as a manifest holds them; a foil where there is one."""
    return [{n: v for n, v in asdict(x).items() if v is not None} for x in targets]


def read_targets(records: Iterable[Mapping[str, Any]]) -> tuple[Target, ...]:
    """Targets from their records in a manifest."""
    names = ("positions", "token_ids", "foil_ids")
    return tuple(Target(x["text"], *(tuple(x[n]) for n in names if n in x)) for x in records)


def save_images(images: Sequence[Image.Image], folder: Path) -> None:
    """Write ``image-0.png``, … into a folder."""
    for i, image in enumerate(images):
        to_rgb(image).save(folder / f"image-{i}.png")


def read_images(folder: str | Path, count: int) -> tuple[Image.Image, ...]:
    """What :func:`save_images` wrote."""
    paths = (Path(folder) / f"image-{i}.png" for i in range(count))
    return tuple(Image.open(path).convert("RGB") for path in paths)


def shortened(text: str, most: int = 60) -> str:
    """A text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def region(x: float, y: float) -> str:
    """A point of the image (fractions) in words: ``"upper left"``, ``"center"``."""
    row = ("upper", "", "lower")[min(int(y * 3), 2)]
    column = ("left", "", "right")[min(int(x * 3), 2)]
    return f"{row} {column}".strip() or "center"


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("captum_dcam", "captum", "torch", "transformers")
    return {name: str(import_module(name).__version__) for name in names}
