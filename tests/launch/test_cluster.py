"""Settings of a cluster, and the job that they make."""

from pathlib import Path

import pytest

from launch.cluster import ClusterConfig

GPUS = {"gpus_per_node": 8, "gpu": "h100", "time": "1:00:00"}


def test_ranks_default_to_one_per_gpu_or_node():
    assert ClusterConfig(**GPUS, nodes=4).ranks == 32
    assert ClusterConfig(**GPUS, nodes=4, tasks_per_node=2).ranks == 8
    assert ClusterConfig(time="1:00:00", nodes=3).ranks == 3
    assert ClusterConfig(time="1:00:00", nodes=3, tasks_per_node=2).ranks == 6


@pytest.mark.parametrize(
    "time,minutes", [("0:10:00", 10), ("2:30:00", 150), ("1-12:00:00", 2160), ("0:10:01", 11), ("100:00:00", 6000)]
)
def test_time_is_rounded_up_to_minutes(time, minutes):
    assert ClusterConfig(time=time, warn_seconds=30).minutes == minutes


def given(changes: dict) -> dict:
    return ClusterConfig(**{"time": "1:00:00"} | changes).parameters("name", ["last"], [Path("/run")])


def test_settings_reach_sbatch_and_srun():
    told = given(GPUS | {"partition": "train", "exclude": "n3", "warn_seconds": 90, "setup": ["module load cuda"]})
    assert told["partition"] == "train" and told["exclude"] == "n3" and told["mem"] == "0" and told["time"] == 60
    assert told["setup"] == ["module load cuda", "export OMP_NUM_THREADS=1", "last"]
    assert told["additional_parameters"] == {"gres": "gpu:8", "signal": "USR1@90", "requeue": True}
    assert told["srun_args"] == ["--kill-on-bad-exit=1", "--cpus-per-task=1"]


def test_sbatch_options_are_passed_and_override():
    keys = {"gres": "gpu:h100:8", "mail_type": "END", "exclusive": True, "contiguous": False}
    told = given(GPUS | {"sbatch": keys, "requeue": False})["additional_parameters"]
    assert told == {
        **{"gres": "gpu:h100:8", "mail-type": "END", "exclusive": True},
        **{"signal": "USR1@120", "no-requeue": True},
    }


def test_the_environment_is_quoted_and_may_set_threads():
    told = given({"cpus_per_task": 4, "environment": {"OMP_NUM_THREADS": "2", "NCCL_SOCKET_IFNAME": "ib0 ib1"}})
    assert told["setup"] == ["export OMP_NUM_THREADS=2", "export NCCL_SOCKET_IFNAME='ib0 ib1'", "last"]


def test_container_mounts_the_run_and_uses_its_own_python():
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
    "GPUs of no name": ({"gpus_per_node": 8}, "cluster.gpu=null must be one of a100-40gb, a100-80gb"),
    "GPUs of an unknown name": (GPUS | {"gpu": "b900"}, "cluster.gpu=b900 must be one of a100-40gb, a100-80gb"),
    "a CPU as GPU": (GPUS | {"gpu": "cpu"}, "cluster.gpu=cpu must be one of a100-40gb, a100-80gb"),
    "a GPU where there are none": ({"gpu": "h100"}, "cluster.gpu=h100 must be null"),
    "more ranks than GPUs": (GPUS | {"tasks_per_node": 9}, "cluster.tasks_per_node=9 must not exceed"),
    "memory in words": ({"memory": "all"}, "cluster.memory=all must be a size such as 400G"),
    "an empty partition": ({"partition": ""}, "cluster.partition= must not be empty"),
    "mounts of no container": ({"mounts": ["/a:/a"]}, "need a container: set cluster.container"),
    "a variable of no name": ({"environment": {"A B": "1"}}, "cluster.environment.A B is not a valid variable name"),
    "a key that is ours": (
        {"sbatch": {"ntasks_per_node": 2}},
        "cluster.sbatch.ntasks-per-node cannot be set: use",
    ),
    "a list for sbatch": ({"sbatch": {"mail-type": ["END"]}}, "cluster.sbatch.mail-type=['END'] must be a word"),
    "no key of sbatch": ({"sbatch": {"-N": 2}}, "cluster.sbatch.-N is not an sbatch option"),
}


@pytest.mark.parametrize("changes,message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_named_with_its_rule(changes, message):
    with pytest.raises(ValueError) as caught:
        ClusterConfig(**{"time": "1:00:00"} | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
