"""Faults of a run on a real cluster of two nodes; docs/reliability.md has the results.

After each fault the run resumes by itself, and ends with the losses and weights of a run without faults, bit for bit.
The tests only shorten the two minutes for which Slurm holds a requeued job.
"""

import shutil
import subprocess

import pytest

from tests.pretrain.tiny import write_tokens
from tests.reliability import compare, metrics
from tests.slurm.jobs import PATIENCE, RANKS, STEPS, TRAINING, Job, command, frozen, signal_waits


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """Trains on this machine alone, without Slurm."""
    run = tmp_path_factory.mktemp("straight") / "run"
    command(f"launch/local.py nproc={RANKS} data.path={data} run.dir={run} {TRAINING}")
    return run


def told(job):
    """Returns how each start of the run ended, and the decision."""
    return [(line["class"], line["decision"]) for line in job.restarts]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here: the full disk is not tried")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def submit(slurm, data, tmp_path):
    """Submits a run. At the end cancels its job and prints its logs, which pytest shows after a failure."""
    jobs = []

    def submit(settings="", flags="", cluster=slurm, run=tmp_path / "run"):
        jobs.append(Job(cluster, data, run, settings, flags))
        return jobs[-1]

    yield submit
    for job in jobs:
        print(job.logs())
        job.slurm.call("scancel", "--quiet", job.id)


def test_job_equals_a_local_run(submit, straight):
    job = submit("tail=true")
    assert f"step {STEPS}/{STEPS}" in job.said, "tail=true shows the log, and returns when the job has ended"
    assert job.end() == "COMPLETED" and told(job) == [("FINISHED", "done")]
    compare(job.run, straight, STEPS)
    job.slurm.wait_until(lambda: job.slurm.call("sacct", "-nXPj", job.id, "-o", "State").split() == ["COMPLETED"])


def test_stop_requests(submit, straight):
    """Stops the run by hand, by preemption and near the time limit. Each time it is saved, requeued and resumed."""
    job = submit("cluster.partition=low cluster.warn_seconds=90")
    job.train_on()
    job.slurm.call("scancel", "--signal=USR1", job.id)
    job.wait_for_requeue()
    job.go_on()

    job.train_on()
    job.slurm.call("sbatch", "-p", "high", f"-N{RANKS}", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job.wait_for_requeue()
    job.go_on()

    job.train_on()
    with frozen(job.ranks()):  # Slurm looks every half minute whom to warn
        job.slurm.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=2")
        job.slurm.wait_until(lambda: all(map(signal_waits, job.ranks())))
    job.wait_for_requeue()
    job.slurm.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.go_on()

    assert job.end() == "COMPLETED"
    assert told(job) == [("STOPPED", "restart")] * 3 + [("FINISHED", "done")]
    compare(job.run, straight, STEPS)


def test_lost_nodes(submit, straight):
    """Slurm requeues the job by itself, both times. The batch script runs on n1, and is lost with it."""
    job = submit()
    for node in ("n1", "n2"):
        job.train_on()
        job.slurm.lose_node(node)
        job.wait_for_requeue()
        job.slurm.start_node(node)
        job.go_on()
    assert job.end() == "COMPLETED"
    assert told(job) == [("KILLED", "left to Slurm")] * 2 + [("FINISHED", "done")]
    assert [line["host"] for line in job.restarts[:2]] == ["n1", "n2"]
    compare(job.run, straight, STEPS)


def test_killed_rank_resumes_on_another_node(submit, straight):
    job = submit(f"cluster.nodes=1 cluster.tasks_per_node={RANKS}")
    job.train_on()
    job.ranks()[1].kill()
    job.wait_for_requeue()
    job.go_on()
    assert job.end() == "COMPLETED"
    assert told(job) == [("KILLED", "restart"), ("FINISHED", "done")]
    assert [line["host"] for line in job.restarts] == ["n1", "n2"] and "n1 is excluded" in job.restarts[0]["why"]
    compare(job.run, straight, STEPS)


def fill(disk, leaving):
    """Again where a save has taken some room meanwhile."""
    for _ in range(20):
        try:
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - leaving))
            return
        except OSError:
            (disk / "filler").unlink()
    raise AssertionError(f"{disk} cannot be filled")


def test_a_rank_that_hangs_then_a_full_disk(small_disk, submit, straight):
    job = submit("train.hang_timeout=15", run=small_disk / "run")
    job.train_on()
    with frozen(job.ranks()[1:]):
        job.wait_for_requeue()
    job.go_on()
    job.train_on()
    fill(small_disk, leaving=100_000)  # enough for a few lines, too little for a checkpoint
    job.wait_for_requeue()
    (small_disk / "filler").unlink()
    job.go_on()
    assert job.end() == "COMPLETED"
    assert told(job) == [("HUNG", "restart"), ("UNSAVED", "restart"), ("FINISHED", "done")]
    assert job.restarts[0]["rank"] == 1 and "too few nodes" in job.restarts[0]["why"]
    compare(job.run, straight, STEPS)


def test_cancelled_killed_and_without_accounting(submit, slurm_without_accounting, straight):
    """scancel is final, and the same command goes on. Nothing of it needs sacct."""
    job = submit(cluster=slurm_without_accounting)
    job.train_on()
    job.cancel()
    assert told(job) == [("STOPPED", "left to Slurm")]
    job = submit(cluster=slurm_without_accounting)
    job.train_on()
    job.ranks()[0].kill()
    job.wait_for_requeue()
    job.go_on()
    assert job.end() == "COMPLETED"
    assert told(job)[1:] == [("KILLED", "restart"), ("FINISHED", "done")]
    compare(job.run, straight, STEPS)


def test_a_sweep_is_one_array(submit):
    array = submit("optim.clip=0.5,1.0 vocab.parallel=1 train.stop_after=3 cluster.nodes=1", flags="--multirun")
    runs = [array.run / f"optim.clip-{clip}" for clip in (0.5, 1.0)]
    array.slurm.wait_until(lambda: array.state.split() == ["COMPLETED"] * 2, PATIENCE)
    losses = [[line["loss"] for line in metrics(run)] for run in runs]
    assert losses[0] != losses[1] and [len(loss) for loss in losses] == [3, 3]


def test_ranks_that_do_not_meet_say_why(submit):
    """An interface that does not exist is named, and the job is not requeued for it."""
    job = submit("cluster.environment.GLOO_SOCKET_IFNAME=ib0")
    assert job.end() == "FAILED" and told(job) == [("CANNOT_MEET", "give up")]
    assert job.restarts[0]["last"].endswith("the ranks did not meet: Unable to find address for: ib0")
