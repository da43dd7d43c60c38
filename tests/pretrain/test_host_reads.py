"""The host reads device values only through one function, known to the launcher's supervisor."""

import linecache
import sys
from contextlib import ExitStack
from types import FrameType
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.supervisor import _waits_for_a_peer as waits_for_a_peer
from pretrain.config.job import JobConfig
from pretrain.vocab.collectives import on_host
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import tiny_config, train_rank
from tests.ranks import run_ranks

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
ON_THE_HOST = {  # these functions read host tensors, or run on CPUs only
    "add_weight_gradient",
    "clamp",
    "copies",
    "frequency_bins",
    "init_device_mesh",
    "of",
    "plan_lookup",
    "_sums",
    "violated",
    "_top",  # has just waited in `on_host`
}


class ReadsElsewhere(TorchDispatchMode):
    """Lines of pretrain that wait for the device in this thread, outside `on_host`.

    All tensors here are on a CPU. A tensor counts as a host tensor if it is a result of `on_host`, or was computed only
    from host tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()
        self.hosts: dict[int, torch.UntypedStorage] = {}  # kept alive so that no address is reused

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._keep(tensor.detach().clone())

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.hosts[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def _of_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.hosts

    def check(self, tensor: torch.Tensor, frame: FrameType | None) -> None:
        """Records a read. frame: of the reading function."""
        while frame is not None and "/torch/_" in frame.f_code.co_filename:  # wrappers of this mode
            frame = frame.f_back
        assert frame is not None
        path, number, function = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        known = waits_for_a_peer(path, str(number), function) or self._of_host(tensor) or function in ON_THE_HOST
        if not known and "/torch/optim/" not in path:  # torch.optim counts steps on the host
            self.lines.add(f"{path}:{number}: {linecache.getline(path, number).strip()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [index for index in args[1] if index is not None] if func is aten.index.Tensor else []
        if func in READS or any(mask.dtype == torch.bool for mask in masks):
            self.check(args[0], sys._getframe(1))
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given and all(map(self._of_host, given)):
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._keep(leaf)
        return out


def reads_of_training(rank: int, world: int, config: JobConfig) -> set[str]:
    reads, tolist = ReadsElsewhere(), torch.Tensor.tolist

    def checked_tolist(tensor: torch.Tensor) -> list:
        reads.check(tensor, sys._getframe(1))
        return tolist(tensor)

    users = [
        module for name, module in sys.modules.items() if name.startswith("pretrain.") and hasattr(module, "on_host")
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "on_host", reads.on_host))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", checked_tolist))
        stack.enter_context(reads)
        train_rank(rank, world, config)
    return reads.lines


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_training_reads_the_device_through_one_function(tmp_path, engine):
    """Trains with evaluation, saves and all monitors."""
    changes = {
        "vocab__size": None,
        "vocab__untie_at": 2,
        "engine__name": engine,
        "train__steps": 3,
        "eval__every": 2,
        "checkpoint__every": 2,
        "monitor": {"embedding_every": 1, "lens_every": 2},
    }
    config = tiny_config(make_corpus(tmp_path / "corpus"), tmp_path / "run", **changes)
    assert run_ranks(2, reads_of_training, config) == [set(), set()]


def test_on_host_keeps_values():
    assert on_host(torch.arange(3)).tolist() == [0, 1, 2]
