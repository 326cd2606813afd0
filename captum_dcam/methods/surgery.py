r"""Architecture surgery and feature surgery."""

from __future__ import annotations
