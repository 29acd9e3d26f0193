"""Neural cellular automata that grow sound, on fused kernels."""

__version__ = "0.1.0"

from .model import DualSpecTNCA, decode_db
from .run import grow
from .sound_model import load, load_model, save_model
from .training.losses import PerceptualLoss
from .training.recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "DualSpecTNCA",
    "PerceptualLoss",
    "Recipe",
    "decode_db",
    "grow",
    "load",
    "load_model",
    "save_model",
]
