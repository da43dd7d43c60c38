"""The settings of a run: one dataclass for each group, its rules, and a comment beside each field. Imports no torch."""
