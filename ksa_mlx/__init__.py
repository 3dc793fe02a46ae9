"""KSA (Kwai Summary Attention) language models in MLX.

Importing the package makes mlx-lm load, generate from and serve converted KSA models.
"""

from .cache.make import make_cache
from .cache.rolling import RollingSummaryCache
from .checkpoint.load import load, load_model
from .config import ModelArgs
from .errors import ConfigError
from .model import Model
from .references.trace import references
from .stock.register import register

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
