"""Submits jobs to Slurm. Not part of cluster.py, which describes what a job requests."""

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

    folder: Path  # for logs and submitit's files
    python: str  # Python's command in the job
    parameters: Mapping[str, Any]  # for submitit's executor
    calls: Sequence[Callable[[], object]]  # what each job runs

    def submit(self) -> list[submitit.Job[object]]:
        """Submits to Slurm. Raises ValueError with sbatch's message if it refuses."""
        executor = submitit.SlurmExecutor(self.folder, python=self.python)
        executor.update_parameters(**self.parameters)
        try:
            with _outside_of_jobs(), redirect_stderr(StringIO()):  # submitit prints there what its error repeats
                return executor.submit_array(self.calls)
        except (FailedJobError, FailedSubmissionError) as error:
            said = re.findall(r"^sbatch: (?:error: )?(.*\S)", str(error), re.MULTILINE) or str(error).splitlines()[:1]
            raise ValueError(f"sbatch refuses the job: {'; '.join(said)}") from error

    def script(self) -> str:
        """Returns exactly the script that `submit` would pass to sbatch. Needs no Slurm and leaves no files."""
        with _without_slurm() as scratch:
            job, *_ = replace(self, folder=scratch).submit()
            return job.paths.submission_file.read_text().replace(str(scratch), str(self.folder))


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Removes the variables of an interactive job: sbatch would read them as settings of the new job."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


@contextmanager
def _without_slurm() -> Iterator[Path]:
    """Yields a folder for submitit. Meanwhile PATH begins with an `srun` and an `sbatch` that do nothing."""
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
