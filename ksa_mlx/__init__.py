"""KSA (Kwai Summary Attention) language models in MLX.

Importing the package makes mlx-lm load, generate from and serve converted KSA models.
"""

from .cache import RollingSummaryCache, make_cache
from .config import ConfigError, ModelArgs
from .load import load, load_model
from .model import Model
from .register import register
from .sources import references

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Model",
    "ModelArgs",
    "RollingSummaryCache",
    "load",
    "load_model",
    "make_cache",
    "references",
]

register()
