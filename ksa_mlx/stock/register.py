"""What `import ksa_mlx` tells mlx-lm, so that its own functions load and save KSA models.

mlx-lm has no registry for models of other packages (mlx-lm#1578). `register` puts ours where it
looks: one function a patch, each with its reason; tests/test_stock.py fails when one of them is
no longer needed.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import mlx_lm.models.cache
import mlx_lm.utils
from mlx_lm import tokenizer_utils
from transformers import AutoConfig, Qwen3Config

from .. import model
from ..cache.full import FullCache, SplitKVCache
from ..cache.rolling import RollingSummaryCache
from ..checkpoint import load as checkpoint
from ..checkpoint.source import read_json
from ..config import MODEL_TYPE, is_ksa
from . import adapters, dora, ids, prompt_lookup

# The name of `model_file.py` in a converted folder.
MODEL_FILE = "ksa_model.py"

_MODULE = f"mlx_lm.models.{MODEL_TYPE}"


class _Config(Qwen3Config):
    model_type = MODEL_TYPE


def register():
    """Make mlx-lm know the caches and the model, unless it brings its own. Idempotent."""
    know_cache()
    text_never_goes_back()
    if _MODULE not in sys.modules and importlib.util.find_spec(_MODULE) is None:
        know_model()
        know_config()
        load_ours()
        dora.install()
        adapters.install()
        prompt_lookup.install()
        ids.install()


def text_never_goes_back():
    """Make a streaming detokenizer give every piece of text once.

    Where the tokenizer spells characters in bytes, as SentencePiece does, its `decode` makes one
    replacement character of each byte while the last character is incomplete, and mlx-lm's naive
    detokenizer drops those: its text gets shorter for a while, and what was dropped came again.
    """

    def last_segment(self) -> str:
        text = self.text
        segment = text[self.offset :]
        self.offset = max(self.offset, len(text))
        return segment

    streaming: Any = tokenizer_utils.StreamingDetokenizer
    streaming.last_segment = property(last_segment)


def know_cache():
    """`load_prompt_cache` looks classes up by name in its own module (mlx-lm#80, #1578)."""
    for kind in (RollingSummaryCache, FullCache, SplitKVCache):
        if not hasattr(mlx_lm.models.cache, kind.__name__):
            setattr(mlx_lm.models.cache, kind.__name__, kind)


def know_model():
    """`load_model` imports `mlx_lm.models.<model_type>`: there is no other place (mlx-lm#1578)."""
    sys.modules[_MODULE] = model


def know_config():
    """Transformers reads the config with the tokenizer, and warns of unknown model types."""
    AutoConfig.register(MODEL_TYPE, _Config, exist_ok=True)


def load_ours():
    """Make `load_model` build KSA models from the classes that are here.

    A converted folder names a `model_file` (mlx-lm#830) for commands that never import us, and
    mlx-lm runs such a file only with `trust_remote_code`. For our model type and file name it is
    ignored, never run; every other file goes through mlx-lm's own check. An unconverted folder
    says that it is a Qwen3, of which mlx-lm would build a plain one. And mlx-lm reads whatever
    matches `model*.safetensors`, in a path that it takes for a pattern.
    """
    load_model = mlx_lm.utils.load_model

    @functools.wraps(load_model)
    def load(model_path, lazy=False, strict=True, model_config=None, *args, **kwargs):
        file = Path(model_path) / "config.json"
        config = {**(read_json(file) if file.is_file() else {}), **(model_config or {})}
        model_file, converted = config.get("model_file"), config.get("model_type") == MODEL_TYPE
        if is_ksa(config) and (model_file is None or (converted and model_file == MODEL_FILE)):
            return checkpoint.load_model(model_path, lazy, strict, model_config)
        return load_model(model_path, lazy, strict, model_config, *args, **kwargs)

    mlx_lm.utils.load_model = load
