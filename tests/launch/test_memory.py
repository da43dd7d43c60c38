"""Out of memory on one rank: the run ends, and names settings that need less."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.restart import Decision, RestartConfig, decide
from launch.supervisor import Supervisor
from pretrain.exits import Exit
from pretrain.memory import OutOfMemory, shortage_named
from pretrain.stops import StopRequests
from tests.pretrain.tiny import tiny_config, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.micro_batch=4"
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of"
    " which 1.25 GiB is free."
    " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF."
)
HELP = "To need less: train.micro_batch=2, or engine.activation_checkpointing=block, or vocab.parallel=2"
FAULTS = {
    "GPU": (f"torch.OutOfMemoryError({CUDA!r})", "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"),
    "host": (
        "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 4294967296 bytes.')",
        "the host is out of memory: tried to allocate 4.00 GiB; ",
    ),
    "Python": ("MemoryError()", "the host is out of memory: an allocation failed; "),
}


def short_of_memory(folder: Path, error: str) -> dict[str, str]:
    """Returns an environment in which rank 1 gets this error for its weights, and then hangs in Python's shutdown."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import atexit, time, torch\n"
        f"    def fails(*args, **kwargs):\n        raise {error}\n"
        "    torch.nn.Module.to_empty = fails\n    atexit.register(time.sleep, 300)\n"
    )
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_shortage_names_settings_that_need_less(tmp_path, fault):
    error, message = FAULTS[fault]
    config = tiny_config(tmp_path, tmp_path / "run", train__global_batch=8, train__micro_batch=4)
    mesh = SimpleNamespace(device=torch.device("cpu"), world=2, replicas=2)
    with pytest.raises(OutOfMemory) as caught, shortage_named(config, mesh):
        raise eval(error)
    said = str(caught.value)
    assert message in said and "If reserved" not in said and said.endswith(f". {HELP}")


def test_out_of_memory_ends_the_run_and_names_what_would_help(tmp_path):
    error, message = FAULTS["GPU"]
    data, run = write_tokens(tmp_path / "tokens"), tmp_path / "run"
    command = f"launch/local.py nproc=2 data.path={data} vocab.size=307 run.dir={run} vocab.parallel=1 {SMALL}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=short_of_memory(tmp_path / "site", error),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error on rank 1: ")]
    assert message in line and "If reserved" not in line
    assert line.endswith(f". {HELP}")
    (end,) = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    assert (end["class"], end["rank"], end["decision"]) == ("OUT_OF_MEMORY", 1, "give up")
    assert end["why"] == "the same settings would run out of memory again" and message in end["last"]


def test_out_of_memory_after_progress_starts_again():
    policy = RestartConfig()
    assert decide(Exit.of(7), True, 0, policy)[0] is Decision.RESTART
    assert decide(Exit.of(7), False, 1, policy)[0] is Decision.GIVE_UP


@pytest.mark.parametrize("given", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_ranks_have_expandable_segments_unless_the_user_set_the_allocator(tmp_path, given):
    keys = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in keys}
    environment |= {given: "backend:native"} if given else {}
    code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(str([os.environ.get(key) for key in {keys}]))"
    Supervisor([sys.executable, "-c", code], {0: environment}, StopRequests()).run()
    expected = (
        ["backend:native" if key == given else None for key in keys] if given else ["expandable_segments:True", None]
    )
    assert (tmp_path / "seen").read_text() == str(expected)
