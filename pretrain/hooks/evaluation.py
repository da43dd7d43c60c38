"""The loss on validation data."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.evaluation import EvalConfig
from ..config.job import JobConfig
from ..corpora import validation_windows
from ..data import IGNORED
from ..data.loader import MicroBatch, validation_batches
from ..vocab.collectives import on_host
from .base import Hook, Run, StepReport, TrainerView


class EvalHook(Hook):
    """Validation loss, and bits per byte of the validation text: comparable between tokenizers."""

    def __init__(
        self,
        config: EvalConfig,
        batches: dict[str, Callable[[], Iterator[MicroBatch]]],
        bytes_of_ids_V: Tensor,
        run: Run,
    ) -> None:
        """`batches`: of each corpus, by its title."""
        self.config, self.batches, self.bytes_of_ids_V, self.run = config, batches, bytes_of_ids_V, run

    def before_training(self, trainer: TrainerView) -> None:
        """Repeats the evaluation that a stop has cut short, if there was one."""
        state = trainer.state
        missing = state.step and state.val_loss is None and self._due(trainer)
        measured = self._measured(trainer) if missing else {}
        if measured:
            self.run.manager.save(state)  # the checkpoint exists; now its loss is known
        if measured and self.run.log is not None:
            self.run.log.complete(state.step, measured)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if self._due(trainer):
            report.scalars |= self._measured(trainer)

    def _due(self, trainer: TrainerView) -> bool:
        step = trainer.state.step
        return step == trainer.loop.steps or bool(self.config.every and step % self.config.every == 0)

    def _measured(self, trainer: TrainerView) -> dict[str, float]:
        measured: dict[str, float] = {}
        for suffix, weights in {"": nullcontext, **self.run.variants}.items():
            with weights():
                found = self.measure(trainer, suffix)
            if not found:
                return {}
            measured |= found
        trainer.state.val_loss = measured["val_loss"]
        return measured

    @torch.no_grad()
    def measure(self, trainer: TrainerView, suffix: str = "") -> dict[str, float]:
        """Returns val_loss (nats per token) and val_bits_per_byte (over the bytes of the scored targets).

        With several corpora: for all targets together, and for each corpus. Empty if the ranks must stop early.
        suffix: added to both names, before that of a corpus.
        One all-reduce of three numbers per corpus, and one of five numbers per batch, besides the model's.
        """
        sums = torch.zeros(len(self.batches), 3, dtype=torch.float64, device=trainer.mesh.device)
        with trainer.model.vocab.rows_unchanged():
            for corpus, batches in zip(sums, self.batches.values(), strict=True):
                for done, micro in enumerate(batches()):
                    if trainer.must_stop():
                        return {}
                    if self.run.log is not None:
                        self.run.log.console.busy(f"evaluation, batch {done + 1:,}")
                    corpus += self._sums(trainer, micro)
        dist.all_reduce(sums)
        measured = {"": sums.sum(0)} | {f"/{title}": sums_3 for title, sums_3 in zip(self.batches, sums, strict=True)}
        scalars = {}
        for title, sums_3 in measured.items() if len(self.batches) > 1 else [("", sums[0])]:
            loss, tokens, text_bytes = on_host(sums_3).tolist()
            scalars[f"val_loss{suffix}{title}"] = loss / tokens
            scalars[f"val_bits_per_byte{suffix}{title}"] = loss / math.log(2) / max(1.0, text_bytes)
        return scalars

    def _sums(self, trainer: TrainerView, micro: MicroBatch) -> Tensor:
        """Returns the sum of this rank's losses, the number of its targets, and their bytes of text: float64 [3]."""
        out = trainer.model.loss(micro.tokens_BT, micro.targets_BT, micro.starts_BT, plan=micro.plan)
        counted_BT = micro.targets_BT != IGNORED  # indexing with this mask would wait for the device
        text_bytes = (self.bytes_of_ids_V[micro.targets_BT.clamp_min(0)] * counted_BT).sum()
        return torch.stack([out.loss.double(), out.n_tokens.double(), text_bytes.double()])


def build(config: JobConfig, run: Run) -> EvalHook | None:
    """The hook, if there is something to evaluate on."""
    mesh, vocab = run.parts.mesh, run.parts.model.vocab
    batches: dict[str, Callable[[], Iterator[MicroBatch]]] = {}
    for title, windows in validation_windows(config, run.data).items():
        batches[title] = partial(
            validation_batches,
            windows,
            config.eval.max_windows,
            batch=config.train.micro_batch,
            rank=mesh.data_rank,
            world=mesh.data_world,
            shard=vocab.shard,
            dtype=vocab.compute_dtype,
            device=mesh.device,
        )
    if not batches or run.data.bytes_of_ids is None:
        return None
    return EvalHook(config.eval, batches, torch.from_numpy(run.data.bytes_of_ids).to(mesh.device), run)
