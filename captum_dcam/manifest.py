r"""Folders that results are saved into: complete or not at all, with a versioned manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from captum_dcam.errors import ExplanationError
from captum_dcam.layout import Grid, Layout

VERSION = 1
#: what is saved → the file that holds its manifest
FILES = {"explanation": "manifest.json", "comparison": "comparison.json"}


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill; on leaving it takes the place of ``folder``, after an error it goes.

    The earlier folder comes back if it cannot be replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        _swap(new, folder, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put ``new`` in the place of ``folder``; what was there comes back if that fails."""
    there = folder.exists()
    if there:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if there:
            old.rename(folder)
        raise


def replaceable(folder: Path, kind: str = "explanation") -> bool:
    """Whether a folder holds nothing, or a saved result of this kind and nothing besides."""
    return folder.is_dir() and not unknown_files(folder, kind)


def unknown_files(folder: Path, kind: str = "explanation") -> list[str]:
    """Names in a folder that no saved result of this kind knows; all of them if none is there."""
    try:
        known = {FILES[kind], *read_manifest(folder, kind).get("files", ())}
    except ExplanationError:
        known = set()
    return sorted({f.name for f in folder.iterdir()} - known)


def write_manifest(folder: Path, content: Mapping[str, Any], kind: str = "explanation") -> None:
    """Write the manifest beside the files that are there already, with a hash of each."""
    files = {f.name: digest_of(f) for f in sorted(folder.iterdir())}
    record = {"format": f"captum-dcam {kind}", "version": VERSION, **content, "files": files}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / FILES[kind]).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, kind: str = "explanation") -> dict[str, Any]:
    """Content of the manifest; ExplanationError when it is none, damaged or too new."""
    path = folder / FILES[kind]
    if not path.is_file():
        raise ExplanationError(f"{folder} is not a saved {kind}: it has no {path.name}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != f"captum-dcam {kind}":
        raise ExplanationError(f"{path} is not the manifest of a saved {kind}")
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ExplanationError(
            f"{path} has format version {version!r}, this package reads up to {VERSION}: update "
            "captum-dcam"
        )
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], kind: str = "explanation") -> None:
    """ExplanationError when a file is missing, or is not what was saved."""
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            raise ExplanationError(
                f"{folder / name} is missing or differs from what was saved: the {kind} is "
                "damaged; make it again"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ExplanationError when it is damaged."""
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- layouts, which every result holds -----------------------------------------------------------


def layout_record(layout: Layout) -> dict[str, Any]:
    """The part of a layout that goes into a manifest."""
    return {
        "grids": [{"image_size": g.image_size, "image": g.image} for g in layout.grids],
        "prefix_length": layout.prefix_length,
    }


def layout_tensors(layout: Layout) -> dict[str, Tensor]:
    """The part of a layout that goes into a file of tensors."""
    out = {}
    for i, grid in enumerate(layout.grids):
        out[f"grid.{i}.positions"] = grid.positions
        out[f"grid.{i}.x_edges"], out[f"grid.{i}.y_edges"] = grid.x_edges, grid.y_edges
    return out


def read_layout(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of both parts."""
    grids = tuple(
        Grid(
            tensors[f"grid.{i}.positions"],
            tensors[f"grid.{i}.x_edges"],
            tensors[f"grid.{i}.y_edges"],
            (g["image_size"][0], g["image_size"][1]),
            g["image"],
        )
        for i, g in enumerate(manifest["grids"])
    )
    return Layout(grids, manifest["prefix_length"])
