"""What `import ksa_mlx` tells mlx-lm, so that its own functions load and save KSA models."""

import functools
import importlib.util
import sys
import warnings

import mlx_lm.models.cache
import mlx_lm.utils
from transformers import AutoConfig, Qwen3Config

from ..config import MODEL_TYPE

# The name of `model_file.py` in a converted folder.
MODEL_FILE = "ksa_model.py"

_MODULE = f"mlx_lm.models.{MODEL_TYPE}"


class _Config(Qwen3Config):
    model_type = MODEL_TYPE


def register():
    """Make mlx-lm know the model type and the cache class, unless it brings its own. Idempotent.

    mlx-lm has no registry for models from other packages (mlx-lm#1578): it imports
    `mlx_lm.models.<model_type>`, and looks cache classes up by name in its cache module.
    Transformers, which loads the tokenizer, reads the config too and warns of unknown types.
    """
    from .. import model
    from ..cache.quantized import MixedRollingSummaryCache, QuantizedRollingSummaryCache
    from ..cache.rolling import RollingSummaryCache

    for cache in (RollingSummaryCache, QuantizedRollingSummaryCache, MixedRollingSummaryCache):
        if not hasattr(mlx_lm.models.cache, cache.__name__):
            setattr(mlx_lm.models.cache, cache.__name__, cache)
    if _MODULE in sys.modules or importlib.util.find_spec(_MODULE) is not None:
        return
    sys.modules[_MODULE] = model
    AutoConfig.register(MODEL_TYPE, _Config, exist_ok=True)
    mlx_lm.utils.load_model = _without_model_file(mlx_lm.utils.load_model)


def _without_model_file(load_model):
    """mlx-lm's `load_model`, which builds our models from the registered classes.

    A converted folder names a `model_file` for commands that never import us, and mlx-lm runs
    such a file only with `trust_remote_code`. Once we are imported there is nothing to run:
    the classes are here. So for our model type and file name the file is ignored, never run;
    every other model goes through mlx-lm's own check, untouched.
    """

    @functools.wraps(load_model)
    def load(model_path, lazy=False, strict=True, model_config=None, **kwargs):
        config = {**mlx_lm.utils.load_config(model_path), **(model_config or {})}
        model_file = config.get("model_file")
        if config.get("model_type") != MODEL_TYPE or model_file != MODEL_FILE:
            return load_model(model_path, lazy, strict, model_config, **kwargs)
        model_config = {**(model_config or {}), "model_file": None}
        model, config = load_model(model_path, lazy, strict, model_config, **kwargs)
        # `mlx_lm.utils.save` copies the file and writes this config: they stay together.
        config["model_file"] = model_file
        return model, config

    return load


def warn_of_max_kv_size():
    """For `Model.make_cache`: warn if mlx-lm's `make_prompt_cache` calls it with a limit.

    mlx-lm's commands take `--max-kv-size` and drop it without a word for models with caches of
    their own; only the caller's frame still has it.
    """
    caller = sys._getframe(2)
    if caller.f_code is not mlx_lm.models.cache.make_prompt_cache.__code__:
        return
    size = caller.f_locals.get("max_kv_size")
    if size is not None:
        warnings.warn(
            f"max_kv_size = {size} is ignored: a KSA model keeps summaries of all old text "
            "instead of dropping it",
            stacklevel=4,
        )
