import data_prep  # noqa: F401  (of a command, `python -m pretrain.…`: before the packages that take seconds to load)
