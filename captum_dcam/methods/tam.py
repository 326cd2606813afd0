r"""Token activation map."""

from __future__ import annotations
