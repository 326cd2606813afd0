"""LaViDa-LLaDA and LaViDa-Dream, the family on which the paper was validated."""

from captum_dcam.adapters.lavida.adapter import LavidaAdapter

__all__ = ["LavidaAdapter"]
