"""Making a KSA model of a pretrained model with full attention."""
