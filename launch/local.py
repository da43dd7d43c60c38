#!/usr/bin/env python
"""Train on this machine: `python launch/local.py --help`.

Composes the configuration once, checks it, freezes it to RUN/config.yaml, and starts the ranks. Starts them again after
a failure, if a restart may help.
"""

import os
import shlex
import sys
from glob import glob
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

from hydra.core.config_store import ConfigStore  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from data_prep.command import one_line, run_hydra, warn  # noqa: E402
from data_prep.mistakes import INSTALLED  # noqa: E402
from data_prep.overrides import shown  # noqa: E402
from launch import resume  # noqa: E402
from launch.alone import alone  # noqa: E402
from launch.restart import Decision, History, RestartConfig, cause, changes_at_start, decide, newest_step  # noqa: E402
from launch.supervisor import Supervisor  # noqa: E402
from pretrain.checks import check_job, check_logs, check_settings, finished  # noqa: E402
from pretrain.compose import build_config, freeze, register_groups  # noqa: E402
from pretrain.config.job import JobConfig  # noqa: E402
from pretrain.locks import LAUNCH_LOCK, RANKS_LOCK, check_free, lock_run  # noqa: E402
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


def main() -> None:
    """Exits with 0 if the run is complete, or was stopped and saved; 2 if a setting is wrong; else 1."""
    alone()
    register_groups()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    with one_line():
        sys.argv[1:] = resume.in_full(sys.argv[1:])
    run_hydra(_composed, "local", frozen=resume.settings)


def _composed(composed: DictConfig) -> None:
    with one_line():
        OmegaConf.set_struct(composed, False)
        asked, only_freeze = composed.pop("nproc"), composed.pop("freeze")
        restart: RestartConfig = OmegaConf.to_object(composed.pop("restart"))  # type: ignore[assignment]
        resume.apply(composed, list(HydraConfig.get().overrides.task))
        config = build_config(composed)
        check_nproc(asked)
        if not isinstance(only_freeze, bool):
            raise ValueError(f"freeze={only_freeze} must be true or false")
        check_free(config.run_dir, LAUNCH_LOCK, RANKS_LOCK)  # checked again below; here it needs no torch
        settled = check_settings(config, asked or None)
        nproc, device = asked if asked and only_freeze else ranks_here(asked), device_type()
        data = check_job(config, nproc, device, warn=warn, environment=os.environ, settled=settled)
        check_logs(config, os.environ)
        if device == "cpu" and not only_freeze and nproc > (cores := len(os.sched_getaffinity(0))):
            warn(f"nproc={nproc} should not exceed the {cores} CPU cores of this process: the ranks take turns")
        with lock_run(config.run_dir, LAUNCH_LOCK):
            with lock_run(config.run_dir, RANKS_LOCK):  # refused while ranks of a killed launcher still run
                done = finished(config, data)
                if done is None:
                    freeze(config, data)
            code = run_ranks(config, nproc, restart) if done is None and not only_freeze else 0
    if done is not None:
        print(done)
    elif only_freeze:
        print(f"frozen: {config.path}; start it: torchrun … -m pretrain.train {shlex.quote(str(config.path))}")
        sys.exit(0)
    if code == 0:
        print(farewell(config, asked))
    sys.exit(code)


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


def run_ranks(config: JobConfig, nproc: int, restart: RestartConfig) -> int:
    """Runs the ranks, and restarts them as the policy says. Returns 0 if the last start ended well.

    Forwards SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 to the ranks, which save and stop; no restart follows.
    """
    from torch.distributed import TCPStore  # only now: refusing a setting needs no torch

    terminal.share_status()  # rank 0 draws one
    history, command = History(config.run_dir), [sys.executable, "-m", "pretrain.train", str(config.path)]
    with StopRequests() as requests:
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
