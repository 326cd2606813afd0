r"""Captum's input attributions on the pixels."""

from __future__ import annotations
