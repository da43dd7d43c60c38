"""Runs a function on gloo ranks: real processes that print a stack trace and end if they hang.

The ranks are forked from a server that has imported their modules but started no thread, so a test with four ranks
takes one second instead of half a minute. The function must be importable (defined at the top level of a test module).
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is imported
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # every ZeRO engine imports it, and with it all of inductor
        "pretrain.train",
        "pretrain.lens.plot",  # matplotlib
        "tests.frozen",
    ]
)


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Runs `function(rank, world, *args)` on each rank of a gloo group; returns the results in rank order.

    Raises AssertionError with the first failing rank's traceback. A rank still running after `timeout` seconds
    prints the stack of all its threads and dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run(world, Path(folder) / "rendezvous", timeout, function, args)


def run_alone(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> Any:
    """Returns `function(*args)` of a process of its own without a process group, for what must not be undone."""
    (result,) = _run(1, None, timeout, function, args)
    return result


def _run(world: int, rendezvous: Path | None, timeout: float, function: Callable[..., Any], args: Any) -> list[Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks, pipes = [], []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        arguments = (rank, world, rendezvous, send, timeout, function, args)
        process = context.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        send.close()
        ranks.append(process)
        pipes.append(receive)
    try:
        return _collect(pipes)
    finally:
        for process in ranks:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """Runs function(*args) in a process of its own, forked from the server: no rank, and nothing to import."""
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in results]):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                good, value = False, "died without a message (see its stack trace above)"
            assert good, f"rank {rank} of {len(pipes)}: {value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int,
    world: int,
    rendezvous: Path | None,
    send: Connection,
    timeout: float,
    function: Callable[..., Any],
    args: Any,
) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if rendezvous is None:
            send.send_bytes(pickle.dumps((True, function(*args))))
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        # plain pickle: a Connection would send a tensor as a handle to this process, which ends soon
        send.send_bytes(pickle.dumps((True, function(rank, world, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        faulthandler.cancel_dump_traceback_later()
        send.close()
