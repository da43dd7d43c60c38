"""Address of the model that a run starts from. Separate from job.py because some programs read only models."""

from pathlib import Path

SCHEME = "hf:"


def folder_of(init_from: str) -> Path:
    """Returns DIR of hf:DIR. Raises ValueError if it has another form."""
    if not init_from.startswith(SCHEME) or init_from == SCHEME:
        raise ValueError(f"init_from={init_from} must be hf:DIR, the folder of a Hugging Face model")
    return Path(init_from.removeprefix(SCHEME))
