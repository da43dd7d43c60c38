#!/usr/bin/env python
"""Train on this machine: `python launch/local.py --help`.

Composes the configuration once, checks it, freezes it to RUN/config.yaml and starts the ranks with torchrun.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.distributed.run as torchrun  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

from data_prep.command import EXIT_INTERRUPTED, fail, run_hydra  # noqa: E402
from pretrain import config as configuration  # noqa: E402
from pretrain.checkpoint import RANKS_LOCK  # noqa: E402
from pretrain.config import LAUNCH_LOCK, TrainConfig, hold  # noqa: E402


def main() -> None:
    """Exits 0 when the run has got where it should, or was stopped and saved; 2 on a wrong setting; else 1."""
    configuration.register()
    run_hydra(_composed)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="local")
def _composed(composed: DictConfig) -> None:
    try:
        OmegaConf.set_struct(composed, False)
        nproc = ranks_here(composed.pop("nproc"))
        config = configuration.build(composed)
        corpus = configuration.check(config, nproc, "cuda" if torch.cuda.is_available() else "cpu")
        with hold(config.run_dir, LAUNCH_LOCK):
            with hold(config.run_dir, RANKS_LOCK):  # free, or ranks of a killed launcher are still at work
                configuration.freeze(config, corpus)
            code = run_ranks(config, nproc)
    except (ValueError, OSError) as error:
        sys.exit(fail(str(error)))
    if code == 0:
        print(farewell(config))
    sys.exit(code)


def ranks_here(nproc: object) -> int:
    """How many ranks to start. ValueError unless it is a whole number that this machine's GPUs allow."""
    gpus = torch.cuda.device_count()
    if not isinstance(nproc, int) or nproc < 0:
        raise ValueError(f"nproc={nproc} must be a number of ranks (0: one a GPU, or one where there is none)")
    if gpus and nproc > gpus:
        raise ValueError(f"nproc={nproc} must not exceed the {gpus} GPUs of this machine")
    return nproc or gpus or 1


def run_ranks(config: TrainConfig, nproc: int) -> int:
    """Runs the ranks to their end under torchrun; 0 if all went well.

    SIGTERM and SIGINT are handed to the ranks, which save and stop; torchrun's own handlers would kill them.
    """
    arguments = ["--standalone", f"--nproc-per-node={nproc}", "--signals-to-handle=SIGHUP,SIGQUIT"]
    arguments += ["-m", "pretrain.train", str(config.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))

    def hand_on(number: int, frame: object) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            sys.exit(EXIT_INTERRUPTED)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what went wrong
    try:
        torchrun.run(torchrun.get_args_parser().parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        print(f"error: rank {rank} failed ({how}); the run stopped: {config.run.dir}", file=sys.stderr)
        return 1
    return 0


def farewell(config: TrainConfig) -> str:
    run = config.run.dir
    return (
        f"run: {run}\n"
        f"curves: tensorboard --logdir {config.run_dir.parent}\n"
        f"sample: python -m pretrain.generate run={run} prompt='def '"
    )


if __name__ == "__main__":
    main()
