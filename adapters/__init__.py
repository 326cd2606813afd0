"""One file a model family; importing this package registers them all."""

from captum_dcam.adapters.autoregressive import AutoregressiveAdapter
from captum_dcam.adapters.diffusion_gemma import DiffusionGemmaAdapter
from captum_dcam.adapters.dream_vl import DreamVLAdapter
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.adapters.lavida_o import LavidaOAdapter
from captum_dcam.adapters.llada_v import LladaVAdapter
from captum_dcam.adapters.mini import MiniAdapter
from captum_dcam.adapters.mmada import MmadaAdapter

__all__ = [
    "AutoregressiveAdapter",
    "DiffusionGemmaAdapter",
    "DreamVLAdapter",
    "LavidaAdapter",
    "LavidaOAdapter",
    "LladaVAdapter",
    "MiniAdapter",
    "MmadaAdapter",
]
