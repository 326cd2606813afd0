r"""LLaVA-CAM: Smooth Grad-CAM++."""

from __future__ import annotations
