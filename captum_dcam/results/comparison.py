r"""The result of a comparison: maps of the same words by several methods, and what each cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import UnknownNameError, near
from captum_dcam.files import COMPRESSION, without_nan, write_tensors, write_text
from captum_dcam.methods import Cost
from captum_dcam.metrics import LocalizationScores
from captum_dcam.model.layout import Layout, layout_record, layout_tensors, read_layout
from captum_dcam.model.sequence import TextTokens
from captum_dcam.model.words import Target
from captum_dcam.results.display import Displayed
from captum_dcam.results.explanation import (
    AS_IS,
    read_images,
    read_targets,
    save_images,
    shortened,
    target_records,
)
from captum_dcam.results.manifests import (
    listed,
    new_folder,
    note_of,
    opened,
    read_tensors,
    write_manifest,
)
from captum_dcam.results.schema import check_comparison
from captum_dcam.shown import no_formula

TABLE, TENSORS = "comparison.csv", "maps.safetensors"
#: localisation scores of a map
METRICS = ("obj_iou", "contrast", "concentration", "f3")
#: what a method cost, in the order of the records
SPENT = ("seconds", "forwards", "backwards", "peak_bytes")
#: fields of a row that the files hold as they are
PLAIN = ("name", "label", "group", "settings", "status", "note", "complete")


@dataclass(frozen=True)
class ComparisonRow:
    r"""One method's part of a comparison.

    Args:
        name (str): unique in the comparison: the method's name, numbered where it comes twice.
        label (str), group (str): as in its facts.
        settings (dict): of the method.
        status (str): ``done``, ``partial`` (its budget ended) or ``failed`` (``note`` says why).
        note (str): what a reader must know; empty if nothing.
        maps (tuple of Tensor): one (N, h, w) per grid, non-negative, after refinements; zeros
            where there is none.
        raw (tuple of Tensor): the same with the method's own sign and scale.
        complete (tuple of bool): for every word, whether its map is whole.
        text (Tensor or None): (N, K) relevance of text tokens on the scale of ``raw``.
        cost (Cost): of all words together.
        scores (tuple or None): localisation of every word that has a mask.
    """

    name: str
    label: str
    group: str
    settings: dict[str, Any]
    status: str
    note: str
    maps: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]
    complete: tuple[bool, ...]
    text: Tensor | None
    cost: Cost
    scores: tuple[LocalizationScores | None, ...] | None

    def mean(self, metric: str) -> float | None:
        """Mean of a localisation score over the words that have one."""
        found = [float(getattr(s, metric)) for s in self.scores or () if s is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, repr=False)
class Comparison(Displayed):
    r"""Maps of N words by several methods, with what each cost.

    Args:
        prompt (str), answer (str): the question and the whole answer.
        targets (tuple of Target): the words.
        rows (tuple of ComparisonRow): one per method, in the order asked for.
        layout (Layout): from token to pixel.
        tokens (TextTokens): what the columns of ``ComparisonRow.text`` are.
        commit_steps (tuple): for every word, the step that committed each of its tokens.
        settings (dict): model, block, score, refinements, seed, …: JSON-able.
        versions (dict): of this package and what it computes with.
        images (tuple): what the model was shown.
        masks (tuple or None): (H, W) bool of every word that has one.
        note (str, optional): what a reader must know of a loaded one: ``"without checksum"`` where
            an earlier version saved it. Default: empty
    """

    prompt: str
    answer: str
    targets: tuple[Target, ...]
    rows: tuple[ComparisonRow, ...]
    layout: Layout
    tokens: TextTokens
    commit_steps: tuple[tuple[int, ...], ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    images: tuple[Image.Image, ...] = field(repr=False)
    masks: tuple[Tensor | None, ...] | None = field(default=None, repr=False)
    note: str = ""

    def __repr__(self) -> str:
        s, names = self.settings, ", ".join(r.name for r in self.rows)
        return (
            f"Comparison({shortened(self.answer)!r}, words={shortened(', '.join(self.words))!r}, "
            f"methods={shortened(names)!r}, family={s.get('family')!r}, layer={s.get('layer')}, "
            f"score={s.get('score')!r})"
        )

    @property
    def words(self) -> tuple[str, ...]:
        """Text of every word."""
        return tuple(t.text for t in self.targets)

    def row(self, name: str) -> ComparisonRow:
        """A method's row; UnknownNameError with near names otherwise."""
        for one in self.rows:
            if one.name == name:
                return one
        raise UnknownNameError(f"no method {name!r} here{near(name, [r.name for r in self.rows])}")

    def pixel_maps(self, name: str, grid: int = 0, mode: str = "bilinear") -> Tensor:
        """A method's maps (N, H, W) in the pixels of the grid's image."""
        return self.layout.grids[grid].to_pixels(self.row(name).maps[grid], mode)

    def records(self) -> list[dict[str, Any]]:
        r"""One flat record per method and word: ``pandas.DataFrame(comparison.records())``.

        ``seconds``, ``forwards``, ``backwards`` and ``peak_bytes`` are those of the method for all
        words together; scores are None for words without a mask and for maps that are not whole.
        """
        out = []
        for row in self.rows:
            for n, target in enumerate(self.targets):
                own = None if row.scores is None else row.scores[n]
                out.append(
                    {
                        "method": row.name,
                        **{k: getattr(row, k) for k in ("label", "group", "status", "note")},
                        "word": target.text,
                        "position": target.positions[0],
                        "complete": row.complete[n],
                        **{m: None if own is None else float(getattr(own, m)) for m in METRICS},
                        "peak": max(float(r[n].max()) for r in row.raw),
                        **{k: getattr(row.cost, k) for k in SPENT},
                    }
                )
        return out

    @property
    def forced(self) -> bool:
        """Whether the answer was given, not generated."""
        return bool(self.settings.get("generation", {}).get("forced"))

    # -- saving ---------------------------------------------------------------------------------

    def save(
        self,
        folder: str | Path,
        pictures: Mapping[str, Image.Image] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> Path:
        r"""Write the comparison into ``folder``, which appears complete or not at all.

        Files: ``comparison.json`` (versioned: words, settings, rows, records, a digest and a hash
        of each file), ``comparison.csv`` (:meth:`records`: one line per method and word),
        ``maps.safetensors``, ``image-0.png``, … An earlier comparison is replaced.

        Args:
            folder (path): where to.
            pictures (dict, optional), texts (dict, optional): more files, for example
                ``{"panel.png": panel}``. Default: none

        Raises:
            OccupiedError: the folder exists and is not an earlier comparison.
            FileError: it cannot be written; nothing is left behind.
        """
        content = document(self)
        with new_folder(folder, "comparison") as new:
            for name, picture in (pictures or {}).items():
                picture.save(new / name, compress_level=COMPRESSION)
            for name, text in (texts or {}).items():
                write_text(new / name, text)
            save_images(self.images, new)
            write_tensors(new / TENSORS, _tensors(self))
            write_text(new / TABLE, _table(content["records"]))
            content |= {
                **layout_record(self.layout),
                "tokens": {"pieces": self.tokens.token_texts, "prompt": self.tokens.prompt},
                "images": len(self.images),
                "masked": self.masks is not None,
                "scored": [row.scores is not None for row in self.rows],
            }
            content |= {"note": self.note} if self.note else {}
            write_manifest(new, content, "comparison")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a saved comparison; ExplanationError says what is missing or damaged."""
        with opened(folder, "comparison") as manifest:
            tensors = read_tensors(listed(Path(folder), manifest, TENSORS))
            for number in range(manifest["images"]):
                listed(Path(folder), manifest, f"image-{number}.png")
            images = read_images(folder, manifest["images"])
            check_comparison(manifest, tensors, images)
            words, tokens = manifest["words"], manifest["tokens"]
            methods = zip(manifest["methods"], manifest["scored"], strict=True)
            masks = tuple(tensors.get(f"mask.{n}") for n in range(len(words)))
            return cls(
                **{name: manifest[name] for name in AS_IS},
                targets=read_targets(words),
                rows=tuple(
                    _row(record, r, len(manifest["grids"]), scored, tensors)
                    for r, (record, scored) in enumerate(methods)
                ),
                layout=read_layout(manifest, tensors),
                tokens=TextTokens(
                    tensors["tokens.positions"],
                    tensors["tokens.ids"],
                    tuple(tokens["pieces"]),
                    tokens["prompt"],
                ),
                commit_steps=tuple(tuple(x["commit_steps"]) for x in words),
                images=images,
                masks=masks if manifest["masked"] else None,
                note=note_of(manifest),
            )


def document(comparison: Comparison) -> dict[str, Any]:
    """Everything but maps and images as JSON-able data; None for what is no finite number."""
    words = [
        {**record, "commit_steps": steps}
        for record, steps in zip(
            target_records(comparison.targets), comparison.commit_steps, strict=True
        )
    ]
    rows = [
        {
            **{name: getattr(row, name) for name in PLAIN},
            "cost": asdict(row.cost),
            "means": {metric: row.mean(metric) for metric in METRICS},
        }
        for row in comparison.rows
    ]
    content = {
        "prompt": comparison.prompt,
        "answer": comparison.answer,
        "words": words,
        "methods": rows,
        "records": comparison.records(),
        "settings": comparison.settings,
        "versions": comparison.versions,
    }
    found: dict[str, Any] = without_nan(content)
    return found


def _table(records: list[dict[str, Any]]) -> str:
    """Records as CSV, empty where there is no figure."""
    out = io.StringIO(newline="")
    if records:
        writer = csv.DictWriter(out, list(records[0]))
        writer.writeheader()
        writer.writerows({k: no_formula(v) for k, v in record.items()} for record in records)
    return out.getvalue()


def _tensors(comparison: Comparison) -> dict[str, Tensor]:
    out = layout_tensors(comparison.layout)
    out["tokens.positions"], out["tokens.ids"] = comparison.tokens.positions, comparison.tokens.ids
    for n, mask in enumerate(comparison.masks or ()):
        if mask is not None:
            out[f"mask.{n}"] = mask
    for r, row in enumerate(comparison.rows):
        for i, (maps, raw) in enumerate(zip(row.maps, row.raw, strict=True)):
            out[f"row.{r}.maps.{i}"], out[f"row.{r}.raw.{i}"] = maps, raw
        if row.text is not None:
            out[f"row.{r}.text"] = row.text
        for n, own in enumerate(row.scores or ()):
            if own is not None:
                out[f"row.{r}.scores.{n}"] = torch.stack([getattr(own, m) for m in METRICS])
    return out


def _row(
    record: dict[str, Any], r: int, grids: int, scored: bool, tensors: dict[str, Tensor]
) -> ComparisonRow:
    own = [tensors.get(f"row.{r}.scores.{n}") for n in range(len(record["complete"]))]
    scores = tuple(None if one is None else LocalizationScores(*one.unbind()) for one in own)
    return ComparisonRow(
        **{name: record[name] for name in PLAIN} | {"complete": tuple(record["complete"])},
        maps=tuple(tensors[f"row.{r}.maps.{i}"] for i in range(grids)),
        raw=tuple(tensors[f"row.{r}.raw.{i}"] for i in range(grids)),
        text=tensors.get(f"row.{r}.text"),
        cost=Cost(**record["cost"]),
        scores=scores if scored else None,
    )
