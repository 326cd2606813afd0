r"""CAM, which for language models is the logit lens."""

from __future__ import annotations
