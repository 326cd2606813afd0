"""LLaDA-V: the whole sequence at every step, images as a base view and a mosaic of tiles."""

from captum_dcam.adapters.llada_v.adapter import LladaVAdapter

__all__ = ["LladaVAdapter"]
