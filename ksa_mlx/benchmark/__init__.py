"""Measure KSA models against mlx-lm's Qwen3: `python -m ksa_mlx benchmark`."""
