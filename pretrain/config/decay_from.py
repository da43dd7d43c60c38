"""Address of the checkpoint that a decay starts from. Separate from job.py, as init_from.py is."""

import re
from pathlib import Path


def step_decayed(decay_from: str) -> int:
    """Returns the step of RUN/checkpoints/step-STEP. Raises ValueError if the address has another form."""
    found = re.fullmatch(r"step-(\d+)", Path(decay_from).name)
    if found is None:
        raise ValueError(f"decay_from={decay_from} must be a checkpoint, such as runs/a/checkpoints/step-00000500")
    return int(found[1])
