"""Compiles the Triton kernels of the loss for GPUs that are not here, just as the loss launches them.

    python -m tests.pretrain.vocab.compiled      prints a line of JSON for each kernel

The loss runs on fake tensors. Instead of a launch, Triton compiles the kernel for the very arguments: constants, dtypes
and alignments. Triton brings ptxas and cuobjdump; no CUDA is needed. It is a command, because other tests let Triton
interpret the kernels, which is decided when Triton is imported.
"""

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface, MockTensor

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.checks import checks_skipped
from pretrain.vocab.kernels.base import accurate_dtype
from pretrain.vocab.kernels.triton import TritonKernels
from tests.fake_cuda import CUDA, fake_gpus

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Shape(NamedTuple):
    tokens: int
    width: int
    rows: int
    dtype: torch.dtype


LARGE = Shape(2048, 4096, 128_256, torch.bfloat16)  # a rank of 8 has the same kernels
ODD = Shape(1000, 768, 50_257, torch.bfloat16)
FP32 = Shape(1024, 1024, 50_257, torch.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "training": {"metrics": False},
    "metrics": {"metrics": True},
    "evaluation": {"metrics": False},
    "softcap": {"metrics": False, "softcap": 30.0},
    "smoothed softcap": {"metrics": False, "softcap": 30.0, "label_smoothing": 0.1},
}
CASES = [  # what differs between GPUs, and what differs between sizes, once
    *((sm, LARGE, option) for sm in (80, 90, 100) for option in ("training", "softcap")),
    *((90, LARGE, option) for option in ("smoothed softcap", "metrics", "evaluation")),
    *((90, shape, "training") for shape in (ODD, FP32)),
]


@dataclass(frozen=True)
class Compiled:
    kernel: str
    sm: int
    option: str
    dtype: str
    threads: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread in local memory
    accesses: list[str]  # kinds of loads and stores of global memory


class Address(MockTensor):
    """A fake tensor for Triton: it asks for the dtype, and whether the address is a multiple of 16 bytes."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype)
        self.address = tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:  # type: ignore[override]
        return self.address


@contextlib.contextmanager
def compiling(sm: int) -> Iterator[list[tuple[str, Any]]]:
    """Compiles kernels for `sm` where they would be launched; the list gets their names and what was compiled."""
    made: list[tuple[str, Any]] = []
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
        get_current_device=lambda: sm,  # Triton keeps compiled kernels by device
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 99 * 2**10}),
    )

    def launch(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            given = [Address(arg) if isinstance(arg, Tensor) else arg for arg in args]
            made.append((kernel.fn.__name__, kernel.run(*given, grid=grid, warmup=True, **kwargs)))

        return run

    with mock.patch.object(KernelInterface, "__getitem__", launch), mock.patch.object(driver, "_active", device):
        yield made


def compiled(sm: int, shape: Shape, option: str) -> Iterator[Compiled]:
    """Yields the kernels that one call of the loss launches, forward and backward."""
    m, D, v, dtype = shape
    with compiling(sm) as made, FakeTensorMode(), checks_skipped():
        hidden_mD = torch.empty(m, D, dtype=dtype, device=CUDA, requires_grad=True)
        weight_vD = torch.empty(v, D, device=CUDA)
        targets_m = torch.empty(m, dtype=torch.int64, device=CUDA)
        with torch.set_grad_enabled(option != "evaluation"):
            out = vocab_parallel_linear_cross_entropy(
                hidden_mD,
                weight_vD,
                targets_m,
                shard=VocabShard.of(0, 1, v, 1),
                main_grad_vD=torch.empty(v, D, dtype=accurate_dtype(dtype), device=CUDA),
                kernels=TritonKernels(),
                **OPTIONS[option],
            )
    assert out.loss.is_cuda
    for name, kernel in {kernel.hash: (name, kernel) for name, kernel in made}.values():
        registers, spilled = resources(kernel.asm["cubin"])
        accesses = sorted(set(re.findall(r"(?:ld|st)\.global[\w.:]*", kernel.asm["ptx"])))
        threads = 32 * kernel.metadata.num_warps
        yield Compiled(name, sm, option, str(dtype), threads, registers, spilled, accesses)


def resources(cubin: bytes) -> tuple[int, int]:
    """Returns registers, and bytes of local memory, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def main() -> None:
    with fake_gpus(1):
        for case in CASES:
            for one in compiled(*case):
                print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    main()
