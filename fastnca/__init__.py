"""Neural cellular automata that grow sound, on fused kernels."""

from .losses import PerceptualLoss
from .model import DualSpecTNCA, decode_db, load_model, save_model

__version__ = "0.1.0"
__all__ = ["DualSpecTNCA", "PerceptualLoss", "decode_db", "load_model", "save_model"]
