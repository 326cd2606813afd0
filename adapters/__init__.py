"""One file a model family; importing this package registers them all."""

from captum_dcam.adapters.mini import MiniAdapter

__all__ = ["MiniAdapter"]
