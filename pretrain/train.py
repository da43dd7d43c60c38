"""One rank of a training: reads the frozen configuration, builds the parts, trains.

`python -m pretrain.train RUN/config.yaml` runs once per rank, with the environment of torchrun. Users type
`python launch/local.py` instead.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from data_prep.errors import DataError

from .announce import announce
from .build import about, batch_loader, build_model, vocab_parallel
from .changes import Change, markdown, settings_changed, settings_of
from .checkpoint import CheckpointError, DamagedCheckpoint, checkpoints, step_of
from .checkpoint.manager import CheckpointManager
from .checkpoint.state import ModelState, TrainState
from .checks import check_job, reached
from .compose import load_config
from .config.job import JobConfig
from .control import RunControl
from .corpora import vocab_rows
from .data import Data
from .exits import Exit, leave
from .hooks import Run
from .hooks.registry import build_hooks
from .interop.weights import initialise
from .locks import RANKS_LOCK, lock_run
from .memory import OutOfMemory, shortage_named
from .mesh import TIMEOUT, Mesh, device_error, lost_peer, ranks, ranks_of_a_node
from .monitor import MetricsLog
from .monitor.console import since_process_start
from .parts import ModelParts
from .rendezvous import NotMet, hopeless, words
from .stops import StopReason, StopRequests
from .trainer import Trainer

LOCK_SECONDS = 180  # to wait for the lock of an earlier start
FREEZE = "without that launcher, write config.yaml again: launch/local.py resume=RUN KEY=VALUE freeze=true"

HELP = """One rank of a training, as a launcher starts it. To train: python launch/local.py --help

  python -m pretrain.train RUN/config.yaml                                      a single rank
  torchrun --nproc-per-node 2 -m pretrain.train RUN/config.yaml                 on several nodes with torchrun's flags

launch/local.py freezes RUN/config.yaml; with freeze=true it starts nothing. Each rank reads RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. Ends with the codes of
pretrain/exits.py: 0 finished, 75 stopped and saved, others failed.
"""


def main() -> None:
    """Exits with an `Exit` code; on a failure prints a line or a traceback on stderr."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch.profiler prints lines of its own
    rank = os.environ.get("RANK", "0")
    try:
        with StopRequests(after=signal.SIG_IGN) as requests:  # Slurm may send more signals while a rank ends
            config = load_config(_config_path(sys.argv[1:]))
            with ExitStack() as group:
                with requests.ending(partial(_end_unstarted, rank)):
                    device = group.enter_context(ranks(_timeout(config)))
                reason = train(config, device, requests)
        sys.exit(Exit.STOPPED if reason is StopReason.REQUESTED else Exit.FINISHED)
    except (CheckpointError, FloatingPointError) as error:  # all ranks raise these
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
    """Ends this process. May be called from any thread."""
    print(f"rank {rank} was asked to stop before the ranks had met: nothing to save", file=sys.stderr, flush=True)
    os._exit(Exit.UNSTARTED)


def _config_path(arguments: list[str]) -> Path:
    """Returns the only argument. Without one prints the help and exits with 0."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP.rstrip())
        sys.exit(0)
    if len(arguments) > 1 or ("=" in arguments[0] and not Path(arguments[0]).exists()):
        said = " ".join(arguments)
        raise ValueError(f"{said} must be the path of a run's config.yaml: settings go to launch/local.py; see --help")
    return Path(arguments[0])


def train(config: JobConfig, device: torch.device, requests: StopRequests) -> StopReason:
    """Trains up to the last step, or until a reason to stop, and saves. Returns the reason. Every rank calls it."""
    control, world = RunControl(config.train, requests), torch.distributed.get_world_size()
    data = check_job(config, world, device.type, environment=os.environ)
    rows = vocab_rows(config, data)
    parallel = vocab_parallel(config, rows, world, ranks_of_a_node(device), device.type)
    mesh = Mesh.of(parallel.ranks, device, _timeout(config))
    with _held(config, mesh), control, shortage_named(config, mesh):
        parts = ModelParts(*build_model(config, mesh, rows), mesh)
        run = Run(data, parts, _manager(config, data, parts))
        run.manager.hooks = hooks = build_hooks(config, run)
        state, found = _restore(config, run.manager)
        loader = batch_loader(config, data, mesh, parts.model.vocab, state.left_out)
        loader.load_state_dict(state.samples)
        if mesh.rank == 0:
            changes = settings_changed(config.run_dir, found)
            announce(config, data, loader.samples, parts.model, mesh, parallel, state, found, changes)
            if state.step >= config.train.last_step:
                print(f"nothing to train: {reached(config, state.step)}; {FREEZE}", flush=True)
            run.log = _log(config, data, state.step, changes)
        control.watch_saves(run.manager, config.checkpoint.reserve_seconds, os.environ)
        with closing(run), closing(loader):
            trainer = Trainer(parts, loader, config.train, config.optim, state, hooks, control)
            for hook in hooks:
                hook.before_training(trainer)
            reason = trainer.fit()
            control.alive()
            saved = run.manager.save(state)
            run.manager.wait()
    if run.log is not None:
        _print_summary(config, run.log, state)
        print(f"{'stopped and saved' if reason else 'saved'}: {saved}", flush=True)
    return reason


def _print_summary(config: JobConfig, log: MetricsLog, state: TrainState) -> None:
    """Prints the table at the end of a run. Everything is saved by now, so a fault of the table fails no run."""
    try:
        saved = [f"step {step_of(folder):,}" for folder in checkpoints(config.run_dir)]
        done = state.step, state.tokens
        print(f"\n{log.summary().table(config.train.steps, log.first_step, *done, since_process_start(), saved)}\n")
    except Exception as error:
        print(f"warning: no summary of this run: {error}", file=sys.stderr, flush=True)


def _timeout(config: JobConfig) -> timedelta:
    """Returns the timeout of collectives: longer than the watchdog's, whose stacks explain more."""
    return TIMEOUT + timedelta(seconds=config.train.hang_timeout)


@contextmanager
def _held(config: JobConfig, mesh: Mesh) -> Iterator[None]:
    """Locks the run, on the first rank. Raises OSError if another process still holds it after LOCK_SECONDS.

    A network file system may need that long to notice that the node of an earlier start is down.
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


def _manager(config: JobConfig, data: Data, parts: ModelParts) -> CheckpointManager:
    state = ModelState(parts.engine, parts.model.vocab, parts.vocab_optimizer, parts.mesh)
    facts = about(config, data)
    return CheckpointManager(config.run_dir, state, parts.mesh, config.checkpoint, seed=config.seed, about=facts)


def _restore(config: JobConfig, manager: CheckpointManager) -> tuple[TrainState, Path | None]:
    """Returns the state of the run and the checkpoint that it resumes or decays from, if any; a new run may start with
    given weights.
    """
    state, found = manager.restore(lambda fault: print(f"warning: {fault}", file=sys.stderr, flush=True))
    if found is None and config.decay_from is not None:
        found = Path(config.decay_from)
        state = manager.load(found)
        manager.check_shards()
    elif found is None and config.init_from is not None:
        initialise(config.init_from, manager.model)
        manager.check_shards()
    return state, found


def _log(config: JobConfig, data: Data, step: int, changes: list[Change]) -> MetricsLog:
    log = MetricsLog(config.run_dir, config.log, step, config.train.steps)
    log.describe(settings_of(config.run_dir), data.tokenizer)
    if changes:
        log.tell("settings changed", markdown(changes), step)
    return log


if __name__ == "__main__":
    leave(main)
