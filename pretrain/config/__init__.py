"""Settings of a run: one dataclass per group, with its rules and a comment beside each field. Imports no torch."""
