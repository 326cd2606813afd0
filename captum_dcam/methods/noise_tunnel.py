r"""Captum's NoiseTunnel around other methods."""

from __future__ import annotations
