"""What compression costs: recall and losses of KSA and plain models, `python -m ksa_mlx recall`."""
