"""The settings of a run: one dataclass per group, with its rules and a comment beside each field. Does not import torch."""
