"""Dream-VL: the whole sequence at every step, logits shifted by one, images of any size."""

from captum_dcam.packages import lazily

__all__ = ["DreamVLAdapter"]
__getattr__ = lazily(__name__, {"adapter": __all__})
