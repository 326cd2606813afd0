r"""Layer-wise relevance propagation: CP-LRP and AttnLRP."""

from __future__ import annotations
