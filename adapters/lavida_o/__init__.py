"""LaViDa-O: the understanding path, an image and a question in, text out."""

from captum_dcam.adapters.lavida_o.adapter import LavidaOAdapter

__all__ = ["LavidaOAdapter"]
