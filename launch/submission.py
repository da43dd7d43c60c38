"""A job as Slurm is handed it. Not part of cluster.py, which describes what a job asks of a cluster."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError


@dataclass(frozen=True)
class Job:
    """One job, or an array of them if there are several calls."""

    folder: Path  # of the logs, and of submitit's own files
    python: str  # the command that is Python in the job
    parameters: Mapping[str, Any]  # of submitit's executor
    calls: Sequence[Callable[[], object]]  # what each job runs

    def submit(self) -> list[submitit.Job[object]]:
        """Hands it to Slurm. Raises ValueError with sbatch's own words if it refuses."""
        executor = submitit.SlurmExecutor(self.folder, python=self.python)
        executor.update_parameters(**self.parameters)
        try:
            with _outside_of_jobs(), redirect_stderr(StringIO()):  # on which submitit repeats what is in its error
                return executor.submit_array(self.calls)
        except (FailedJobError, FailedSubmissionError) as error:
            said = re.findall(r"^sbatch: (?:error: )?(.*\S)", str(error), re.MULTILINE) or str(error).splitlines()[:1]
            raise ValueError(f"sbatch refuses the job: {'; '.join(said)}") from error

    def script(self) -> str:
        """Script that `submit` would hand to sbatch, to the letter. Needs no Slurm, and leaves nothing behind."""
        with _without_slurm() as scratch:
            job, *_ = replace(self, folder=scratch).submit()
            return job.paths.submission_file.read_text().replace(str(scratch), str(self.folder))


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Removes the variables of an interactive job, which would be taken for settings of the new one."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


@contextmanager
def _without_slurm() -> Iterator[Path]:
    """Gives a folder for submitit, while an `srun` and an `sbatch` that do nothing stand before the system's."""
    with tempfile.TemporaryDirectory(prefix="rowshard-") as scratch:
        for command in ("srun", "sbatch"):
            path = Path(scratch, command)
            path.write_text("#!/bin/sh\necho Submitted batch job 1\n")
            path.chmod(0o700)
        before = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = os.pathsep.join([scratch, before])
        try:
            yield Path(scratch, "slurm")
        finally:
            os.environ["PATH"] = before
