"""Capabilities of GPUs, CPU cores and their links, by name. Peaks are the makers' figures; a plan assumes half."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrain.peaks import PEAKS

if TYPE_CHECKING:
    from pretrain.placement import Machine

GB = 10**9
GIB = 2**30
ATTAINED = 0.5  # share of each peak that a plan assumes; for comparisons, not measured


@dataclass(frozen=True)
class Hardware:
    """Device of one rank, and its links."""

    device: str  # torch's device type
    memory: int  # bytes
    reserved: int  # bytes for the driver, NCCL's buffers and the allocator's gaps
    bf16: bool  # native support
    flops_bf16: float  # peak of its matmuls, per second
    flops_fp32: float
    bandwidth: float  # of its memory, bytes/s
    near: float  # of its links within a node, one way, bytes/s
    far: float  # of its links to other nodes, one way, bytes/s

    def machine(self, world: int, node: int, itemsize: int) -> "Machine":
        """Builds the rates that a plan assumes for `world` ranks, `node` of them per node."""
        from pretrain.placement import Machine  # needs torch

        return Machine(
            world,
            node,
            flops=ATTAINED * (self.flops_bf16 if itemsize == 2 else self.flops_fp32),
            memory=ATTAINED * self.bandwidth,
            near=ATTAINED * self.near,
            far=ATTAINED * self.far,
            overlaps=self.device == "cuda",
        )


PCIE_4 = 32 * GB  # of 16 lanes, one way: cards without NVLink

# far: network cards of 200 Gbit/s per GPU (A100, L40S) or 400, and of 25 in a workstation: assumed
HARDWARE = {
    "a100-40gb": Hardware("cuda", 39 * GIB, 3 * GIB, True, *PEAKS["A100"], 1555 * GB, 300 * GB, 25 * GB),
    "a100-80gb": Hardware("cuda", 79 * GIB, 3 * GIB, True, *PEAKS["A100"], 2039 * GB, 300 * GB, 25 * GB),
    "h100": Hardware("cuda", 79 * GIB, 3 * GIB, True, *PEAKS["H100"], 3350 * GB, 450 * GB, 50 * GB),
    "h200": Hardware("cuda", 140 * GIB, 3 * GIB, True, *PEAKS["H200"], 4800 * GB, 450 * GB, 50 * GB),
    "gh200": Hardware("cuda", 94 * GIB, 3 * GIB, True, *PEAKS["GH200"], 4000 * GB, 450 * GB, 50 * GB),  # of 96 GB
    "b200": Hardware("cuda", 178 * GIB, 3 * GIB, True, *PEAKS["B200"], 7700 * GB, 900 * GB, 50 * GB),
    "l40s": Hardware("cuda", 44 * GIB, 3 * GIB, True, *PEAKS["L40S"], 864 * GB, PCIE_4, 25 * GB),
    "rtx-6000-ada": Hardware("cuda", 47 * GIB, 3 * GIB, True, *PEAKS["RTX 6000 Ada"], 960 * GB, PCIE_4, 3 * GB),
    "rtx-4090": Hardware("cuda", 23 * GIB, 3 * GIB, True, *PEAKS["RTX 4090"], 1008 * GB, PCIE_4, 3 * GB),
    "cpu": Hardware("cpu", 16 * GIB, GIB, True, 2e11, 1e11, 10 * GB, 2 * GB, 2 * GB),  # a core with AVX-512 bf16
}
