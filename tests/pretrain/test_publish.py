"""W&B and MLflow get each step once, whatever happens to the run, to them, or to the process that sends."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data_prep.durable import exclusive
from pretrain import publish
from pretrain.config.monitor import LogConfig
from pretrain.monitor.followers import Followers
from pretrain.targets import MLflowTarget, identity, metric_key
from tests.in_process import in_process
from tests.launch.commands import SMALL, refused, run, scalars, start
from tests.pretrain.tiny import write_tokens

LOG_BLOCK = 32768  # of LevelDB's log format, in which W&B writes its records


def records(path: Path) -> Iterator[bytes]:
    """The records of a file of W&B: a header of 7 bytes, then blocks of chunks (checksum, length, type)."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if LOG_BLOCK - place % LOG_BLOCK < 7:
            place += LOG_BLOCK - place % LOG_BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield parts
            parts = b""


def wandb_run(folder: Path) -> tuple[str, str, dict[str, object], list[dict[str, float]]]:
    """Id, project, settings and steps of the only offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found, settings, lines = None, {}, []
    for data in records(path):
        record = Record.FromString(data)
        if record.HasField("run") and found is None:
            found = record.run
        updates = [*record.run.config.update, *record.config.update]
        settings |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            lines.append({"step": record.history.step.num, **items})
    assert found is not None
    return found.run_id, found.project, settings, lines


def mlflow_run(store: Path) -> tuple[Path, dict[str, list[tuple[int, float]]]]:
    """Folder and metrics of the only run of a folder of MLflow."""
    (folder,) = {path.parent.parent for path in store.glob("*/*/metrics/loss")} or {store}
    metrics = {}
    for path in (folder / "metrics").glob("*"):
        points = [line.split() for line in path.read_text().splitlines() if line.count(" ") == 2]
        metrics[path.name] = [(int(step), float(value)) for _, value, step in points]
    return folder, metrics


def test_lines_after_a_rollback_are_all_read(tmp_path):
    """The file is cut, and has grown beyond its old size before the next look."""
    path = tmp_path / "metrics.jsonl"

    def steps(*numbers: int, loss: float) -> str:
        return "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in numbers)

    path.write_text(steps(*range(1, 41), loss=1.5))
    lines = publish.Lines(path)
    assert [line["step"] for line in lines.new()] == [*range(1, 41)] and lines.new() == []
    path.write_text("")
    assert lines.new() == []
    path.write_text(steps(*range(1, 41), loss=1.5))
    assert len(lines.new()) == 40
    path.write_text(steps(*range(1, 31), loss=1.5) + steps(*range(31, 60), loss=1.25))
    assert lines.new()[-29:] == [{"step": step, "loss": 1.25} for step in range(31, 60)]


def points(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The points that a target should have, by MLflow's names."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key in line.keys() - {"step", "rows"}:
            found.setdefault(metric_key(key), []).append((line["step"], line[key]))
    return found


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return tmp_path / "store"


def test_each_step_is_there_once_after_kill_9_and_resume(tmp_path, store):
    """The first start has a server that does not answer, which costs it nothing; the second one is killed when it has
    sent steps beyond the checkpoint; the third one does them again.
    """
    folder = tmp_path / "runs" / "a"
    common = f"launch/local.py nproc=1 data.path={write_tokens(tmp_path / 'tokens')} vocab.size=307 run.dir={folder}"
    common += f" {SMALL} train.steps=100000 optim.schedule=wsd log.every=20 checkpoint.every=0 log.tensorboard=false"
    common += " log.wait_seconds=240"
    done = run(f"{common} train.stop_after=40 log.mlflow=http://127.0.0.1:1", timeout=300)
    assert done.returncode == 0 and [line["step"] for line in scalars(folder)] == [1, 20, 40]
    assert "log.mlflow=http://127.0.0.1:1: warning: MlflowException: " in done.stderr
    assert "warning: MLflow may lack the last steps, see " in done.stderr and "Traceback" not in done.stderr

    both = f"{common} log.wandb=offline log.mlflow=file:{store} log.project=ours restart.max_failures=0"
    with start(both) as process:
        late = time.monotonic() + 240
        while not (sent := mlflow_run(store)[1].get("loss")) or sent[-1][0] <= 40:
            assert process.poll() is None and time.monotonic() < late
            time.sleep(0.1)
        (rank,) = psutil.Process(process.pid).children()
        rank.kill()
        process.communicate(timeout=120)
    before, name = mlflow_run(store)[1], identity(folder)
    assert scalars(folder)[-1]["step"] >= before["loss"][-1][0] > 40
    stop = scalars(folder)[-1]["step"] + 60

    done = run(f"{both} train.stop_after={stop} optim.lr=0.004 log.every=30", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "log.wandb=offline: " in done.stderr and "warning" not in done.stderr, done.stderr
    lines = scalars(folder)
    assert lines[-1]["step"] == stop

    run_id, project, settings, logged = wandb_run(folder)
    assert (run_id, project, settings["optim.lr"], identity(folder)) == (name, "ours", 0.004, name)
    own = {"_step", "_runtime", "_timestamp"}
    assert [{k: v for k, v in line.items() if k not in own} for line in logged] == lines

    at, metrics = mlflow_run(store)
    assert {key: [step for step, _ in of] for key, of in metrics.items()} == expected(before, lines)
    last = before["loss"][-1][0]
    assert metrics["loss"] == before["loss"] + [point for point in points(lines)["loss"] if point[0] > last]
    assert (at / "tags" / "rowshard_id").read_text() == name and (at / "tags" / "changed.optim.lr").exists()


def expected(before: dict, lines: list[dict]) -> dict[str, list[int]]:
    """Steps that MLflow should have of each metric: what it had, then later ones."""
    truth = {key: [step for step, _ in of] for key, of in before.items()}
    for key, of in points(lines).items():
        known = truth.setdefault(key, [])
        known += [step for step, _ in of if step > (known or [-1])[-1]]
    return truth


def write_lines(folder: Path, lines: list[dict], more: str = "") -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + more)


def sent(folder: Path, store: Path) -> dict[str, list[tuple[int, float]]]:
    done = in_process(publish.main, f"run={folder}", f"mlflow=file:{store}")
    assert done.returncode == 0 and done.stdout.startswith(f"log.mlflow=file:{store}: "), done.stderr
    return mlflow_run(store)[1]


def test_only_what_is_missing_is_sent(tmp_path, store):
    """After a request that was done in part, a validation loss that was added to an older step, and a cut line."""
    folder = tmp_path / "a"
    lines = [{"step": step, "loss": 1 / step, "val_loss/web": 2.0, "rows": {"x": [1]}} for step in range(1, 701)]
    write_lines(folder, lines)
    assert sent(folder, store) == points(lines), "more than one request holds"
    lines += [{"step": 710, "loss": float("inf"), "lr": 0.5, "val_loss/web": 1.0}, {"step": 720, "loss": 0.25}]
    MLflowTarget(f"file:{store}", folder, "rowshard", {}).send([{"step": 710, "loss": float("inf")}])
    lines[699]["val_bits_per_byte"] = 3.0
    write_lines(folder, lines, '{"step": 730, "lo')
    assert sent(folder, store) == points(lines) == sent(folder, store)


class Flaky:
    """A target that fails at some calls. `has`: steps that have arrived, which outlive the connection."""

    where = "here"

    def __init__(self, fails: Iterator[bool], has: list[int]) -> None:
        self.fails, self.has = fails, has

    def _call(self) -> None:
        if next(self.fails):
            raise ConnectionError("gone\nwith details")

    def send(self, lines: list[dict[str, float]]) -> None:
        self._call()
        self.has += [line["step"] for line in lines if line["step"] > max(self.has, default=0)]
        self._call()

    def close(self) -> None:
        self._call()


@pytest.mark.parametrize(
    ("fails", "looks", "done"),
    [("ffff", 1, True), ("ffftffff", 3, True), ("tttffff", 9, True), ("fft", 1, False), ("t", 1, False)],
)
def test_a_failure_is_said_once_and_tried_again(tmp_path, monkeypatch, fails, looks, done):
    """`looks`: how often the end is asked for until it has come; a line is added before each."""
    monkeypatch.setattr(publish, "RETRY_SECONDS", 0.0)
    script, has, said, pauses = iter(c == "t" for c in fails + "f" * 30), [], [], []

    def ended(seconds: float) -> bool:
        pauses.append(seconds)
        write_lines(tmp_path, [{"step": step} for step in range(1, len(pauses) + 1)])
        return len(pauses) >= looks

    assert publish.publish(tmp_path, lambda: Flaky(script, has), ended, said.append) == done
    if done:
        assert has == list(range(1, looks + 1))
    words = [line for line in said if line != "here"]
    assert words == ["warning: ConnectionError: gone"] * ("t" in fails)


def test_a_process_that_does_not_end_is_ended(tmp_path, capsys):
    write_lines(tmp_path / "a", [{"step": 1}])
    followers = Followers(tmp_path / "a", LogConfig(mlflow=f"file:{tmp_path / 'store'}", wait_seconds=0.0))
    (process,) = (child for child in psutil.Process().children() if f"run={tmp_path / 'a'}" in child.cmdline())
    followers.close()
    assert not process.is_running()
    rest = f"python -m pretrain.publish run={tmp_path}/a mlflow=file:{tmp_path}/store project=rowshard\n"
    assert capsys.readouterr().err.endswith(f"see {tmp_path}/a/mlflow.log; to send them: {rest}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("log.wandb=true", "log.wandb=true must be online, offline or null"),
        ("log.mlflow=server", "log.mlflow=server must be an address such as http://host:5000, or file:DIR"),
        ("log.project=''", "log.project must not be empty"),
        ("log.wait_seconds=-1", "log.wait_seconds=-1.0 must not be negative"),
        ("log.wandb=offline", "log.wandb=offline needs a package that is not installed: pip install 'rowshard[wandb]'"),
        (
            "log.mlflow=file:a",
            "log.mlflow=file:a needs a package that is not installed: pip install 'rowshard[mlflow]'",
        ),
    ],
)
def test_a_target_that_cannot_work_is_refused_before_the_start(tmp_path, monkeypatch, setting, message):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    data = write_tokens(tmp_path / "tokens")
    said = refused(f"data.path={data} vocab.size=307 run.dir={tmp_path}/run {SMALL} {setting}")
    assert message in said and not (tmp_path / "run").exists()


def test_wandb_online_needs_a_key(tmp_path):
    nothing = {"NETRC": str(tmp_path / "netrc")}
    with pytest.raises(ValueError, match="needs an API key: run `wandb login`, set WANDB_API_KEY"):
        LogConfig(wandb="online").check_targets(nothing)
    LogConfig(wandb="online").check_targets(nothing | {"WANDB_API_KEY": "x"})
    LogConfig(wandb="offline").check_targets(nothing)
    (tmp_path / "netrc").touch()
    LogConfig(wandb="online").check_targets(nothing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={run}"], "run={run} must be the folder of a run: it has no metrics.jsonl"),
        (["run={sent}"], "give one target, wandb= or mlflow="),
        (["run={sent}", "wandb=offline", "mlflow=file:x"], "give one target, wandb= or mlflow="),
        (["run={sent}", "wandb=offline", "live=1"], "live=1 must be true or false"),
        (["run={sent}", "wandb=offline"], "run={sent} is being sent to Weights & Biases by another process"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, arguments, message):
    names = {"run": tmp_path / "run", "sent": tmp_path / "sent"}
    write_lines(names["sent"], [{"step": 1}])
    with exclusive(names["sent"] / ".wandb.lock", ""):
        done = in_process(publish.main, *(argument.format(**names) for argument in arguments))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message.format(**names)}")
