"""A run on fake GPUs: every tensor is on its device, and the host waits for a GPU at known places only.

Not covered: masked documents (`torch.compile`), engine.offload=cpu, DeepSpeed.
"""

from collections import Counter
from functools import cache, reduce
from operator import or_
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from launch.rehearsal import Stage, staged
from pretrain.checkpoint.host_copies import HostCopies
from pretrain.checkpoint.state import HookStates, ModelState, slices
from pretrain.config.evaluation import EvalConfig
from pretrain.data.loader import Batch, MicroBatch, sent
from pretrain.hooks.base import Hook, Run
from pretrain.hooks.culprits import highest, largest_rows
from pretrain.hooks.embedding import EmbeddingHealth
from pretrain.hooks.evaluation import EvalHook
from pretrain.hooks.lens import LensMonitor
from pretrain.hooks.log import LogHook
from pretrain.hooks.untie import UntieHook
from pretrain.stops import StopReason
from pretrain.trainer import Trainer
from pretrain.vocab.kernels import choose_kernels
from tests.benchmarks.plan import configured
from tests.fake_cuda import CUDA, fake_gpus, launches_counted
from tests.host_waits import HostWaits
from tests.ranks import run_alone

WORLD, ROWS = 8, 3_001
TO_HOST, TO_DEVICE = "copy to the host", "copy to the device"
RUNS = {  # ranks per copy of the matrix, engine: options
    (1, "fsdp2"): [],
    (4, "fsdp2"): ["vocab.untie_at=1", "engine.activation_checkpointing=selective"],
    (8, "fsdp2"): ["vocab.label_smoothing=0.1", "vocab.softcap=30.0", "vocab.z_loss=0.0001"],
    (1, "hsdp"): ["vocab.tie=untied"],
    (4, "hsdp"): ["engine.activation_checkpointing=block"],
    (8, "hsdp"): ["vocab.embed_scale=2.0", "vocab.input_grad_scale=0.5"],
}


class Wait(NamedTuple):
    place: str  # function
    what: str
    most: int  # in one call of the part
    why: str


AGREE = Wait("Trainer.agree", TO_HOST, 1, "the number of targets of all ranks, and whether to stop")
STEP = [  # every training step
    AGREE,
    Wait(
        "read_norm",
        TO_HOST,
        1,
        "loss and norms: a spike, or a norm that is not finite, must be known before the update",
    ),
]
UNPLANNED = [  # a lookup that no loader has planned
    Wait("_all_ids", TO_HOST, 1, "the plan is made on the host"),
    Wait("_Tensors.to", TO_DEVICE, 4, "the plan is in pageable memory; the device has just been waited for"),
]
SOMETIMES = {  # the parts of a run that are not in every step
    "log": [Wait("_peak_memory", TO_HOST, 1, "the largest of all ranks")],
    "evaluation": [  # of one batch
        AGREE,
        Wait("EvalHook.measure", TO_HOST, 1, "the sums"),
    ],
    "embedding": [  # a sampled step, besides the step's own; twice for two matrices
        Wait("Rows.__init__", TO_DEVICE, 1, "the edges of the bins"),
        Wait("Rows._host_sum", TO_HOST, 15, "sums decide what is measured next"),
        Wait("Rows._listed", TO_HOST, 12, "ids of rows are chosen on the host"),
        Wait("Rows._listed", TO_DEVICE, 6, "and sent to the other ranks"),
        Wait("isotropy", TO_HOST, 14, "numbers of the spectrum"),
        Wait("isotropy", "_linalg_eigh", 2, "torch reads the solver's error code"),
    ],
    "lens": [  # of one window
        AGREE,
        *UNPLANNED,
        Wait("DistinctComm.max_tokens_per_rank", TO_HOST, 2, "chunks are cut on the host; for each readout"),
        Wait("Readout._top", TO_HOST, 1, "the wait of the nonzero that follows, where the supervisor knows it"),
        Wait("Readout._top", "nonzero", 1, "the places of the largest logits, lowest ids first"),
        Wait("LensMonitor.measure", TO_HOST, 1, "the sums"),
    ],
    "untied": [Wait("UntieHook.drift", TO_HOST, 1, "the sums")],
    "spike": [
        Wait("highest", TO_HOST, 1, "the losses of all micro-batches"),
        Wait("largest_rows", TO_HOST, 1, "the largest norms of all shards"),
    ],
    "save": [Wait("digest", TO_HOST, 2, "on the writer thread, of each matrix")],
}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[1]}-{run[0]}")
def test_host_waits_at_known_places_only(run):
    waits = session_of(run).waits
    assert waits["step"] == {wait[:2]: wait.most for wait in STEP}
    for part, known in SOMETIMES.items():
        most = Counter({wait[:2]: wait.most for wait in known})
        assert waits[part] <= most, part


def test_known_waits_exist():
    for part, known in SOMETIMES.items():
        found = [session_of(run).waits[part] for run in RUNS]
        assert {wait[:2]: wait.most for wait in known} == reduce(or_, found), part


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[1]}-{run[0]}")
def test_collectives_get_tensors_on_the_device_of_their_group(run):
    assert session_of(run).faults == []


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[1]}-{run[0]}")
def test_head_runs_on_triton(run):
    """Each launch has also checked that its tensors are on the GPU."""
    launched = session_of(run).launched.keys()
    assert {"exponentials", "add_rows"} <= launched
    assert ("merge" in launched) != ("dlogits" in launched), "smoothing with softcap needs the normaliser first"


class Seen(NamedTuple):
    waits: dict[str, Counter[tuple[str, str]]]  # of each part
    faults: list[str]
    launched: Counter[str]  # kernels


@cache
def session_of(run: tuple[int, str]) -> Seen:
    return run_alone(session, *run, timeout=120)


def session(parallel: int, engine: str) -> Seen:
    """Takes steps and runs all hooks of a run, rank 0 of 8."""
    config = configured(
        *("model=nano", "model.layers=1", "train.micro_batch=1", "train.seq_len=64"),
        *(f"train.global_batch={2 * WORLD}", f"engine.hsdp={engine == 'hsdp'}", *RUNS[parallel, engine]),
    )
    with fake_gpus(WORLD), launches_counted() as launched:
        kernels = choose_kernels(CUDA)
        with staged(config, ROWS, parallel, WORLD, kernels, device=CUDA) as stage, HostWaits() as waits:
            return Seen(Session(stage, waits).parts(), waits.faults, launched)


class Spike(Hook):
    """Finds what is behind a spike, and leaves the batch out."""

    def allows(self, trainer: Any, report: Any) -> bool:
        highest(trainer, report)
        largest_rows(trainer.model.vocab)
        return False


class Session:
    """A trainer with all its hooks on fake GPUs, and the waits of each of its parts."""

    def __init__(self, stage: Stage, waits: HostWaits) -> None:
        self.stage, self.trainer, self.waits = stage, stage.trainer, waits
        trainer, mesh = stage.trainer, stage.mesh
        self.vocab, self.vocab_optimizer = trainer.model.vocab, trainer.vocab_optimizer
        trainer.batches.epochs = lambda: {"corpus": 1.0}
        trainer.agree = self.agree
        self.run = Run(data=None, parts=SimpleNamespace(mesh=mesh), manager=None)  # type: ignore[arg-type]
        self.health = EmbeddingHealth(1000, self.vocab, self.vocab_optimizer, mesh)

    def part(self, action: Any) -> Counter:
        self.waits.waits.clear()
        self.result = action()
        return Counter(self.waits.waits)

    def parts(self) -> dict[str, Counter]:
        first = self.stage.batch.micro_batches[0]
        found = {"step": self.part(self.step)}
        report = self.result
        found["log"] = self.part(lambda: LogHook(1, self.run).after_step(self.trainer, report))
        found["evaluation"] = self.part(lambda: self.evaluated(first))
        found["embedding"] = self.part(self.sampled_step) - found["step"]
        found["lens"] = self.part(lambda: self.looked(first))
        untied = UntieHook(self.vocab, self.vocab_optimizer, 1, lambda: None)
        found["untied"] = self.part(lambda: untied.after_step(self.trainer, report))
        found["save"] = self.part(self.saved)
        self.trainer.hooks = [Spike()]
        found["spike"] = self.part(self.step) - found["step"]
        assert self.result is None, "the batch is left out"
        return found

    def agree(self, number: int) -> int:
        """Agrees to go on: unknown numbers are not 0 here, not even the numbers of ranks that want to stop."""
        total = Trainer.agree(self.trainer, number)
        self.trainer.reason = StopReason.NONE
        return total

    def step(self) -> Any:
        """Moves a batch to the GPU and takes a step."""
        trainer, given = self.trainer, self.stage.batch
        tokens_BT = torch.zeros(given.micro_batches[0].tokens_BT.shape, dtype=torch.int64)
        plan = self.stage.plan.each(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        micro = MicroBatch(tokens_BT, tokens_BT).moved(torch.Tensor.pin_memory, plan.pin_memory())
        batch = Batch([sent(micro, CUDA) for _ in given.micro_batches], given.n_targets)
        self.health.before_step(trainer)
        report = trainer.train_step(batch, trainer.agree(batch.n_targets))
        if report is not None:
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
