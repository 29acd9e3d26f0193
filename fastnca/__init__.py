"""Neural cellular automata that grow sound, on fused kernels."""

from .caches import lend_cache_folder
from .learning import learn
from .model import DualSpecTNCA, decode_db
from .run import grow
from .sound_model import load, load_model, save_model
from .space import Space
from .training.losses import PerceptualLoss
from .training.recipes import RECIPES, Recipe
from .version import __version__

__all__ = [
    "RECIPES",
    "DualSpecTNCA",
    "PerceptualLoss",
    "Recipe",
    "Space",
    "__version__",
    "decode_db",
    "grow",
    "learn",
    "load",
    "load_model",
    "save_model",
]

lend_cache_folder()
