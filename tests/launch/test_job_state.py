"""Reads Slurm's answers about a job."""

import pytest

from launch import job_state
from tests.launch.fake_slurm import SACCT


def test_job_is_alive_until_it_has_ended_or_is_unknown(fake_slurm):
    for state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        fake_slurm.states(state)
        assert job_state.alive("12"), state
    for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"):
        fake_slurm.states(state)
        assert not job_state.alive("12"), state
    fake_slurm.forget()
    assert job_state.state("12") is None and not job_state.alive("12")


def test_unanswered_squeue_is_an_error(fake_slurm):
    fake_slurm.command("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(OSError, match=r"squeue failed for job 12: .*Unable to contact"):
        job_state.alive("12")


@pytest.mark.parametrize(
    "state,code,ours",
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "2:0", 2),
        ("FAILED", "0:9", 137),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 1),
        ("NODE_FAIL", "0:0", 1),
    ],
)
def test_exit_code_of_a_job(fake_slurm, state, code, ours):
    fake_slurm.ended(state, code)
    assert job_state.exit_code("12") == ours


def test_exit_code_of_an_unknown_job_comes_from_sacct(fake_slurm):
    assert job_state.exit_code("12") is None
    fake_slurm.command("sacct", SACCT)
    assert job_state.exit_code("12") is None, "accounts that know nothing of it"
    (fake_slurm.folder / "accounts").write_text("CANCELLED by 0|0:15\n")
    assert job_state.exit_code("12") == 143
    (fake_slurm.folder / "accounts").write_text("COMPLETED|0:0\n")
    assert job_state.exit_code("12") == 0
