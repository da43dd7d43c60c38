"""One rank of a training: reads the frozen configuration, builds the parts, fits.

`python -m pretrain.train RUN/config.yaml`, once for each rank, with the environment of torchrun. Users type
`python launch/local.py` instead.
"""

import os
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from . import config as configuration
from .checkpoint import RANKS_LOCK, CheckpointError, CheckpointManager, ModelState, TrainState
from .config import TrainConfig, hold
from .data import BatchLoader, Corpus, Order, Windows, validation_batches
from .engine import Engine
from .mesh import Mesh, lost_peer, ranks, ranks_of_a_node
from .model import LanguageModel
from .monitor import MetricsLog
from .optim import MatrixOptimizer
from .trainer import Deadline, Evaluate, Hook, Log, Save, Stop, StopFlag, Trainer
from .vocab import Parallel, VocabParallelEmbedding, VocabShard


def main() -> None:
    """Exits 0 when the run is where it was meant to get, or saved after SIGTERM or SIGINT; 1 with one line else."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        config = configuration.load(Path(sys.argv[1]))
        with StopFlag() as stop, ranks() as device:
            train(config, device, stop)
    except (CheckpointError, FloatingPointError) as error:  # of which all ranks know
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except (ValueError, OSError) as error:
        sys.exit(f"error on rank {os.environ.get('RANK', 0)}: {error}")
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        sys.exit(f"rank {os.environ.get('RANK', 0)} has lost another rank, and stops")


def train(config: TrainConfig, device: torch.device, stop: StopFlag) -> None:
    """Trains to the end, or to where this launch stops, and saves there. Every rank calls it."""
    started = time.time()
    world = torch.distributed.get_world_size()
    corpus = configuration.check(config, world, device.type)
    rows = configuration.vocab_rows(config, corpus)
    parallel = configuration.vocab_parallel(config, rows, world, ranks_of_a_node(device), device.type)
    mesh = Mesh.of(parallel.ranks, device)
    with hold(config.run_dir, RANKS_LOCK) if mesh.rank == 0 else nullcontext():
        engine, model, matrix = build_model(config, mesh, rows)
        manager = CheckpointManager(
            config.run_dir,
            ModelState(engine, model.vocab, matrix, mesh),
            mesh,
            config.checkpoint,
            seed=config.seed,
            about=configuration.about(config, corpus),
        )
        state, found = manager.restore(lambda fault: print(f"warning: {fault}", file=sys.stderr, flush=True))
        loader = _loader(config, corpus, mesh, model.vocab)
        loader.load_state_dict(state.samples)
        log = None
        if mesh.rank == 0:
            _announce(config, corpus, model, mesh, parallel, state, found)
            log = MetricsLog(config.run_dir, config.log, state.step, config.train.steps)
        hooks = _hooks(config, corpus, mesh, model.vocab.shard.vocab_size, log, manager)
        stops: list[Stop] = [stop, manager.failed, *_deadlines(config, started, manager)]
        trainer = Trainer(
            model, engine, matrix, loader, mesh, config.train, config.optim, state, hooks, stops, manager.wait_for_copy
        )
        try:
            trainer.fit()
            saved = manager.save(state)
            manager.wait()
        finally:
            loader.close()
            manager.close()
            if log is not None:
                log.close()
    if mesh.rank == 0:
        early = state.step < config.train.last_step
        print(f"{'stopped and saved' if early else 'saved'}: {saved}", flush=True)


def build_model(config: TrainConfig, mesh: Mesh, rows: int) -> tuple[Engine, LanguageModel, MatrixOptimizer]:
    """Engine, model and the matrix's optimizer, with initial weights that depend on the seed alone."""
    compute_dtype = config.train.compute_dtype(mesh.device.type)
    vocab = VocabParallelEmbedding(
        config.vocab,
        VocabShard.of(mesh.vocab_rank, mesh.vocab_size, rows, config.vocab.multiple),
        config.model.width,
        seed=config.seed,
        group=mesh.vocab_group if mesh.vocab_size > 1 else None,
        compute_dtype=compute_dtype,
        device=mesh.device,
    )
    with torch.device("meta"):
        body = config.model.body()
    engine = config.engine.build(config.optim, compute_dtype, config.seed)
    model = LanguageModel(vocab, engine.wrap(body, mesh))
    return engine, model, MatrixOptimizer(vocab.parameters(), config.optim, mesh)


def _loader(config: TrainConfig, corpus: Corpus, mesh: Mesh, vocab: VocabParallelEmbedding) -> BatchLoader:
    windows = Windows(corpus.train, config.seq_len)
    return BatchLoader(
        windows,
        Order(len(windows), config.seed, corpus.name),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=mesh.rank,
        world=mesh.world,
        shard=vocab.shard,
        dtype=vocab.compute_dtype,
        device=mesh.device,
        prefetch=config.data.prefetch,
    )


def _hooks(
    config: TrainConfig, corpus: Corpus, mesh: Mesh, vocab_size: int, log: MetricsLog | None, manager: CheckpointManager
) -> list[Hook]:
    hooks: list[Hook] = []
    held_out = Windows(corpus.val, config.seq_len)
    if len(held_out) and corpus.bytes_of_ids is not None:
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
        bytes_of_ids_V = torch.from_numpy(corpus.bytes_of_ids).to(mesh.device)
        hooks.append(Evaluate(config.eval, batches, bytes_of_ids_V))
    hooks.append(Log(config.log.every, log))
    if config.checkpoint.every:
        hooks.append(Save(config.checkpoint.every, manager))
    return hooks


def _deadlines(config: TrainConfig, started: float, manager: CheckpointManager) -> list[Stop]:
    """The run's own time limit, and that of its job: ROWSHARD_DEADLINE. ValueError where that is no unix time."""
    limits = []
    if config.train.time_limit_seconds is not None:
        limits.append(started + config.train.time_limit_seconds)
    given = os.environ.get("ROWSHARD_DEADLINE")
    if given:
        try:
            limits.append(float(given))
        except ValueError:
            raise ValueError(f"ROWSHARD_DEADLINE={given} in the environment must be a unix time") from None
    return [Deadline(limit, config.checkpoint.seconds_before_limit, lambda: manager.longest) for limit in limits]


def _announce(
    config: TrainConfig,
    corpus: Corpus,
    model: LanguageModel,
    mesh: Mesh,
    parallel: Parallel,
    state: TrainState,
    resumed: Path | None,
) -> None:
    vocab = model.vocab
    with torch.device("meta"):
        body = sum(p.numel() for p in config.model.body().parameters())  # an engine may hide the shapes of its own
    matrices = len(vocab.named_rows())
    matrix = matrices * vocab.shard.vocab_size * config.model.width
    tokens, sample = sum(len(file.tokens) for file in corpus.train), state.samples.get(corpus.name, 0)
    print(
        f"model: {(body + matrix) / 1e6:.1f}M parameters, {matrix / 1e6:.1f}M of them in {matrices} matrix"
        f"{'es' if matrices > 1 else ''} of {vocab.shard.vocab_size:,} rows ({config.vocab.tie})\n"
        f"ranks: {mesh.world} on {mesh.device.type} = {mesh.dp_size} dp × {mesh.vocab_size} vocab,"
        f" {vocab.shard.rows_per_rank:,} rows each; {config.engine.title}, {str(vocab.compute_dtype)[6:]}\n"
        + (f"{parallel.why}\n" if parallel.why else "")
        + f"data: {config.data.path}, {tokens:,} tokens, from sample {sample:,}"
        f"{' (not the data of before: it starts anew)' if state.samples and not sample else ''}\n"
        + (f"resumed: {resumed}, step {state.step}" if resumed else f"new run: {config.run.dir}"),
        flush=True,
    )


if __name__ == "__main__":
    main()
