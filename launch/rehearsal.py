"""Rehearses a rank's training step without GPU, other ranks or data, on fake tensors and torch's fake process group.

Fake tensors have shapes but no values, and use no memory, so a model of any size on any number of ranks takes seconds.
(torchtitan's fake backend and torch.compile's tracing use the same two.)
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import headline
from pretrain.build import build_model
from pretrain.checkpoint.state import TrainState
from pretrain.config.engine import FSDP2Config
from pretrain.config.job import JobConfig
from pretrain.config.optim import OptimConfig
from pretrain.config.training import TrainingConfig
from pretrain.control import RunControl
from pretrain.data.loader import Batch, MicroBatch
from pretrain.engine import Engine
from pretrain.hooks import Hook
from pretrain.mesh import Mesh
from pretrain.models.language_model import LanguageModel
from pretrain.optim import VocabOptimizer
from pretrain.parts import ModelParts
from pretrain.precision import compute_dtype
from pretrain.stops import StopRequests
from pretrain.trainer import Trainer
from pretrain.vocab import VocabShard
from pretrain.vocab.checks import checks_skipped
from pretrain.vocab.kernels.base import Kernels
from pretrain.vocab.kernels.torch import TorchKernels
from pretrain.vocab.lookup import LookupPlan, plan_lookup

aten = torch.ops.aten
CPU = torch.device("cpu")
WHOLE = TorchKernels(slab_bytes=2**60, memory_mib=2**40)  # all logits at once: fake tensors need no memory


@dataclass
class Stage:
    """Rank 0's trainer and a batch for it. All micro-batches have the same tokens."""

    mesh: Mesh
    trainer: Trainer
    batch: Batch
    plan: LookupPlan

    def step(self) -> None:
        self.trainer.train_step(self.batch, self.trainer.agree(self.batch.n_targets))


def rehearse(config: JobConfig, rows: int, parallel: int, world: int) -> None:
    """Runs one step on `world` ranks, `parallel` of them per copy of the matrix. Raises ValueError if shapes mismatch.

    Two blocks and one micro-batch are enough: the others are equal. DeepSpeed reads values, so FSDP2 replaces it.
    Nothing is compiled or offloaded.
    """
    precision = "fp32" if config.train.precision == "fp32" else "auto"  # this CPU may not support bf16
    alone = replace(
        config,
        model=replace(config.model, layers=min(2, config.model.layers)),
        train=replace(config.train, global_batch=config.train.micro_batch * world, precision=precision),
        engine=FSDP2Config(activation_checkpointing=config.engine.activation_checkpointing),
    )
    try:
        with warnings.catch_warnings(action="ignore"), staged(alone, rows, parallel, world, WHOLE) as stage:
            stage.step()  # without warnings about the fake group
    except RuntimeError as error:
        raise ValueError(f"a training step on {world} ranks would fail: {headline(error)}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread: a mode such as FakeTensorMode holds for the thread that has entered it alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def staged(
    config: JobConfig,
    rows: int,
    parallel: int,
    world: int,
    kernels: Kernels,
    watching: AbstractContextManager[object] | None = None,
    device: torch.device = CPU,
) -> Iterator[Stage]:
    """Yields a stage for steps. `watching` is a context that sees all tensors from the first one on.

    With DeepSpeed the tensors are real. It keeps process groups after their end, so a process can have one stage.
    """
    ids_pBT = text_like(parallel, config, rows)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = Mesh.of(parallel, device)
        shard = VocabShard.of(0, parallel, rows, config.vocab.multiple)
        plan = plan_lookup([ids_BT.flatten() for ids_BT in ids_pBT], shard, compute_dtype(config.train, device.type))
        fake = None if config.engine.reads_values else FakeTensorMode()
        move: Callable[[Tensor], Tensor] = (
            (lambda tensor: fake.from_tensor(tensor).to(device)) if fake else lambda tensor: tensor
        )
        with ExitStack() as stack:
            for mode in (fake, watching):
                stack.enter_context(mode or nullcontext())
            with one_thread():
                engine, model, vocab_optimizer = build_model(config, mesh, rows)
            model.vocab.kernels = kernels
            if config.vocab.untie_at is not None:  # a run must have memory for it
                vocab_optimizer.add_copy(model.vocab.untie(), model.vocab.weight)
            trainer = trainer_of(model, engine, vocab_optimizer, mesh, config.train, config.optim)
            tokens_BT, repeats = move(ids_pBT[0]), config.train.global_batch // (config.train.micro_batch * world)
            starts_BT = torch.zeros_like(tokens_BT) if config.data.masked else None
            micro = MicroBatch(tokens_BT, tokens_BT, starts_BT, plan.each(move))
            batch = Batch([micro] * repeats, tokens_BT.numel())
            stack.enter_context(Answers())
            if fake:
                stack.enter_context(checks_skipped())
            yield Stage(mesh, trainer, batch, plan)
    finally:
        dist.destroy_process_group()


def text_like(ranks: int, config: JobConfig, rows: int) -> list[Tensor]:
    """Draws ids [B, T] per rank by Zipf's law: low ids are frequent."""
    sequences, length = config.train.micro_batch, config.seq_len
    frequency = 1.0 / torch.arange(1, rows + 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(frequency, ranks * sequences * length, replacement=True, generator=generator)
    return list(ids.view(ranks, sequences, length))


def trainer_of(
    model: LanguageModel,
    engine: Engine,
    vocab_optimizer: VocabOptimizer,
    mesh: Mesh,
    loop: TrainingConfig,
    optim: OptimConfig,
    hooks: Sequence[Hook] = (),
) -> Trainer:
    """Builds a trainer for single steps on given batches."""
    parts, control = ModelParts(engine, model, vocab_optimizer, mesh), RunControl(loop, StopRequests())
    return Trainer(parts, _NoSamples(), loop, optim, TrainState(), hooks, control)  # type: ignore[arg-type]


class _NoSamples:
    def state_dict(self) -> dict[str, int]:
        return {}


class Answers(TorchDispatchMode):
    """Answers if a step reads a fake tensor: every number is 1, and this rank owns none of the targets.

    Raises RuntimeError if the step reads a condition: the answer that lets it continue is unknown.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fake = bool(args) and isinstance(args[0], FakeTensor)
        if fake and func is aten._local_scalar_dense.default:
            if args[0].dtype is torch.bool:
                raise RuntimeError(
                    "the step reads a condition, and fake tensors have no values:"
                    " check it with pretrain.vocab.checks.violated, which a rehearsal skips"
                )
            return 1
        if fake and func is aten.nonzero.default:  # this rank owns none of the targets
            return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
        return func(*args, **(kwargs or {}))
