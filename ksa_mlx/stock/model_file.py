"""How mlx-lm's own commands find a KSA model: `config.json` names this file as `model_file`."""

try:
    from ksa_mlx.model import Model, ModelArgs  # noqa: F401
except ImportError as e:
    raise ImportError("this is a KSA model, and it needs ksa-mlx, installed from a clone") from e
