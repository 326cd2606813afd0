r"""Images of Gemma 4, as :mod:`captum_dcam.adapters.common.gemma` has them.

In layers with a sliding window the larger models' image tokens see each other; the smaller models
have embeddings of the words for every layer, and their last layers read the keys and values of
earlier ones.
"""

from __future__ import annotations

from typing import ClassVar

from captum_dcam.adapters.common.gemma import Gemma


class Gemma4(Gemma):
    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    one_length: ClassVar[str | None] = "a sliding window counts padding, too"
