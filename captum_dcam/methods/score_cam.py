r"""Score-CAM on token scores."""

from __future__ import annotations
