"""What is called otherwise in older or newer transformers; the libraries' oldest versions are
those of pyproject.toml."""

from __future__ import annotations

from typing import Any

from packaging.version import Version


def in_type(dtype: Any) -> dict[str, Any]:
    """``from_pretrained``'s argument for a type: ``torch_dtype`` until transformers 4.56."""
    import transformers

    old = Version(transformers.__version__) < Version("4.56")
    return {"torch_dtype" if old else "dtype": dtype}
