"""Dream-VL: the whole sequence at every step, logits shifted by one, images of any size."""

from captum_dcam.adapters.dream_vl.adapter import DreamVLAdapter

__all__ = ["DreamVLAdapter"]
