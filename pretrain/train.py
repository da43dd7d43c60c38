"""One rank of a training: reads the frozen configuration, builds the parts, fits.

`python -m pretrain.train RUN/config.yaml`, once for each rank, with the environment of torchrun. Users type
`python launch/local.py` instead.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from data_prep.errors import DataError

from .announce import announce
from .build import about, build_model, samples, validation_windows, vocab_parallel, vocab_rows
from .changes import markdown, settings_changed
from .checkpoint import CheckpointError, CheckpointManager, DamagedCheckpoint, ModelState
from .checks import check_job
from .compose import load_config
from .config.job import JobConfig
from .data import BatchLoader, Data, MicroBatch, validation_batches
from .exits import Exit
from .hooks import CheckpointHook, EvalHook, LogHook
from .interop import initialise
from .lens.monitor import LensMonitor
from .locks import RANKS_LOCK, lock_run
from .memory import OutOfMemory, shortage_named
from .mesh import TIMEOUT, Mesh, device_error, lost_peer, ranks, ranks_of_a_node
from .monitor import EmbeddingHealth, MetricsLog, Seen, TieDrift
from .optim import VocabOptimizer
from .rendezvous import NotMet, hopeless, words
from .stops import Deadline, StopCheck, StopReason, StopRequests
from .trainer import Hook, Trainer
from .vocab import VocabParallelEmbedding
from .watchdog import Watchdog

LOCK_SECONDS = 180  # to wait for a lock of a start before this one


HELP = """One rank of a training, as a launcher starts it. To train: python launch/local.py --help

  python -m pretrain.train RUN/config.yaml                                      a single rank
  torchrun --nproc-per-node 2 -m pretrain.train RUN/config.yaml                 on several nodes with torchrun's flags

RUN/config.yaml is what a launcher has frozen. Each rank reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, as torchrun sets them. Ends with the codes of pretrain/exits.py: 0 finished, 75 stopped and
saved, others failed.
"""


def main() -> None:
    """Exits with an `Exit`; where that is neither FINISHED nor STOPPED, with a line on stderr, or a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    rank = os.environ.get("RANK", "0")
    try:
        with StopRequests(after=signal.SIG_IGN) as requests:  # Slurm asks more than once: a rank that ends must not die
            config = load_config(_config_path(sys.argv[1:]))
            with ExitStack() as group:
                with requests.ending(partial(_end_unstarted, rank)):
                    device = group.enter_context(ranks(_timeout(config)))
                reason = train(config, device, requests)
        sys.exit(Exit.STOPPED if reason is StopReason.REQUESTED else Exit.FINISHED)
    except (CheckpointError, FloatingPointError) as error:  # of which all ranks know
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        if isinstance(error, DamagedCheckpoint):
            sys.exit(Exit.REFUSED)
        sys.exit(Exit.UNSAVED if isinstance(error, CheckpointError) else Exit.DIVERGED)
    except OutOfMemory as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        sys.exit(Exit.OUT_OF_MEMORY)
    except ValueError as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        sys.exit(Exit.REFUSED)
    except OSError as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr)
        sys.exit(Exit.CRASHED)
    except RuntimeError as error:
        if device_error(error):
            traceback.print_exc()
            sys.exit(Exit.DEVICE)
        if isinstance(error, NotMet) or hopeless(error):
            print(f"error on rank {rank}: the ranks did not meet: {words(error)}", file=sys.stderr)
            never = hopeless(error) or getattr(error, "hopeless", False)
            sys.exit(Exit.CANNOT_MEET if never else Exit.NOT_MET)
        if not lost_peer(error):
            raise
        print(f"rank {rank} has lost another rank, and stops: {words(error)}", file=sys.stderr)
        sys.exit(Exit.LOST_PEER)


def _end_unstarted(rank: str) -> None:
    """Ends this process, from any thread."""
    print(f"rank {rank} was asked to stop before the ranks had met: nothing to save", file=sys.stderr, flush=True)
    os._exit(Exit.UNSTARTED)


def _config_path(arguments: list[str]) -> Path:
    """The one argument. Prints help and exits 0 if there is none."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP.rstrip())
        sys.exit(0)
    if len(arguments) > 1 or ("=" in arguments[0] and not Path(arguments[0]).exists()):
        said = " ".join(arguments)
        raise ValueError(f"{said} must be the path of a run's config.yaml: settings go to launch/local.py; see --help")
    return Path(arguments[0])


def train(config: JobConfig, device: torch.device, requests: StopRequests) -> StopReason:
    """Trains to the end, or to where this launch stops, saves there, and gives the reason. Every rank calls it."""
    started = time.time()
    world = torch.distributed.get_world_size()
    data = check_job(config, world, device.type, environment=os.environ)
    rows = vocab_rows(config, data)
    parallel = vocab_parallel(config, rows, world, ranks_of_a_node(device), device.type)
    mesh = Mesh.of(parallel.ranks, device, _timeout(config))
    with _held(config, mesh), Watchdog(config.train.hang_after) as watchdog, shortage_named(config, mesh):
        engine, model, matrix = build_model(config, mesh, rows)
        seen = Seen(model.vocab.shard, mesh.device) if config.monitor.embedding else None
        tensors = ModelState(engine, model.vocab, matrix, mesh, seen)
        manager = CheckpointManager(
            config.run_dir,
            tensors,
            mesh,
            config.checkpoint,
            seed=config.seed,
            about=about(config, data),
        )
        state, found = manager.restore(lambda fault: print(f"warning: {fault}", file=sys.stderr, flush=True))
        if found is None and config.init_from is not None:
            initialise(config.init_from, tensors)
            manager.check_shards()
        loader = _loader(config, data, mesh, model.vocab)
        loader.load_state_dict(state.samples)
        log = None
        if mesh.rank == 0:
            changes = settings_changed(config.run_dir, found)
            announce(config, data, loader.samples, model, mesh, parallel, state, found, changes)
            log = MetricsLog(config.run_dir, config.log, state.step, config.train.steps)
            if changes:
                log.text("settings changed", markdown(changes), state.step)
        evaluations = _evaluations(config, data, mesh, model.vocab.shard.vocab_size)
        monitors = _monitors(config, data, model.vocab, matrix, seen, mesh, state.step, log)
        hooks: list[Hook] = [*evaluations, *monitors, LogHook(config.log.every, log)]
        if config.checkpoint.every:
            hooks.append(CheckpointHook(config.checkpoint.every, manager))
        stops: list[StopCheck] = [
            (StopReason.REQUESTED, requests.asked),
            (StopReason.UNSAVED, manager.failed),
            *_deadlines(config, started, manager),
        ]
        loop, copied = config.train, manager.wait_for_copy
        trainer = Trainer(
            model, engine, matrix, loader, mesh, loop, config.optim, state, hooks, stops, copied, watchdog
        )
        try:
            for evaluate in evaluations:
                measured = evaluate.catch_up(trainer)
                if measured:
                    manager.save(state)  # it is there; now its loss is known
                if measured and log is not None:
                    log.complete(state.step, measured)
            reason = trainer.fit()
            watchdog.alive()
            saved = manager.save(state)
            manager.wait()
        finally:
            loader.close()
            manager.close()
            if log is not None:
                log.close()
    if mesh.rank == 0:
        print(f"{'stopped and saved' if reason else 'saved'}: {saved}", flush=True)
    return reason


def _timeout(config: JobConfig) -> timedelta:
    """Of a collective: longer than the watchdog's, whose stacks say more."""
    return TIMEOUT + timedelta(seconds=config.train.hang_after)


@contextmanager
def _held(config: JobConfig, mesh: Mesh) -> Iterator[None]:
    """The first rank holds the run. OSError where another process still does after minutes.

    A network file system may be that late to see that the node of a start before this one is gone.
    """
    if mesh.rank != 0:
        yield
        return
    late = time.monotonic() + LOCK_SECONDS
    with ExitStack() as locks:
        while True:
            try:
                locks.enter_context(lock_run(config.run_dir, RANKS_LOCK))
                break
            except DataError as error:
                if time.monotonic() >= late:
                    raise OSError(str(error)) from error
                time.sleep(1)
        yield


def _loader(config: JobConfig, data: Data, mesh: Mesh, vocab: VocabParallelEmbedding) -> BatchLoader:
    return BatchLoader(
        samples(config, data),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=mesh.data_rank,
        world=mesh.data_world,
        shard=vocab.shard,
        dtype=vocab.compute_dtype,
        device=mesh.device,
        prefetch=config.data.prefetch,
    )


def _evaluations(config: JobConfig, data: Data, mesh: Mesh, vocab_size: int) -> list[EvalHook]:
    """One, where there is something to evaluate on."""
    batches: dict[str, Callable[[], Iterator[MicroBatch]]] = {}
    for title, windows in validation_windows(config, data).items():
        batches[title] = partial(
            validation_batches,
            windows,
            config.eval.max_windows,
            batch=config.train.micro_batch,
            rank=mesh.data_rank,
            world=mesh.data_world,
            vocab_size=vocab_size,
            device=mesh.device,
        )
    if not batches or data.bytes_of_ids is None:
        return []
    return [EvalHook(config.eval, batches, torch.from_numpy(data.bytes_of_ids).to(mesh.device))]


def _monitors(
    config: JobConfig,
    data: Data,
    vocab: VocabParallelEmbedding,
    matrix: VocabOptimizer,
    seen: Seen | None,
    mesh: Mesh,
    step: int,
    log: MetricsLog | None,
) -> list[Hook]:
    """What looks at the matrix while it trains, and at what the layers make of it."""
    monitors: list[Hook] = []
    if config.vocab.untie_at is not None:
        monitors.append(TieDrift(vocab, config.log.every))
    if seen is not None:
        monitors.append(EmbeddingHealth(config.monitor.embedding, vocab, matrix, seen, mesh, step))
    if config.monitor.lens:
        windows = list(validation_windows(config, data).values())
        files = [file for corpus in data.corpora.values() for file in corpus.train]
        monitors.append(LensMonitor.of(config.monitor, windows, files, mesh, vocab.shard.vocab_size, log))
    return monitors


def _deadlines(config: JobConfig, started: float, manager: CheckpointManager) -> list[StopCheck]:
    """The run's own time limit, and that of its job: ROWSHARD_DEADLINE. ValueError where that is no unix time."""
    limits = []
    if config.train.time_limit_seconds is not None:
        limits.append((StopReason.TIME_LIMIT, started + config.train.time_limit_seconds))
    given = os.environ.get("ROWSHARD_DEADLINE")
    if given:
        try:
            limits.append((StopReason.REQUESTED, float(given)))
        except ValueError:
            raise ValueError(f"ROWSHARD_DEADLINE={given} in the environment must be a unix time") from None
    reserve = config.checkpoint.seconds_before_limit
    return [(reason, Deadline(limit, reserve, lambda: manager.longest)) for reason, limit in limits]


def _leave_at_once() -> None:
    """`main`; a failing rank ends without Python's shutdown, which may wait for a collective that never ends."""
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int) or Exit.of(ended.code).good:
            raise
        code = int(ended.code)
    except Exception:
        traceback.print_exc()
        code = int(Exit.CRASHED)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave_at_once()
