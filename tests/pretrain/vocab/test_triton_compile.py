"""The Triton kernels compile for GPUs that are not here, and use their registers and their memory bus well."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Limit(NamedTuple):
    """Registers per thread: 65,536 of them and 2,048 threads are on a processor."""

    training: int
    others: int  # with options that are not in every training step
    wide: tuple[str, ...]  # rows are loaded (ld) or stored (st) 16 bytes at a time


LIMITS = {
    "exponentials": Limit(40, 64, ("ld", "st")),
    "merge": Limit(40, 40, ()),  # a few numbers per token
    "dlogits": Limit(40, 64, ("ld", "st")),
    "target_logits": Limit(40, 40, ("ld",)),
    "scale": Limit(40, 40, ("ld", "st")),
    "add_rows": Limit(80, 80, ("ld", "st")),
}
UNTRAINED = ("metrics", "evaluation")
SPILLED = 64  # bytes per thread, allowed where nothing is trained


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict[str, Any]]:
    """The output of `compiled.py`, a dict for each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.vocab.compiled"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launched_kernel_has_limits(kernels):
    assert {one["sm"] for one in kernels} == {80, 90, 100}
    assert {one["kernel"] for one in kernels} == LIMITS.keys()


def test_training_spills_no_registers(kernels):
    for one in kernels:
        assert one["spilled"] <= (SPILLED if one["option"] in UNTRAINED else 0), one


def test_registers_stay_within_limits(kernels):
    for one in kernels:
        limit = LIMITS[one["kernel"]]
        assert one["registers"] <= (limit.training if one["option"] == "training" else limit.others), one


def test_rows_move_16_bytes_at_a_time(kernels):
    in_training = {one["kernel"] for one in kernels if one["option"] == "training"}
    for one in kernels:
        assert not any(access.endswith("b16") for access in one["accesses"]), one
        every = one["option"] == "training" or one["kernel"] not in in_training  # other options may store no row
        for kind in LIMITS[one["kernel"]].wide if every else LIMITS[one["kernel"]].wide[:1]:
            assert any(access.startswith(kind) and ".v4." in access for access in one["accesses"]), (kind, one)
