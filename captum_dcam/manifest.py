"""The versioned manifest of a saved explanation's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from captum_dcam.errors import ExplanationError

FORMAT = "captum-dcam explanation"
VERSION = 1


def replaceable(folder: Path) -> bool:
    """Whether a folder holds nothing, or a saved explanation and nothing besides."""
    if not folder.is_dir():
        return False
    found = {f.name for f in folder.iterdir()}
    try:
        return not found or found <= {"manifest.json", *read_manifest(folder).get("files", ())}
    except ExplanationError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Content of ``manifest.json``; ExplanationError when it is none, damaged or too new."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ExplanationError(f"{folder} is not a saved explanation: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExplanationError(f"{path} is not the manifest of an explanation")
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ExplanationError(
            f"{path} has format version {version!r}, this package reads up to {VERSION}: update "
            "captum-dcam"
        )
    return manifest


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
