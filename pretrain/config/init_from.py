"""The address of a model that a run begins with. Apart from job.py because readers of such models need it alone."""

from pathlib import Path

SCHEME = "hf:"


def folder_of(init_from: str) -> Path:
    """ValueError unless it is hf:DIR."""
    if not init_from.startswith(SCHEME) or init_from == SCHEME:
        raise ValueError(f"init_from={init_from} must be hf:DIR, the folder of a Hugging Face model")
    return Path(init_from.removeprefix(SCHEME))
