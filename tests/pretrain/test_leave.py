"""Exit of a rank while gloo's threads still hold tensors."""

import subprocess
import sys
from socket import socket

import pytest

RANK = """
import atexit, sys
import torch
import torch.distributed as dist
from pretrain.exits import leave

def work():
    global group  # as objects of a training may outlive it
    dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
    group = dist.new_group(backend="gloo")
    dist.barrier()
    atexit.register(print, "at exit")
    for _ in range(200):
        dist.all_reduce(torch.ones(200_000), group=group, async_op=True)
    dist.destroy_process_group()
    print("done", end="; ")
"""


def exit_codes(script):
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, address, str(rank)], text=True, stdout=-1, stderr=-1)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said


def test_pending_collectives_do_not_abort_finished_rank():
    codes, said = exit_codes(RANK + "\nleave(work)")
    assert codes == [0, 0] and said == [("done; at exit\n", "")] * 2


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(75)", 75, ("at exit\n", "")),
        ("sys.exit(2)", 2, ("", "")),
        ("sys.exit('error: no')", 1, ("", "error: no\n")),
        ("1 / 0", 1, ("", "ZeroDivisionError: division by zero\n")),
    ],
)
def test_exit_code_and_output_match_main(end, code, said):
    script = "import atexit, sys\nfrom pretrain.exits import leave\natexit.register(print, 'at exit')\n"
    script += f"def work():\n    {end}\nleave(work)"
    ended = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60)
    assert ended.returncode == code and ended.stdout == said[0] and ended.stderr.endswith(said[1])
