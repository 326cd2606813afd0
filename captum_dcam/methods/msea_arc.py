r"""MSEA and ARC."""

from __future__ import annotations
