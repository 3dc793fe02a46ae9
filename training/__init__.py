"""How the embedded notebook model was made: its data, PyTorch reference, training and figures."""
