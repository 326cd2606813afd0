r"""Named settings of Diffusion-CAM: the paper's, the reference code's, and our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from captum_dcam.errors import UnknownNameError, near
from captum_dcam.refine import Compose, paper_refinements


@dataclass(frozen=True)
class Preset:
    r"""Everything that turns a generation into a map.

    Args:
        score (str): state whose logits are read: ``commit``, ``final`` or ``teacher``.
        product (str): ``pooled``, ``positionwise`` or ``plus_plus``.
        center (bool): subtract each channel's spatial mean from the features first.
        refinements (callable): makes the post-transforms.
        source (str): where the settings come from.
    """

    score: str
    product: str
    center: bool
    refinements: Callable[[], Compose]
    source: str


def no_refinements() -> Compose:
    """The map as it is."""
    return Compose([])


PRESETS: dict[str, Preset] = {
    "default": Preset(
        "commit",
        "positionwise",
        True,
        paper_refinements,
        "ours: chosen by measurement on the embedded model, docs/SCORES.md",
    ),
    "paper": Preset(
        "final",
        "pooled",
        False,
        paper_refinements,
        "Diffusion-CAM, ACL 2026: Eq. 2 read literally, Eq. 4, all four modules",
    ),
    "base": Preset(
        "final", "pooled", False, no_refinements, "Diffusion-CAM, ACL 2026: Eq. 2 and 4 alone"
    ),
}


def preset(name: str | Path) -> Preset:
    r"""A preset by its name, or by the path of a file that ``captum-dcam calibrate`` wrote.

    Raises:
        UnknownNameError: neither a known name nor a path (``….json``), with near names.
        FileNotFoundError, PresetError: no such file, or one that is damaged.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if Path(str(name)).suffix != ".json":
        hint = near(str(name), PRESETS)
        raise UnknownNameError(f"unknown preset {name!r}{hint}; or a file that ends in .json")
    from captum_dcam.preset_file import read_preset  # which is built on this module

    return read_preset(name)
