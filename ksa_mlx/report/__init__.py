"""What a machine makes of this package, in one text to paste: `python -m ksa_mlx report`."""
