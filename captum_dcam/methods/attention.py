r"""Attention weights as maps: raw, rollout, grad-rollout."""

from __future__ import annotations
