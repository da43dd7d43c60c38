"""The bar, the time left, the table at the end of a run."""

import time

import pytest

from pretrain.config.monitor import LogConfig
from pretrain.monitor import MetricsLog
from pretrain.monitor.console import RECENT, Console, since_process_start


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_forgets_a_slow_start(clock, capsys):
    console = Console(0, 1000)
    clock[0] += 600  # compiling
    console.stepped(1, 100.0)
    assert console.left(1) == "166:30:00"
    for step in range(2, RECENT + 2):
        clock[0] += 2
        console.stepped(step, 100.0)
    seconds = 2 * (1000 - RECENT - 1)
    assert console.left(RECENT + 1) == f"0:{seconds // 60}:{seconds % 60:02d}"
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("first step: done ") and said.endswith(" s after this rank started")


def test_a_process_knows_its_age():
    before = since_process_start()
    time.sleep(0.05)
    assert 0.04 <= since_process_start() - before < 5 and before < 24 * 3600


def test_the_table_has_last_and_best_of_all_starts(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 0, 40)
    for step, loss in ((10, 3.0), (20, 2.0)):
        log.write({"step": step, "loss": loss, "val_loss": loss + 1, "val_bits_per_byte": loss / 2})
    log.close()
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 20, 40)
    log.write({"step": 30, "loss": 2.5, "tokens": 1500, "tokens_per_s": 4000.0, "tokens_per_s_per_rank": 2000.0})
    log.write({"step": 40, "loss": 2.25, "tokens": 2000, "tokens_per_s": 4000.0, "mfu": 0.5, "peak_memory_gib": 1.5})
    log.close()
    assert log.summary().table(40, 20, 40, 2000, 3661.0, ["step 20", "step 40"]).splitlines() == [
        "steps          40 of 40, 20 of them in this start",
        "tokens         2,000",
        "loss           2.2500 (best 2.0000 at step 20)",
        "val loss       3.0000 (best 3.0000 at step 20)",
        "val bits/byte  1.0000 (best 1.0000 at step 20)",
        "time           1:01:01 in this start",
        "speed          4,000 tokens/s, 2,000 per rank, MFU 50.0%, at the end",
        "peak memory    1.50 GiB, of the rank that holds most",
        "checkpoints    2, the newest is step 40",
    ]


def test_a_start_without_steps_has_no_speed(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 0, 40)
    log.write({"step": 20, "loss": 2.0, "tokens_per_s": 4000.0, "peak_memory_gib": 1.5})
    log.close()
    lines = log.summary().table(40, 20, 20, 1000, 1.0, ["step 20"]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["steps", "tokens", "loss", "time", "checkpoints"]


def test_the_table_of_a_run_without_steps_is_short(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 0, 40)
    log.close()
    table = log.summary().table(40, 0, 0, 0, 1.0, [])
    assert table.splitlines() == ["steps        0 of 40", "tokens       0", "time         0:00:01", "checkpoints  0"]
