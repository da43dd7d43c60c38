"""One rank of a training: reads the frozen configuration, builds the parts, fits.

`python -m pretrain.train RUN/config.yaml`, once for each rank, with the environment of torchrun. Users type
`python launch/local.py` instead.
"""

import fcntl
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import torch

from . import config as configuration
from .checkpoint import CheckpointError, CheckpointManager, ModelState, TrainState, checkpoints
from .config import TrainConfig
from .data import BatchLoader, Corpus, Order, Windows, validation_batches
from .engine import Engine
from .mesh import Mesh, ranks
from .model import LanguageModel
from .monitor import MetricsLog
from .optim import MatrixOptimizer
from .trainer import Evaluate, Hook, Log, Save, StopFlag, Trainer
from .vocab import VocabParallelEmbedding, VocabShard

LOCK_FILE = ".lock"


def main() -> None:
    """Exits 0 when the run is where it was meant to get, or saved after SIGTERM or SIGINT; 1 with one line else."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        config = configuration.load(Path(sys.argv[1]))
        with StopFlag() as stop, ranks() as device:
            train(config, device, stop)
    except (ValueError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"error on rank {os.environ.get('RANK', 0)}: {error}")


def train(config: TrainConfig, device: torch.device, stop: StopFlag) -> None:
    """Trains to the end, or to where this launch stops, and saves there. Every rank calls it."""
    world = torch.distributed.get_world_size()
    mesh = Mesh.of(config.vocab.ranks(world), device)
    corpus = configuration.check(config, world)
    with lock(config.run_dir) if mesh.rank == 0 else _unlocked():
        engine, model, matrix = build_model(config, mesh, configuration.vocab_rows(config, corpus))
        manager = CheckpointManager(
            config.run_dir,
            ModelState(engine, model.vocab, matrix, mesh),
            mesh,
            keep=config.checkpoint.keep,
            seed=config.seed,
            about=configuration.about(config, corpus),
        )
        found = checkpoints(config.run_dir)
        state = manager.load(found[-1]) if found else TrainState()
        loader = _loader(config, corpus, mesh, model.vocab.shard.vocab_size)
        loader.load_state_dict(state.samples)
        log = None
        if mesh.rank == 0:
            _announce(config, model, mesh, state, found[-1] if found else None)
            log = MetricsLog(config.run_dir, config.log, state.step, config.train.steps)
        hooks = _hooks(config, corpus, mesh, model.vocab.shard.vocab_size, log, manager)
        trainer = Trainer(model, engine, matrix, loader, mesh, config.train, config.optim, state, hooks, stop)
        try:
            trainer.fit()
            saved = manager.save(state)
        finally:
            loader.close()
            if log is not None:
                log.close()
    if mesh.rank == 0:
        early = state.step < config.train.last_step
        print(f"{'stopped and saved' if early else 'saved'}: {saved}", flush=True)


def build_model(config: TrainConfig, mesh: Mesh, rows: int) -> tuple[Engine, LanguageModel, MatrixOptimizer]:
    """Engine, model and the matrix's optimizer, with initial weights that depend on the seed alone."""
    compute_dtype = precision(config.train.precision, mesh.device)
    vocab = VocabParallelEmbedding(
        config.vocab,
        VocabShard.of(mesh.vocab_rank, mesh.vocab_size, rows, config.vocab.multiple),
        config.model.width,
        seed=config.seed,
        group=mesh.vocab_group,
        compute_dtype=compute_dtype,
        device=mesh.device,
    )
    with torch.device("meta"):
        body = config.model.body()
    engine = config.engine.build(config.optim, compute_dtype, config.seed)
    model = LanguageModel(vocab, engine.wrap(body, mesh))
    return engine, model, MatrixOptimizer(vocab.parameters(), config.optim, mesh)


def precision(name: str, device: torch.device) -> torch.dtype:
    """bf16, fp32 or auto as a dtype. ValueError where bf16 is asked of a processor that only emulates it."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    if name == "bf16" and not native:
        raise ValueError(f"train.precision=bf16: this {device.type} does not compute it natively; use fp32 or auto")
    return torch.float32 if name == "fp32" or not native else torch.bfloat16


def _loader(config: TrainConfig, corpus: Corpus, mesh: Mesh, vocab_size: int) -> BatchLoader:
    windows = Windows(corpus.train, config.seq_len)
    return BatchLoader(
        windows,
        Order(len(windows), config.seed, corpus.name),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=mesh.rank,
        world=mesh.world,
        vocab_size=vocab_size,
        device=mesh.device,
        prefetch=config.data.prefetch,
    )


def _hooks(
    config: TrainConfig, corpus: Corpus, mesh: Mesh, vocab_size: int, log: MetricsLog | None, manager: CheckpointManager
) -> list[Hook]:
    hooks: list[Hook] = []
    held_out = Windows(corpus.val, config.seq_len)
    if len(held_out):
        batches = partial(
            validation_batches,
            held_out,
            config.eval.max_windows,
            batch=config.train.micro_batch,
            rank=mesh.rank,
            world=mesh.world,
            vocab_size=vocab_size,
            device=mesh.device,
        )
        hooks.append(Evaluate(config.eval, batches, held_out.tokens / max(1, corpus.val_text_bytes)))
    hooks.append(Log(config.log.every, log))
    if config.checkpoint.every:
        hooks.append(Save(config.checkpoint.every, manager))
    return hooks


def _announce(config: TrainConfig, model: LanguageModel, mesh: Mesh, state: TrainState, resumed: Path | None) -> None:
    vocab = model.vocab
    body = sum(p.numel() for p in model.body.parameters())  # type: ignore[attr-defined]
    matrices = len(vocab.named_rows())
    matrix = matrices * vocab.shard.vocab_size * config.model.width
    print(
        f"model: {(body + matrix) / 1e6:.1f}M parameters, {matrix / 1e6:.1f}M of them in {matrices} matrix"
        f"{'es' if matrices > 1 else ''} of {vocab.shard.vocab_size:,} rows ({config.vocab.tie})\n"
        f"ranks: {mesh.world} on {mesh.device.type} = {mesh.dp_size} dp × {mesh.vocab_size} vocab,"
        f" {vocab.shard.rows_per_rank:,} rows each; {config.engine.name}, {str(vocab.compute_dtype)[6:]}\n"
        + (f"resumed: {resumed}, step {state.step}" if resumed else f"new run: {config.run.dir}"),
        flush=True,
    )


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Holds the run's folder for this process. Raises ValueError if another one does."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run.dir={run} is in use by {_holder(file)}: stop it, or choose another run.dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"


@contextmanager
def _unlocked() -> Iterator[None]:
    yield


if __name__ == "__main__":
    main()
