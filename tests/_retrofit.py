"""What the tests of retrofits share: a tiny base, and texts that repeat themselves."""

import mlx.core as mx
import numpy as np

from ksa_mlx.retrofit.build import teacher
from ksa_mlx.retrofit.data import Text
from ksa_mlx.retrofit.stages import Retrofit, Settings
from ksa_mlx.retrofit.state import Place
from tests import _models

WINDOWS = [2, 2000, 2, 2]
SETTINGS = Settings(
    window=2,
    length=96,
    batch_size=2,
    regression_tokens=192 * 5,
    distillation_tokens=192 * 4,
    lora_rank=2,
    pool=2,
)


def student(seed: int = 0, **overrides):
    """A KSA model as a retrofit begins with it: own parts are copies of the base's."""
    model = _models.build(
        seed,
        **{
            "num_hidden_layers": 4,
            "summary_chunk_size": 8,
            "mix_coeff": 1.0,
            "summary_independent_attention_layernorm": True,
            "summary_sliding_chunk_num": WINDOWS,
            **overrides,
        },
    )
    for layer in model.model.layers:
        attn = layer.self_attn
        for name in "qkv":
            if f"{name}_proj_summary" in attn:
                attn[f"{name}_proj_summary"].weight = attn[f"{name}_proj"].weight
        if "input_layernorm_summary" in layer:
            layer.input_layernorm_summary.weight = layer.input_layernorm.weight
    return model


class Texts:
    """Random texts whose second half repeats the first, which is where answers are."""

    def sequence(self, index: int) -> Text:
        rng = np.random.default_rng([7, index])
        half = rng.integers(0, 64, SETTINGS.length // 2)
        half[:8] = np.arange(8)  # the prefix
        ids = np.concatenate([half, half]).astype(np.int32)
        return Text(ids, np.arange(80, 84, dtype=np.int32) if index % 2 else np.zeros(0, np.int32))

    def held_out(self, index: int) -> Text:
        return self.sequence(1000 + index)


def retrofit(folder, settings=SETTINGS, group=None, **more) -> Retrofit:
    model = student()
    place = Place(folder, {"seed": settings.seed}, writes=group is None or group.rank() == 0)
    return Retrofit(model, teacher(model), settings, Texts(), place, group, **more)


def ids(n: int = 96, batch: int = 2) -> mx.array:
    return mx.array(np.stack([Texts().sequence(i).ids[:n] for i in range(batch)]))
