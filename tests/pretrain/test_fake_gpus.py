"""A run on fake GPUs: every tensor is on its device, and the host waits for a GPU at known places only.

Not covered: masked documents (`torch.compile`), engine.offload=cpu, DeepSpeed.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from launch.rehearsal import Stage, staged
from pretrain.checkpoint.host_copies import HostCopies
from pretrain.checkpoint.state import HookStates, ModelState, slices
from pretrain.config.evaluation import EvalConfig
from pretrain.data.loader import Batch, BatchLoader, MicroBatch
from pretrain.hooks.base import Run
from pretrain.hooks.embedding import EmbeddingHealth
from pretrain.hooks.evaluation import EvalHook
from pretrain.hooks.lens import LensMonitor
from pretrain.hooks.log import LogHook
from pretrain.hooks.untie import UntieHook
from pretrain.vocab.kernels import choose_kernels
from tests.benchmarks.plan import configured
from tests.fake_cuda import CUDA, fake_gpus, launches_counted
from tests.host_waits import HostWaits
from tests.ranks import run_alone

WORLD, ROWS = 8, 50_257
READ = "copy to the host"


class Wait(NamedTuple):
    place: str
    what: str
    count: int
    why: str


STEP = [  # of every training step
    Wait("Trainer.must_stop", READ, 1, "all ranks agree to stop or not"),
    Wait("Trainer._sum", READ, 1, "the loss is divided by the targets of all ranks"),
    Wait("clip_factor", READ, 2, "a norm that is not finite ends the run before the update; the second waits for nothing"),
]
PARTS: dict[str, list[Wait]] = {"step": STEP}


class Session:
    """A trainer with all its hooks on fake GPUs, and the waits of each of its parts."""

    def __init__(self, stage: Stage, waits: HostWaits) -> None:
        self.stage, self.trainer, self.waits = stage, stage.trainer, waits
        trainer, mesh = stage.trainer, stage.mesh
        self.vocab, self.vocab_optimizer = trainer.model.vocab, trainer.vocab_optimizer
        trainer.batches.epochs = lambda: {"corpus": 1.0}
        self.run = Run(data=None, parts=SimpleNamespace(mesh=mesh), manager=None)  # type: ignore[arg-type]
        self.health = EmbeddingHealth(1, self.vocab, self.vocab_optimizer, mesh)
        self.health.every = 2  # the first step, which is not sampled, creates what is created once

    def part(self, action: Any) -> Counter:
        self.waits.waits.clear()
        self.result = action()
        return Counter(self.waits.waits)

    def parts(self) -> dict[str, Counter]:
        first = self.stage.batch.micro_batches[0]
        self.step()
        found = {"step": self.part(self.step)}
        report = self.result
        found["log"] = self.part(lambda: LogHook(1, self.run).after_step(self.trainer, report))
        found["evaluation"] = self.part(lambda: self.evaluated(first))
        found["embedding"] = self.part(self.sampled_step) - found["step"]
        found["lens"] = self.part(lambda: self.looked(first))
        if self.vocab.head_weight is not None:
            hook = UntieHook(self.vocab, self.vocab_optimizer, 1, lambda: None)
            found["untied"] = self.part(lambda: hook.after_step(self.trainer, report))
        found["save"] = self.part(self.saved)
        return found

    def step(self) -> Any:
        """Moves a batch to the GPU and takes a step."""
        loader = BatchLoader(
            None,  # type: ignore[arg-type]
            global_batch=2,
            micro_batch=1,
            rank=0,
            world=WORLD,
            shard=self.vocab.shard,
            dtype=self.vocab.compute_dtype,
            device=CUDA,
            prefetch=1,
        )
        trainer, given = self.trainer, self.stage.batch
        tokens_BT = torch.zeros(given.micro_batches[0].tokens_BT.shape, dtype=torch.int64)
        plan = self.stage.plan.each(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        micro = MicroBatch(tokens_BT, tokens_BT, None, None).moved(torch.Tensor.pin_memory, plan.pin_memory())
        assert not trainer.must_stop()
        batch = Batch([loader._to_device(micro) for _ in given.micro_batches], given.n_targets)
        self.health.before_step(trainer)
        report = trainer.train_step(batch)
        self.health.after_step(trainer, report)
        report.seconds = 1.0
        return report

    def sampled_step(self) -> None:
        self.health.every = 1
        report = self.step()
        assert report.scalars["embedding_norm"]

    def evaluated(self, micro: MicroBatch) -> None:
        bytes_of_ids_V = torch.ones(ROWS, device=CUDA)
        hook = EvalHook(EvalConfig(), {"corpus": lambda: iter([micro])}, bytes_of_ids_V, self.run)
        assert hook.measure(self.trainer).keys() == {"val_loss", "val_bits_per_byte"}

    def looked(self, micro: MicroBatch) -> None:
        bins_BT = torch.zeros_like(micro.tokens_BT)
        measured = LensMonitor(1, micro, bins_BT, self.run).measure(self.trainer)
        assert measured is not None and "lens_loss/output" in measured

    def saved(self) -> None:
        """Collects and copies what the writer thread writes."""
        model = ModelState(self.trainer.engine, self.vocab, self.vocab_optimizer, self.stage.mesh)
        tensors = model.tensors() | HookStates([self.health]).tensors
        copies = HostCopies(CUDA)
        copies.mark()
        with copies.reading():
            model.digests()
            taken = copies.take(list(slices(tensors)))
        assert taken and all(part.tensor.device.type == "cpu" for part in taken)


def session(parallel: int, settings: list[str]) -> tuple[dict[str, Counter], list[str], Counter]:
    """Returns the waits of each part, the faults, and the kernels launched."""
    config = configured(
        *("model=gpt2", "model.layers=2", "train.micro_batch=1", "train.seq_len=64"),
        *(f"train.global_batch={2 * WORLD}", *settings),
    )
    with fake_gpus(WORLD), launches_counted() as launched:
        kernels = choose_kernels(CUDA)
        with staged(config, ROWS, parallel, WORLD, kernels, device=CUDA) as stage, HostWaits() as waits:
            found = Session(stage, waits).parts()
    return found, waits.faults, launched


if __name__ == "__main__":
    import sys, time
    from pprint import pprint
    for p,s in [(1,[]),(4,["vocab.untie_at=1"]),(8,["engine.hsdp=true"])]:
        t=time.process_time()
        a,b,c=session(p,s)
        print(time.process_time()-t)
        pprint(a); print(b,c)
        sys.stdout.flush()
    import os; os._exit(0)
