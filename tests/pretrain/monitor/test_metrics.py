"""metrics.jsonl and TensorBoard tell each step once, in full precision."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config.monitor import LogConfig
from pretrain.monitor import MetricsLog
from pretrain.monitor.append import GrowingFile


def write(run: Path, start: int, steps: range, factor: float, tensorboard: bool = True) -> None:
    """One launch of a run that logs those steps."""
    log = MetricsLog(run, LogConfig(tensorboard=tensorboard), start, 100)
    for step in steps:
        log.write({"step": step, "loss": factor * math.pi / step, "val_bits_per_byte": factor / step})
    log.close()


def objects(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_full_precision(tmp_path):
    write(tmp_path, 0, range(1, 4), 1.0, tensorboard=False)
    assert objects(tmp_path) == [{"step": s, "loss": math.pi / s, "val_bits_per_byte": 1.0 / s} for s in (1, 2, 3)]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("cut", [b"", b'{"step": 5, "lo', b'{"step": 2}', b"\xff\n", b"[]\n", b"{}\n"])
def test_a_resumed_run_goes_on_without_overlap(tmp_path, cut):
    write(tmp_path, 0, range(1, 6), 1.0, tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(cut)  # what a kill or a power cut left of a line
    write(tmp_path, 3, range(4, 7), 2.0, tensorboard=False)
    assert [(o["step"], o["loss"]) for o in objects(tmp_path)] == [
        (step, (1.0 if step <= 3 else 2.0) * math.pi / step) for step in range(1, 7)
    ]


def test_tensorboard_shows_each_step_once(tmp_path):
    write(tmp_path, 0, range(1, 6), 1.0)
    write(tmp_path, 3, range(4, 7), 2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "val/bits_per_byte"}
    for tag, scale in (("train/loss", math.pi), ("val/bits_per_byte", 1.0)):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        truth = [(step, pytest.approx((1.0 if step <= 3 else 2.0) * scale / step)) for step in range(1, 7)]
        assert points == truth


@pytest.mark.parametrize("logged", [True, False], ids=["with its loss", "without"])
def test_what_a_stop_kept_from_the_last_step_is_added_to_it(tmp_path, logged):
    write(tmp_path, 0, range(1, 6), 1.0)
    log = MetricsLog(tmp_path, LogConfig(), 5 if logged else 6, 100)
    log.complete(5 if logged else 6, {"val_loss": 2.5})
    log.write({"step": 7, "loss": 0.5})
    log.close()
    lines = objects(tmp_path)
    assert [line["step"] for line in lines] == ([1, 2, 3, 4, 5, 7] if logged else [1, 2, 3, 4, 5, 6, 7])
    assert lines[-2]["val_loss"] == 2.5 and ("loss" in lines[-2]) == logged and lines[0]["loss"] == math.pi
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/loss")] == [(lines[-2]["step"], 2.5)]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 7]


def test_the_restarts_are_told_in_tensorboard(tmp_path):
    """Each start tells of all before it."""
    write(tmp_path, 0, range(1, 6), 1.0)
    end = {"time": 0.0, "attempt": 1, "job": "7-0", "from": -1, "step": 3, "class": "KILLED", "rank": 1, "host": "n2"}
    end |= {"how": "killed by SIGKILL", "last": "", "decision": "restart", "why": "n2 is excluded"}
    (tmp_path / "restarts.jsonl").write_text(json.dumps(end) + '\n{"time": 1, "att')
    write(tmp_path, 3, range(4, 7), 1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("restarts/text_summary")
    (text,) = event.tensor_proto.string_val
    assert event.step == 3
    *_, row = text.decode().splitlines()
    assert "KILLED, rank 1 on n2: killed by SIGKILL | restart: n2 is excluded |" in row


def test_the_line_on_the_terminal(tmp_path, capsys):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 0, 1000)
    log.write({"step": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.25, "tokens": 5000, "tokens_per_s": 12345.6})
    log.write({"step": 20, "loss": 2.25, "tokens_per_s": 12345.6, "mfu": 0.4125, "peak_memory_gib": 34.104})
    log.write({"step": 1000, "val_loss": 3.5, "val_bits_per_byte": 1.25})
    log.close()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step   10/1000  loss 2.5000  lr 1.00e-03  norm 0.250  12,346 tokens/s  ")
    assert second.startswith("step   20/1000  loss 2.2500  12,346 tokens/s  MFU 41.2%  memory 34.10 GiB  ")
    assert last == "step 1000/1000  val loss 3.5000  val bits/byte 1.2500  0:00:00 left"


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match=r"log\.every=0 must be at least 1"):
        LogConfig(every=0)


def test_rows_are_listed_and_bins_are_grouped(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(), 0, 100)
    log.write({"step": 2, "grad_cosine/never": 0.5, "embedding_spectrum/top1pct": 1.0}, {"head_damaged": [3, 5]})
    log.close()
    assert objects(tmp_path)[0]["rows"] == {"head_damaged": [3, 5]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"grad/cosine/never", "embedding/spectrum/top1pct"}
    (event,) = events.Tensors("rows/head_damaged/text_summary")
    assert event.tensor_proto.string_val == [b"3, 5"]


def steps_of_board(folder: Path) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]


def test_a_full_disk_costs_no_step(tmp_path, monkeypatch, capsys):
    """A part of a record that still found room is taken back; all is written once there is room again."""
    log, write = MetricsLog(tmp_path, LogConfig(), 0, 100), os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in range(1, 7):
        with monkeypatch.context() as patch:
            if 3 <= step <= 5:
                patch.setattr("pretrain.monitor.append.os.write", full)
            log.write({"step": step, "loss": 1.0 / step})
        written = 2 if 3 <= step <= 5 else step
        assert [line["step"] for line in objects(tmp_path)] == list(range(1, written + 1))
    log.close()
    assert [line["step"] for line in objects(tmp_path)] == steps_of_board(tmp_path / "tensorboard") == list(range(1, 7))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("No space left on device; training goes on" in line for line in warnings)


def test_memory_for_what_cannot_be_written_is_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.monitor.append.KEPT_BYTES", 100)
    (tmp_path / "file").mkdir()
    file = GrowingFile(tmp_path / "file")
    for number in range(50):
        file.write(b"%09d\n" % number)
    (tmp_path / "file").rmdir()
    file.write(b"last\n")
    file.close()
    assert (tmp_path / "file").read_text().splitlines() == [f"{number:09d}" for number in range(40, 50)] + ["last"]
    assert capsys.readouterr().err.splitlines()[1:] == [f"warning: {tmp_path / 'file'}: 40 records are lost"]


@pytest.mark.parametrize("what", ["tensorboard", "metrics.jsonl"])
def test_what_is_removed_while_a_run_trains_begins_again(tmp_path, what):
    log = MetricsLog(tmp_path, LogConfig(), 0, 100)
    for step in range(1, 5):
        if step == 3:
            path = tmp_path / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        log.write({"step": step, "loss": 1.0 / step})
    log.image("a picture", np.zeros((2, 2, 3), np.uint8), 4)
    log.close()
    found = {
        "metrics.jsonl": [line["step"] for line in objects(tmp_path)],
        "tensorboard": steps_of_board(tmp_path / "tensorboard"),
    }
    assert found.pop(what) == [3, 4] and list(found.values()) == [[1, 2, 3, 4]]


def test_files_that_cannot_be_opened_are_a_warning_each(tmp_path, capsys):
    """From the first step to the last, and after a resume."""
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("no folder")
    (tmp_path / "restarts.jsonl").mkdir()
    log = MetricsLog(tmp_path, LogConfig(), 2, 100)
    log.complete(2, {"val_loss": 1.0})
    for step in range(3, 9):
        log.write({"step": step, "loss": 1.0}, {"head_damaged": [1]})
    log.close()
    said = capsys.readouterr()
    assert said.out.count("step ") == 7
    assert said.err.count("training goes on") == 2 and "Traceback" not in said.err
