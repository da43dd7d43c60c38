"""The commands `python -m pretrain.…`. A package of their own, so that no module below imports upwards."""
