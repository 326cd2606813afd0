r"""Captum's layer attributions on ``(forward, forward.tap)``."""

from __future__ import annotations
