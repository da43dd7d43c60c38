#!/usr/bin/env python
"""Train on this machine: `python launch/local.py --help`.

Composes the configuration once, checks it, freezes it to RUN/config.yaml, and starts the ranks. Starts them again after
a failure, if a restart may help. The runs of a sweep (--multirun) follow one another.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from glob import glob
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

from hydra.core.config_store import ConfigStore  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from data_prep.columns import aligned  # noqa: E402
from data_prep.command import fail, one_line, warn  # noqa: E402
from data_prep.errors import headline  # noqa: E402
from data_prep.mistakes import INSTALLED  # noqa: E402
from data_prep.overrides import shown  # noqa: E402
from launch import resume, sweep  # noqa: E402
from launch.alone import alone  # noqa: E402
from launch.restart import Decision, History, RestartConfig, cause, changes_at_start, decide, newest_step  # noqa: E402
from launch.supervisor import Supervisor  # noqa: E402
from pretrain.checks import check_job, check_logs, check_settings, finished  # noqa: E402
from pretrain.compose import build_config, freeze, register_groups  # noqa: E402
from pretrain.config.job import JobConfig  # noqa: E402
from pretrain.data import Data  # noqa: E402
from pretrain.locks import LAUNCH_LOCK, RANKS_LOCK, check_free, lock_run  # noqa: E402
from pretrain.metrics_file import logged  # noqa: E402
from pretrain.stops import StopRequests  # noqa: E402

GPU_DEVICES = (  # NVIDIA: cards, the driver, Jetson, WSL; AMD
    "/dev/nvidia*",
    "/proc/driver/nvidia",
    "/sys/module/nvidia",
    "/dev/nvhost*",
    "/dev/dxg",
    "/dev/kfd",
)
PCI_DEVICES = "/sys/bus/pci/devices/*"
GPU_VENDORS, DISPLAY_CLASS = ("0x10de", "0x1002"), "0x03"  # NVIDIA, AMD


class LocalConfig(NamedTuple):
    """Settings of the command besides the training."""

    nproc: int  # as typed; 0: one per GPU, or one without GPUs
    freeze: bool  # only check and freeze
    restart: RestartConfig


class Run(NamedTuple):
    """One training of the command."""

    config: JobConfig
    data: Data
    nproc: int  # ranks to start


def main() -> None:
    """Exits with 0 if each run is complete, or was stopped and saved; 2 if a setting is wrong; else 1."""
    alone()
    register_groups()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    with one_line():
        sys.argv[1:] = resume.in_full(sys.argv[1:])
    if composed := sweep.compose("local"):  # empty after --help and the like
        with one_line():
            code = launch(composed)
        sys.exit(code)


def launch(composed: sweep.Composed) -> int:
    """Checks and trains the composed runs; returns the exit code. Raises ValueError if a setting is wrong."""
    configs = [config for config, _ in composed]
    ours = settings_of(configs)
    sweep.resumed(composed)
    if len(composed) == 1:
        (run,) = checked(configs, ours)
        return train_one(run, ours)
    base = Path(sweep.run_dir(composed))
    for config, folder in zip(configs, sweep.folders(base, [overrides for _, overrides in composed]), strict=True):
        config.run.dir = str(folder)
    check_free(base, LAUNCH_LOCK)
    runs = checked(configs, ours)
    with lock_run(base, LAUNCH_LOCK):
        return train_all(base, runs, ours)


def settings_of(composed: list[DictConfig]) -> LocalConfig:
    """Removes the settings of the launch from the composed configurations. Raises ValueError if they differ."""
    found = []
    for config in composed:
        OmegaConf.set_struct(config, False)
        restart = OmegaConf.to_object(config.pop("restart"))
        found.append(LocalConfig(config.pop("nproc"), config.pop("freeze"), restart))  # type: ignore[arg-type]
    if any(ours != found[0] for ours in found):
        raise ValueError("--multirun is for settings of the training: a sweep has one nproc, freeze and restart")
    return found[0]


def checked(composed: list[DictConfig], ours: LocalConfig) -> list[Run]:
    """Checks all runs before one starts: first what needs no torch, whose import takes seconds."""
    for run in composed:
        resume.keep_decided(run)
    configs = [build_config(config) for config in composed]
    check_nproc(ours.nproc)
    if not isinstance(ours.freeze, bool):
        raise ValueError(f"freeze={ours.freeze} must be true or false")
    for config in configs:
        check_free(config.run_dir, LAUNCH_LOCK, RANKS_LOCK)  # checked again by train; here it needs no torch
    settled = [check_settings(config, ours.nproc or None) for config in configs]
    nproc, device = ours.nproc if ours.nproc and ours.freeze else ranks_here(ours.nproc), device_type()
    runs, say = [], cache(warn)  # a warning about several runs is printed once
    for config, known in zip(configs, settled, strict=True):
        data = check_job(config, nproc, device, warn=say, environment=os.environ, settled=known)
        check_logs(config, os.environ)
        runs.append(Run(config, data, nproc))
    if device == "cpu" and not ours.freeze and nproc > (cores := len(os.sched_getaffinity(0))):
        warn(f"nproc={nproc} should not exceed the {cores} CPU cores of this process: the ranks take turns")
    return runs


def train_one(run: Run, ours: LocalConfig) -> int:
    """Trains the only run of the command, and prints what to do next."""
    with StopRequests() as requests:
        code, done = train(run, ours, requests)
    if done is not None:
        print(done)
    elif ours.freeze:
        return code
    if code == 0:
        print(farewell(run.config, ours.nproc))
    return code


def train_all(base: Path, runs: list[Run], ours: LocalConfig) -> int:
    """Trains the runs of a sweep one after the other, up to a request to stop. The others go on after a failure.
    Returns 1 if a run has failed.
    """
    failed: dict[Path, str] = {}
    with StopRequests() as requests:
        for number, run in enumerate(runs, start=1):
            if requests.asked():
                break
            print(f"run {number} of {len(runs)}: {run.config.run.dir}", flush=True)
            try:
                code, done = train(run, ours, requests)
                if done is not None:
                    print(done, flush=True)
                if code:
                    ends = History(run.config.run_dir).lines()
                    failed[run.config.run_dir] = ends[-1]["how"] if ends else "see above"
            except (ValueError, OSError) as error:  # for example, another process has taken the run
                failed[run.config.run_dir] = "not started"
                fail(headline(error))
    if not ours.freeze:
        print("\n".join(["", *aligned([["run", "state", "steps", "loss", "val loss"], *summary(runs, failed)])]))
        print(f"curves: {shown('tensorboard', '--logdir', str(base))}")
        print(f"report: {shown('python', '-m', 'pretrain.sweep_report', f'runs={base}')}")
    print(f"runs: {base}")
    return 1 if failed else 0


def summary(runs: list[Run], failed: dict[Path, str]) -> Iterator[list[str]]:
    """Yields a row for each run of a sweep: name, state, steps, losses. failed: how a run has failed, by its folder."""
    for config, _, _ in runs:
        step, last = max(0, newest_step(config.run_dir)), config.train.last_step
        state = "finished" if step >= last else "stopped" if step else "not started"
        if config.run_dir in failed:
            state = f"failed ({failed[config.run_dir]})"
        try:
            lines = logged(config.run_dir)
        except (ValueError, OSError):
            lines = []
        values = [next((line[key] for line in reversed(lines) if key in line), None) for key in ("loss", "val_loss")]
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        yield [config.run_dir.name, state, f"{step} of {last}", *cells]


def train(run: Run, ours: LocalConfig, requests: StopRequests) -> tuple[int, str | None]:
    """Freezes the settings and runs the ranks. Returns the exit code, and a line if nothing was left to train."""
    config = run.config
    with lock_run(config.run_dir, LAUNCH_LOCK):
        with lock_run(config.run_dir, RANKS_LOCK):  # refused while ranks of a killed launcher still run
            if (done := finished(config, run.data)) is not None:
                return 0, done
            freeze(config, run.data)
        if ours.freeze:
            print(f"frozen: {config.path}; start it: torchrun … -m pretrain.train {shlex.quote(str(config.path))}")
            return 0, None
        return run_ranks(config, run.nproc, ours.restart, requests), None


def check_nproc(nproc: object) -> None:
    """Raises ValueError if `nproc` is not a number of ranks."""
    if not isinstance(nproc, int) or nproc < 0:
        raise ValueError(f"nproc={nproc} must be a number of ranks (0: one per GPU, or one without GPUs)")


def ranks_here(nproc: int) -> int:
    """Returns the number of ranks to start. Raises ValueError if it exceeds the GPUs of this machine."""
    found = gpus()
    if found and nproc > found:
        raise ValueError(f"nproc={nproc} must not exceed the {found} GPUs of this machine")
    return nproc or found or 1


def gpus() -> int:
    """Counts the GPUs that torch sees. Without a GPU in the system torch is not imported, which takes seconds."""
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def device_type() -> str:
    """Returns the device type of the ranks: cuda or cpu."""
    if not gpus():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu() -> bool:
    """True if the system may have a GPU. Device files may be missing until first use, so the bus is searched too."""

    if any(glob(pattern) for pattern in GPU_DEVICES):
        return True
    return any(_is_gpu(Path(device)) for device in glob(PCI_DEVICES))


def _is_gpu(device: Path) -> bool:
    """True if a PCI device is a graphics card of a vendor that torch supports."""
    try:
        vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text()
    except OSError:
        return False
    return vendor in GPU_VENDORS and kind.startswith(DISPLAY_CLASS)


def run_ranks(config: JobConfig, nproc: int, restart: RestartConfig, requests: StopRequests) -> int:
    """Runs the ranks, and restarts them as the policy says. Returns 0 if the last start ended well.

    Forwards SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 to the ranks, which save and stop; no restart follows.
    """
    from torch.distributed import TCPStore  # only now: refusing a setting needs no torch

    terminal.share_status()  # rank 0 draws one
    history, command = History(config.run_dir), [sys.executable, "-m", "pretrain.train", str(config.path)]
    while True:
        start_step, changes = newest_step(config.run_dir), changes_at_start(config.run_dir)
        store = TCPStore("127.0.0.1", 0, is_master=True)
        records = Supervisor(command, environments(nproc, store.port), requests).run()
        terminal.status("")  # of a rank that could not remove it
        first, step = cause(records), newest_step(config.run_dir)
        decision, why = decide(first.ending, step > start_step, history.fruitless() + (step <= start_step), restart)
        if decision is Decision.RESTART and (first.ending.asked or requests.asked()):
            decision, why = Decision.STOP, "stopped on request"
        history.write(f"local-{os.getpid()}", start_step, step, first, decision, why, changes)
        if first.ending.good or first.ending.asked:
            return 0
        what = f"error: rank {first.rank} failed ({first.how})"
        if decision is Decision.RESTART:
            print(f"{what}; the run starts again: {why}", file=sys.stderr, flush=True)
            requests.sleep(restart.delay)
        if decision is not Decision.RESTART or requests.asked():
            print(f"{what}; the run stopped, {why}: {config.run.dir}", file=sys.stderr, flush=True)
            return 1


def environments(nproc: int, port: int) -> dict[int, dict[str, str]]:
    """Builds each rank's environment for `pretrain.train`. The launcher owns the store at that port."""
    given = os.environ | {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    given.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    return {rank: given | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)}


def farewell(config: JobConfig, nproc: int = 0) -> str:
    """Lists the next commands. nproc: as on the command line."""
    run = config.run.dir
    here = INSTALLED or Path.cwd() == ROOT
    own = "" if here else f"PYTHONPATH={shlex.quote(str(ROOT))} PYTHONSAFEPATH=1 "  # of this code
    command = ["rowshard-generate"] if INSTALLED else ["python", "-m", "pretrain.generate"]
    sample = shown(*command, f"run={run}", "prompt=def ")
    curves = shown("tensorboard", "--logdir", str(config.run_dir.parent))
    lines = [f"run: {run}", f"curves: {curves}"]
    if (step := newest_step(config.run_dir)) < config.train.steps:
        script = "launch/local.py" if here else str(ROOT / "launch" / "local.py")
        again = ["rowshard-train"] if INSTALLED else ["python", script]
        ranks = [f"nproc={nproc}"] if nproc else []
        further = ["train.stop_after=null"] if step >= config.train.last_step else []
        lines.append(f"resume: {shown(*again, *ranks, f'run.dir={run}', *further)}")
    return "\n".join([*lines, f"sample: {own}{sample}"])


if __name__ == "__main__":
    main()
