r"""pytorch-grad-cam's classes on the tap (extra ``grad-cam``)."""

from __future__ import annotations
