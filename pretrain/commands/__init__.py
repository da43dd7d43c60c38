"""The commands `python -m pretrain.…`: above all that they import, so that no import points up."""
