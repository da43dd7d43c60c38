import data_prep  # noqa: F401  (of a command, `python -m launch.…`: before the packages that take seconds to load)
