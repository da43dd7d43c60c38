"""launch/site.py: the Python that cluster.setup activates, and partitions that can never start a job."""

import sys
from pathlib import Path

import pytest

from launch import site
from launch.cluster import ClusterConfig

PARTITIONS = """
    echo "PartitionName=debug AllowQos=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=2"
    echo "PartitionName=gpu AllowQos=ALL Default=NO MaxNodes=8 MaxTime=1-00:00:00 State=UP TotalNodes=20"
"""
# Like the real one, sinfo refuses --all beside --partition.
GRES = 'case "$*" in *--all*) exit 1; esac; echo "16|gpu:h100:4(S:0-1),nvme:1"; echo "4|gpu:h100:8"'


def cluster(**changes):
    return ClusterConfig(**{"time": "1:00:00"} | changes)


def gpus(each, **changes):
    return cluster(gpus_per_node=each, gpu="h100", partition="gpu", **changes)


IMPOSSIBLE = {
    "nodes": (cluster(nodes=4), "cluster.nodes=4 must be at most 2: partition debug has no more nodes"),
    "nodes by name": (cluster(nodes=21, partition="gpu"), "cluster.nodes=21 must be at most 20: partition gpu"),
    "in none of several": (cluster(nodes=21, partition="debug,gpu"), "cluster.nodes=21 must be at most 2"),
    "MaxNodes": (cluster(nodes=9, partition="gpu"), "cluster.nodes=9 must be at most 8: MaxNodes of partition gpu"),
    "MaxTime": (
        cluster(time="1-00:00:01", partition="gpu"),
        "cluster.time=1-00:00:01 must be at most 1-00:00:00: MaxTime of partition gpu",
    ),
    "no such partition": (cluster(partition="gpus"), "cluster.partition=gpus: gpus must be one of debug, gpu"),
    "GPUs of a node": (gpus(9), "cluster.gpus_per_node=9 must be at most 8: no node of partition gpu has more"),
    "nodes with these GPUs": (
        gpus(8, nodes=5),
        "cluster.nodes=5 must be at most 4: partition gpu has no more nodes with 8 GPUs",
    ),
}


@pytest.mark.parametrize("asked,message", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_job_that_can_never_start_is_refused(fake_slurm, asked, message):
    fake_slurm.command("scontrol", PARTITIONS)
    fake_slurm.command("sinfo", GRES)
    with pytest.raises(ValueError) as refused:
        site.check(asked, dry_run=False)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "asked",
    [
        cluster(nodes=2),
        cluster(nodes=8, partition="debug,gpu", time="1-00:00:00"),
        gpus(8, nodes=4),
        gpus(4, nodes=8),
        cluster(nodes=99, sbatch={"clusters": "other"}),
    ],
)
def test_a_job_that_can_start_is_left_alone(fake_slurm, capsys, asked):
    fake_slurm.command("scontrol", PARTITIONS)
    fake_slurm.command("sinfo", GRES)
    site.check(asked, dry_run=False)
    assert capsys.readouterr().err == ""


def test_nodes_that_sinfo_hides_may_have_the_gpus(fake_slurm):
    """Cloud nodes are hidden while they are off."""
    fake_slurm.command("scontrol", PARTITIONS)
    fake_slurm.command("sinfo", 'echo "4|gpu:h100:8"')
    site.check(gpus(8, nodes=5), dry_run=False)


def test_a_limit_that_a_qos_may_lift_is_a_warning(fake_slurm, capsys):
    fake_slurm.command("scontrol", PARTITIONS)
    site.check(cluster(nodes=9, partition="gpu", qos="long"), dry_run=False)
    assert "warning: cluster.nodes=9 must be at most 8: MaxNodes of partition gpu, unless" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["exit 1", "echo slurm is confused", "echo PartitionName=debug Default=YES", None])
def test_unreadable_answer_of_slurm_refuses_no_job(fake_slurm, capsys, answer):
    if answer is None:
        (fake_slurm.folder / "scontrol").unlink()
    else:
        fake_slurm.command("scontrol", answer)
    site.check(cluster(nodes=99), dry_run=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line",
    [
        "source /shared/env/bin/activate",
        ". '/shared/env/bin/activate'",
        "cd /shared && source env/bin/activate",
        "conda activate train",
        "micromamba activate train",
        "module load cuda/12 python/3.11",
    ],
)
def test_setup_that_does_not_change_python_has_a_warning(capsys, line):
    site.check(cluster(setup=["module load cuda", line]), dry_run=True)
    warned = capsys.readouterr().err
    assert len(warned.splitlines()) == 1 and f"`{line}`" in warned
    assert f"it runs {sys.executable}; set cluster.python=python" in warned
    site.check(cluster(setup=[line], container="image.sqsh"), dry_run=True)
    assert "it runs python3 of the container" in capsys.readouterr().err


def test_effective_setup_has_no_warning(capsys):
    own = f"source {Path(sys.executable).parent}/activate"
    site.check(cluster(setup=[own, "module load cuda nccl", "export A=activate"]), dry_run=True)
    site.check(cluster(setup=["source /shared/env/bin/activate"], python="python"), dry_run=True)
    assert capsys.readouterr().err == ""
