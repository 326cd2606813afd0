"""MMaDA: the image is 1024 VQ codes in the sequence, all of which runs at every step."""

from captum_dcam.adapters.mmada.adapter import MmadaAdapter

__all__ = ["MmadaAdapter"]
