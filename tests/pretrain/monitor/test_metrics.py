"""metrics.jsonl has each step once in full precision, and TensorBoard shows the same."""

import errno
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from torch.utils.tensorboard import summary

from data_prep.tokenizer_spec import TokenizerSpec
from pretrain.config.monitor import LogConfig
from pretrain.monitor import MetricsLog
from pretrain.monitor.append import GrowingFile
from pretrain.monitor.board import SETTINGS_FILE, records
from pretrain.monitor.older_board import events_in
from pretrain.monitor.scalars import BEST, map_tag, tag_of

LOSS, BITS = tag_of("loss"), tag_of("val_bits_per_byte")


def write(run: Path, start: int, steps: range, factor: float, tensorboard: bool = True) -> None:
    """Logs these steps, as one start of a run does."""
    log = MetricsLog(run, LogConfig(tensorboard=tensorboard), start, 100)
    for step in steps:
        log.write({"step": step, "loss": factor * math.pi / step, "val_bits_per_byte": factor / step})
    log.close()


def objects(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_full_precision(tmp_path):
    write(tmp_path, 0, range(1, 4), 1.0, tensorboard=False)
    assert objects(tmp_path) == [{"step": s, "loss": math.pi / s, "val_bits_per_byte": 1.0 / s} for s in (1, 2, 3)]
    assert not list(tmp_path.glob("events.*"))


@pytest.mark.parametrize("cut", [b"", b'{"step": 5, "lo', b'{"step": 2}', b"\xff\n", b"[]\n", b"{}\n"])
def test_a_resumed_run_continues_without_overlap(tmp_path, cut):
    write(tmp_path, 0, range(1, 6), 1.0, tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(cut)  # the rest of a line after a kill or a power cut
    write(tmp_path, 3, range(4, 7), 2.0, tensorboard=False)
    assert [(o["step"], o["loss"]) for o in objects(tmp_path)] == [
        (step, (1.0 if step <= 3 else 2.0) * math.pi / step) for step in range(1, 7)
    ]


def test_tensorboard_shows_each_step_once(tmp_path):
    write(tmp_path, 0, range(1, 6), 1.0)
    write(tmp_path, 3, range(4, 7), 2.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {LOSS, BITS, BEST["val_bits_per_byte"]}
    for tag, scale in ((LOSS, math.pi), (BITS, 1.0)):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        truth = [(step, pytest.approx((1.0 if step <= 3 else 2.0) * scale / step)) for step in range(1, 7)]
        assert points == truth


@pytest.mark.parametrize("logged", [True, False], ids=["with its loss", "without"])
def test_scalars_missed_by_a_stop_are_added_to_the_last_step(tmp_path, logged):
    write(tmp_path, 0, range(1, 6), 1.0)
    log = MetricsLog(tmp_path, LogConfig(), 5 if logged else 6, 100)
    log.complete(5 if logged else 6, {"val_loss": 2.5})
    log.write({"step": 7, "loss": 0.5})
    log.close()
    lines = objects(tmp_path)
    assert [line["step"] for line in lines] == ([1, 2, 3, 4, 5, 7] if logged else [1, 2, 3, 4, 5, 6, 7])
    assert lines[-2]["val_loss"] == 2.5 and ("loss" in lines[-2]) == logged and lines[0]["loss"] == math.pi
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars(tag_of("val_loss"))] == [(lines[-2]["step"], 2.5)]
    assert [event.step for event in events.Scalars(LOSS)] == [1, 2, 3, 4, 5, 7]


def test_tensorboard_shows_the_restarts(tmp_path):
    """Each start shows all starts before it."""
    write(tmp_path, 0, range(1, 6), 1.0)
    end = {"time": 0.0, "attempt": 1, "job": "7-0", "from": -1, "step": 3, "class": "KILLED", "rank": 1, "host": "n2"}
    end |= {"how": "killed by SIGKILL", "last": "", "decision": "restart", "why": "n2 is excluded"}
    (tmp_path / "restarts.jsonl").write_text(json.dumps(end) + '\n{"time": 1, "att')
    write(tmp_path, 3, range(4, 7), 1.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("about/restarts/text_summary")
    (text,) = event.tensor_proto.string_val
    assert event.step == 3
    *_, row = text.decode().splitlines()
    assert "KILLED, rank 1 on n2: killed by SIGKILL | restart: n2 is excluded |" in row
    log = MetricsLog(tmp_path, LogConfig(), 6, 100)
    log.rewind(2)  # to before these starts: TensorBoard drops what was written after that step
    log.close()
    shown = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Tensors("about/restarts/text_summary")] == [2]


def test_the_line_on_the_terminal(tmp_path, capsys):
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 0, 1000)
    seconds = {"data": 0.004, "forward": 0.2, "head": 0.3, "backward": 0.4, "optimizer": 0.096, "hooks": 0.0}
    split = {f"step_s/{part}": value for part, value in seconds.items()}  # parts below 1 % are left out
    log.write({"step": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.25, "tokens": 5000, "tokens_per_s": 12345.6})
    log.write({"step": 20, "loss": 2.25, "tokens_per_s": 12345.6, "mfu": 0.4125, "peak_memory_gib": 34.104} | split)
    log.write({"step": 1000, "val_loss": 3.5, "val_bits_per_byte": 1.25})
    log.close()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step   10/1000  loss 2.5000  lr 1.00e-03  norm 0.250  12,346 tokens/s")
    assert second.startswith("step   20/1000  loss 2.2500  12,346 tokens/s  MFU 41.2%  memory 34.10 GiB")
    assert second.endswith("  fwd 20% head 30% bwd 40% opt 10%") and "fwd" not in first
    assert last == "step 1000/1000  val loss 3.5000  val bits/byte 1.2500"


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match=r"log\.every=0 must be at least 1"):
        LogConfig(every=0)


def texts(run: Path, tag: str) -> dict[int, str]:
    events = EventAccumulator(str(run)).Reload()
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def test_rows_are_listed_with_their_tokens(tmp_path):
    """The first of many; a list that is empty only once, after one that was not."""
    spec = TokenizerSpec("bytes", r"\S+|\s+", {"<|endoftext|>": 256}, {bytes([i]): i for i in range(256)})
    spec.save(tmp_path / "tokenizer")
    log = MetricsLog(tmp_path, LogConfig(), 0, 100)
    log.describe({}, tmp_path / "tokenizer")
    log.write({"step": 2, "head_damaged": 2.0, "head_small": 4601.0}, {"head_damaged": [104, 300], "head_small": [10]})
    log.write({"step": 4, "head_damaged": 0.0, "head_like_unseen": 0.0}, {"head_damaged": [], "head_like_unseen": []})
    log.write({"step": 6, "head_damaged": 0.0}, {"head_damaged": []})
    log.write({"step": 8, "head_damaged": 1.0}, {"head_damaged": [ord("`")]})
    log.close()
    assert objects(tmp_path)[0]["rows"] == {"head_damaged": [104, 300], "head_small": [10]}
    shown = texts(tmp_path, "rows/head_damaged")
    assert shown == {2: '2 rows: `"h"` (104), 300', 4: "none", 8: '1 rows: `` "`" `` (96)'}
    assert texts(tmp_path, "rows/head_small") == {2: '4,601 rows, the first 1 by id: `"\\n"` (10)'}
    assert "rows/head_like_unseen/text_summary" not in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]


def layout_of(run: Path) -> dict[str, dict[str, list[str]]]:
    """The charts of the newest layout, by category: their expressions for tags."""
    *_, event = EventAccumulator(str(run)).Reload().Tensors("custom_scalars__config__")
    categories = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in categories}


def test_parts_of_a_quantity_are_one_chart(tmp_path):
    """Each chart of the layout has data, after a resume too."""
    write(tmp_path, 0, range(1, 4), 1.0)
    log = MetricsLog(tmp_path, LogConfig(), 3, 100)
    log.write({"step": 4, "grad_cosine/never": 0.5, "grad_cosine/0-1ppm": 0.1, "val_loss/web": 1.0, "loss": 1.0})
    log.write({"step": 5, "lens_kl_input_by_frequency/0-1ppm/block_0": 0.5, "loss": 1.0, "own/value": 2.0})
    log.close()
    log = MetricsLog(tmp_path, LogConfig(), 5, 100)
    log.write({"step": 6, "loss": 1.0})
    log.close()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    charts = {title: regex for category in layout_of(tmp_path).values() for title, regex in category.items()}
    matches = {title: [tag for tag in tags if re.match("|".join(regex), tag)] for title, regex in charts.items()}
    assert {title: len(found) for title, found in matches.items()} == {
        "Loss, nats/token": 1,
        "Validation, bits/byte": 1,
        "Validation loss, nats/token": 1,
        "Cosine of the two gradients": 2,
        "Lens: KL from the input, by frequency, nats/0-1ppm": 1,
    }
    assert "own/value" in tags


def test_the_settings_are_of_the_latest_start(tmp_path):
    for lr in (1e-3, 2e-3):
        log = MetricsLog(tmp_path, LogConfig(), 0, 100)
        log.describe({"optim.lr": lr, "optim.vocab.lr": None, "engine.compile": False, "data.path": "a|b"}, None)
        log.close()
    (shown,) = texts(tmp_path, "about/settings").values()
    assert shown.splitlines()[2:] == [
        "| optim.lr | 0.002 |",
        "| optim.vocab.lr | null |",
        "| engine.compile | false |",
        r"| data.path | a\|b |",
    ]
    values = {value.tag: value for event in events_in(tmp_path / SETTINGS_FILE) for value in event.summary.value}
    content = values["_hparams_/session_start_info"].metadata.plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["optim.lr"].number_value == 0.002 and hparams["engine.compile"].bool_value is False
    assert set(hparams) == {"optim.lr", "engine.compile", "data.path"}


def test_the_best_loss_survives_a_resume(tmp_path):
    log = MetricsLog(tmp_path, LogConfig(), 0, 100)
    for step, loss in enumerate((3.0, 2.0, 1.0), 1):
        log.write({"step": step, "val_loss": loss})
    log.close()
    log = MetricsLog(tmp_path, LogConfig(), 2, 100)  # the third step is done again
    log.write({"step": 3, "val_loss": 2.5})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars(BEST["val_loss"])
    assert [(event.step, event.value) for event in events] == [(1, 3.0), (2, 2.0), (3, 2.0)]


def test_curves_of_an_earlier_version_go_on(tmp_path):
    """Its files move from RUN/tensorboard into the run's folder, with today's tags and their own times."""
    old = tmp_path / "tensorboard" / "events.out.tfevents.0000000001.host"
    old.parent.mkdir()
    keys = {"train/loss": "loss", "grad/cosine/never": "grad_cosine/never", "val/loss/web": "val_loss/web"}
    keys |= {"lens_loss/block_0": "lens_loss/block_0", "lens/seconds": "lens_seconds", "counted": "counted"}
    tags = {old_tag: tag_of(key) for old_tag, key in keys.items()}
    events = [Event(file_version="brain.Event:2", wall_time=1.0)]
    for step in (1, 2, 3):
        events += [Event(step=step, wall_time=step, summary=summary.scalar(tag, step)) for tag in tags]
    picture = summary.image("lens/loss", np.zeros((2, 2, 3), np.uint8), dataformats="HWC")
    events.append(Event(step=2, wall_time=2, summary=picture))
    events.append(Event(step=2, wall_time=2, summary=summary.text("settings changed", "a")))
    old.write_bytes(records(*events) + records(events[1])[:-5])  # the last one was cut short
    log = MetricsLog(tmp_path, LogConfig(), 2, 100)
    log.write({"step": 3, "loss": 30.0})
    log.close()
    assert not old.parent.exists()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.wall_time, e.value) for e in board.Scalars(LOSS)][:2] == [(1, 1.0, 1.0), (2, 2.0, 2.0)]
    assert [e.value for e in board.Scalars(LOSS)][2:] == [30.0]
    for tag in set(tags.values()) - {LOSS}:
        assert [e.value for e in board.Scalars(tag)] == [1.0, 2.0], tag
    assert [e.step for e in board.Images(map_tag("loss"))] == [2]
    assert texts(tmp_path, "about/settings changed") == {2: "a"}


def test_a_damaged_file_of_an_earlier_version_stays_where_it_is(tmp_path, capsys):
    old = tmp_path / "tensorboard"
    old.mkdir()
    whole = records(*(Event(step=step, wall_time=step, summary=summary.scalar("train/loss", step)) for step in (1, 2)))
    (old / "events.out.tfevents.0000000001.host").write_bytes(whole)
    (old / "events.out.tfevents.0000000002.host").write_bytes(whole[:3] + b"\xff" + whole[4:])  # of the first length
    (old / "events.out.tfevents.0000000003.host").write_bytes(whole[:14] + b"\xff" * 8 + whole[22:])  # of an event
    log = MetricsLog(tmp_path, LogConfig(), 2, 100)
    log.write({"step": 3, "loss": 3.0})
    log.close()
    assert "is damaged, and stays as it is" in capsys.readouterr().err
    assert sorted(path.name[-6] for path in old.iterdir()) == ["2", "3"]
    assert steps_of_board(tmp_path) == [1, 2, 3]


def steps_of_board(folder: Path) -> list[int]:
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars(LOSS)]


def test_a_full_disk_costs_no_step(tmp_path, monkeypatch, capsys):
    """A record written in part is removed; everything is written once there is space again."""
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
    assert [line["step"] for line in objects(tmp_path)] == steps_of_board(tmp_path) == list(range(1, 7))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("No space left on device; training goes on" in line for line in warnings)


def test_memory_for_unwritten_records_is_bounded(tmp_path, monkeypatch, capsys):
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


@pytest.mark.parametrize("what", ["events.*", "metrics.jsonl"])
def test_a_file_removed_while_a_run_trains_begins_again(tmp_path, what):
    log = MetricsLog(tmp_path, LogConfig(), 0, 100)
    for step in range(1, 5):
        if step == 3:
            (path,) = tmp_path.glob(what)
            path.unlink()
        log.write({"step": step, "loss": 1.0 / step})
    log.image("a picture", np.zeros((2, 2, 3), np.uint8), 4)
    log.close()
    found = {
        "metrics.jsonl": [line["step"] for line in objects(tmp_path)],
        "events.*": steps_of_board(tmp_path),
    }
    assert found.pop(what) == [3, 4] and list(found.values()) == [[1, 2, 3, 4]]


def test_files_that_cannot_be_opened_are_a_warning_each(tmp_path, capsys, monkeypatch):
    """Each file prints one warning for a whole start, and training continues."""
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / SETTINGS_FILE).mkdir()
    monkeypatch.setattr("socket.gethostname", lambda: "too-long" * 40)
    (tmp_path / "restarts.jsonl").mkdir()
    log = MetricsLog(tmp_path, LogConfig(), 2, 100)
    log.describe({"seed": 1}, None)
    log.complete(2, {"val_loss": 1.0})
    for step in range(3, 9):
        log.write({"step": step, "loss": 1.0}, {"head_damaged": [1]})
    log.close()
    said = capsys.readouterr()
    assert said.out.count("step ") == 7
    assert said.err.count("training goes on") == 2 and "Traceback" not in said.err
