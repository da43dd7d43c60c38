"""What a cluster is asked for, and what is made of Slurm's answers."""

from pathlib import Path

import pytest

from launch import cluster
from launch.cluster import ClusterConfig
from tests.launch.fake_slurm import SACCT

GPUS = {"gpus_per_node": 8, "gpu": "h100", "time": "1:00:00"}


def test_ranks_are_one_a_gpu_or_one_a_node_unless_said():
    assert ClusterConfig(**GPUS, nodes=4).ranks == 32
    assert ClusterConfig(**GPUS, nodes=4, tasks_per_node=2).ranks == 8
    assert ClusterConfig(time="1:00:00", nodes=3).ranks == 3
    assert ClusterConfig(time="1:00:00", nodes=3, tasks_per_node=2).ranks == 6


@pytest.mark.parametrize(
    "time,minutes", [("0:10:00", 10), ("2:30:00", 150), ("1-12:00:00", 2160), ("0:10:01", 11), ("100:00:00", 6000)]
)
def test_a_time_is_minutes_rounded_up(time, minutes):
    assert ClusterConfig(time=time, warn_seconds=30).minutes == minutes


def given(changes: dict) -> dict:
    return ClusterConfig(**{"time": "1:00:00"} | changes).parameters("name", ["last"], [Path("/run")])


def test_settings_reach_sbatch_and_srun():
    told = given(GPUS | {"partition": "train", "exclude": "n3", "warn_seconds": 90, "setup": ["module load cuda"]})
    assert told["partition"] == "train" and told["exclude"] == "n3" and told["mem"] == "0" and told["time"] == 60
    assert told["setup"] == ["module load cuda", "export OMP_NUM_THREADS=1", "last"]
    assert told["additional_parameters"] == {"gres": "gpu:8", "signal": "USR1@90", "requeue": True}
    assert told["srun_args"] == ["--kill-on-bad-exit=1", "--cpus-per-task=1"]


def test_keys_of_sbatch_go_through_and_win():
    keys = {"gres": "gpu:h100:8", "mail_type": "END", "exclusive": True, "contiguous": False}
    told = given(GPUS | {"sbatch": keys, "requeue": False})["additional_parameters"]
    assert told == {
        **{"gres": "gpu:h100:8", "mail-type": "END", "exclusive": True},
        **{"signal": "USR1@120", "no-requeue": True},
    }


def test_the_environment_is_quoted_and_may_set_threads():
    told = given({"cpus_per_task": 4, "environment": {"OMP_NUM_THREADS": "2", "NCCL_SOCKET_IFNAME": "ib0 ib1"}})
    assert told["setup"] == ["export OMP_NUM_THREADS=2", "export NCCL_SOCKET_IFNAME='ib0 ib1'", "last"]


def test_a_container_sees_the_run_and_its_own_python():
    config = ClusterConfig(time="1:00:00", container="/images/torch.sqsh", mounts=["/scratch:/scratch"])
    told = config.parameters("name", [], [Path("/run"), Path("/data")])["srun_args"]
    assert told[-2:] == [
        "--container-image=/images/torch.sqsh",
        "--container-mounts=/run:/run,/data:/data,/scratch:/scratch",
    ]
    assert config.task_python == "python3"
    wrapped = ClusterConfig(time="1:00:00", python="apptainer exec --nv torch.sif python")
    assert wrapped.task_python == "apptainer exec --nv torch.sif python"


WRONG = {
    "no nodes": ({"nodes": 0}, "cluster.nodes=0 must be at least 1"),
    "no time": ({"time": ""}, "cluster.time is missing"),
    "a time that YAML has made a number of": ({"time": "14400"}, "cluster.time=14400 must be a time such as 2:30:00"),
    "a time of nothing": ({"time": "0:00:00"}, "cluster.time=0:00:00 must be"),
    "a warning before the start": ({"warn_seconds": 3600}, "cluster.warn_seconds=3600 must be less than cluster.time"),
    "GPUs of no name": ({"gpus_per_node": 8}, "cluster.gpu=None must be one of a100-80gb, h100, h200"),
    "GPUs of an unknown name": (GPUS | {"gpu": "b900"}, "cluster.gpu=b900 must be one of a100-80gb, h100, h200"),
    "a CPU as GPU": (GPUS | {"gpu": "cpu"}, "cluster.gpu=cpu must be one of a100-80gb, h100, h200"),
    "a GPU where there are none": ({"gpu": "h100"}, "cluster.gpu=h100 must be null"),
    "more ranks than GPUs": (GPUS | {"tasks_per_node": 9}, "cluster.tasks_per_node=9 must not exceed"),
    "memory in words": ({"memory": "all"}, "cluster.memory=all must be a size such as 400G"),
    "an empty partition": ({"partition": ""}, "cluster.partition= must not be empty"),
    "mounts of no container": ({"mounts": ["/a:/a"]}, "name it with cluster.container"),
    "a variable of no name": ({"environment": {"A B": "1"}}, "cluster.environment.A B is no name"),
    "a key that is ours": (
        {"sbatch": {"ntasks_per_node": 2}},
        "cluster.sbatch.ntasks-per-node is not to be given: use",
    ),
    "a list for sbatch": ({"sbatch": {"mail-type": ["END"]}}, "cluster.sbatch.mail-type=['END'] must be a word"),
    "no key of sbatch": ({"sbatch": {"-N": 2}}, "cluster.sbatch.-N is no option of sbatch"),
}


@pytest.mark.parametrize("changes,message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_named_with_its_rule(changes, message):
    with pytest.raises(ValueError) as caught:
        ClusterConfig(**{"time": "1:00:00"} | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_job_submitted_from_within_another_is_none_of_its(fake_slurm, tmp_path, monkeypatch):
    fake_slurm.command("sbatch", "env | grep ^S > environment; echo Submitted batch job 12")
    told = given({})
    for variables, passed in (
        ({"SBATCH_ACCOUNT": "ours", "SLURM_CONF": "/etc/slurm.conf"}, {"SBATCH_ACCOUNT", "SLURM_CONF"}),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9"}, {"SLURM_CONF"}),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (job,) = cluster.submit(tmp_path / "slurm", "python3", told, [int])
        environment = (fake_slurm.folder / "environment").read_text().splitlines()
        assert job.job_id == "12"
        assert {line.split("=")[0] for line in environment if line.startswith(("SLURM_", "SBATCH_"))} == passed


def test_a_job_lives_until_it_has_ended_or_is_forgotten(fake_slurm):
    for state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        fake_slurm.states(state)
        assert cluster.alive("12"), state
    for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"):
        fake_slurm.states(state)
        assert not cluster.alive("12"), state
    fake_slurm.forget()
    assert cluster.state("12") is None and not cluster.alive("12")


def test_a_slurm_that_does_not_answer_is_an_error(fake_slurm):
    fake_slurm.command("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(OSError, match=r"job 12 does: .*Unable to contact"):
        cluster.alive("12")


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
def test_how_a_job_has_ended(fake_slurm, state, code, ours):
    fake_slurm.ended(state, code)
    assert cluster.exit_code("12") == ours


def test_a_forgotten_job_is_asked_of_the_accounts_where_there_are_any(fake_slurm):
    assert cluster.exit_code("12") is None
    fake_slurm.command("sacct", SACCT)
    assert cluster.exit_code("12") is None, "accounts that know nothing of it"
    (fake_slurm.folder / "accounts").write_text("CANCELLED by 0|0:15\n")
    assert cluster.exit_code("12") == 143
    (fake_slurm.folder / "accounts").write_text("COMPLETED|0:0\n")
    assert cluster.exit_code("12") == 0
