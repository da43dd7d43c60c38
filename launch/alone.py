"""Refuses to run once per rank: a launcher starts the ranks itself. Imports nothing heavy."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.command import fail

STARTERS = {  # programs that start one process per rank, and the variable that holds how many
    "torchrun": "WORLD_SIZE",
    "torch.distributed.run": "WORLD_SIZE",
    "torch.distributed.launch": "WORLD_SIZE",
    "accelerate": "WORLD_SIZE",
    "deepspeed.launcher.launch": "WORLD_SIZE",
    "slurmstepd": "SLURM_STEP_NUM_TASKS",  # unset in a batch script, which runs once
    "orted": "OMPI_COMM_WORLD_SIZE",
    "prted": "OMPI_COMM_WORLD_SIZE",
    "mpirun": "OMPI_COMM_WORLD_SIZE",
    "hydra_pmi_proxy": "PMI_SIZE",
}


def alone() -> None:
    """Exits with 2 and one line if this is one of several processes started by torchrun, srun or mpirun.

    Variables are not enough, because a shell may have inherited them: the starter must also be an ancestor.
    """
    if "SLURM_PTY_PORT" in os.environ:  # an interactive shell, in one task
        return
    for command in _ancestors():
        names = {Path(word).name for word in command[:3]} | {word.rstrip(":") for word in command[:4]}
        for starter in STARTERS.keys() & names:
            count = os.environ.get(STARTERS[starter], "")
            if count.isdecimal() and int(count) > 1:
                said = f"{starter} has started this program {count} times: start it once, without {starter}"
                sys.exit(fail(f"{said}; it starts the ranks itself"))


def _ancestors() -> Iterator[list[str]]:
    """Yields the command lines of the ancestors, the parent's first; nothing if the system hides them."""
    process = os.getppid()
    try:
        while process:
            yield Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
            status = Path(f"/proc/{process}/status").read_text(errors="replace")
            found = re.search(r"^PPid:\t(\d+)", status, re.MULTILINE)
            process = int(found[1]) if found else 0
    except OSError:
        return
