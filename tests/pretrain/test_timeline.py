"""The parts of a step: who hears of them, and what the clocks measure."""

import time

import pytest
import torch
import torch.distributed as dist

from pretrain.clocks import Clock, DeviceClock
from pretrain.timeline import BACKWARD, DATA, FORWARD, HEAD, HOOKS, OPTIMIZER, PARTS, Timeline
from tests.ranks import run_ranks

STEP = (DATA, HOOKS, FORWARD, HEAD, BACKWARD, FORWARD, HEAD, BACKWARD, OPTIMIZER, HOOKS, OPTIMIZER, HOOKS)


def test_an_evaluation_has_no_head_part():
    timeline, told = Timeline(), []
    timeline.mark(HEAD)  # nobody watches
    timeline.watchers.append(told.append)
    for part in (*STEP, HEAD, HEAD, *STEP):
        timeline.mark(part)
    assert told == [*STEP, *STEP]


def test_the_parts_are_the_time_from_mark_to_mark(monkeypatch):
    clock, now = Clock(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for measured in (True, False, True):
        clock.begin(measured)
        for i, part in enumerate(STEP):
            clock.mark(part)
            now[0] += 2.0**i
        found = clock.seconds()
        if not measured:
            assert found == {}
            continue
        lengths = [2.0**i for i in range(len(STEP) - 1)]  # the last mark is the end
        of_parts = {part: sum(s for s, p in zip(lengths, STEP, strict=False) if p == part) for part in PARTS}
        assert found == {**{f"step_s/{part}": of_parts[part] for part in PARTS}, "communication_s": 0.0}
    clock.begin(False)


def waits_of_a_step(rank: int, world: int) -> tuple[float, float, bool]:
    """Seconds that this rank has waited in the step, that it would measure after it, and if `wait` is torch's again."""
    plain, clock = dist.Work.wait, Clock()
    clock.begin(True)
    clock.mark(DATA)
    work = dist.all_reduce(torch.ones(10), async_op=True)
    if rank == 1:
        time.sleep(0.1)  # the other rank waits for this one
    work.wait()
    clock.mark(HOOKS)
    dist.all_reduce(torch.ones(10))  # not in the step
    seconds = clock.seconds()
    clock.begin(False)
    return seconds["communication_s"], seconds["step_s/data"], dist.Work.wait is plain


def test_waiting_for_collectives_is_communication():
    for waited, step, restored in run_ranks(2, waits_of_a_step):
        assert 0 < waited < step and restored


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_measures_by_events_without_a_wait():
    clock = DeviceClock()
    clock.begin(True)
    x = torch.ones(2048, 2048, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in STEP:
            clock.mark(part)
            x = x @ x
        clock.seconds()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    found = clock.seconds()
    assert found.keys() == {f"step_s/{part}" for part in PARTS} and all(value > 0 for value in found.values())
