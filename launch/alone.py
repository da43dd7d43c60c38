"""Refuses to be started once per rank: a launcher starts the ranks itself. Imports nothing heavy."""

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
    """Exits 2 with one line if this is one of several processes of torchrun, srun or mpirun.

    Variables alone do not tell: a shell may have them from elsewhere. So the starter must be an ancestor.
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
    """Their command lines, the parent's first; none if the system does not say."""
    process = os.getppid()
    try:
        while process:
            yield Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
            status = Path(f"/proc/{process}/status").read_text(errors="replace")
            found = re.search(r"^PPid:\t(\d+)", status, re.MULTILINE)
            process = int(found[1]) if found else 0
    except OSError:
        return
