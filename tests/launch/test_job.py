"""The launcher's part of a failure: it ends the other ranks and decides what comes next. Ranks are small processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch import local
from launch.job import Attempt, _all_records, close, job_end, rendezvous
from launch.restart import Decision, History, RestartConfig, bad_node, cause, decide, newest_step
from launch.supervisor import Record, Supervisor
from pretrain.exits import Exit
from pretrain.stops import StopRequests

ROOT = Path(__file__).resolve().parents[2]
RANK = "import os, signal, subprocess, sys, time; rank = int(os.environ['RANK']); here = os.environ['HERE']\n"
SAYS_SO = "open(f'{here}/{rank}', 'w').write(str(os.getpid()))\n"  # the rank is ready; its process id
ACCEPTS = (  # a stop, as pretrain.train does
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
)
WATCHED = (  # continues when all ranks can print their stacks: not during imports
    "from pretrain.watchdog import Watchdog\nwatchdog = Watchdog(float(os.environ['SECONDS']))\n"
    "watchdog.__enter__()\nopen(f'{here}/watched-{rank}', 'w').close()\n"
    "while sum(name.startswith('watched-') for name in os.listdir(here)) < int(os.environ['WORLD']):\n"
    "    time.sleep(0.01)\n"
)


def ranks(folder: Path, code: str, world: int = 2, requests: StopRequests | None = None, **more: str) -> Supervisor:
    """Makes a supervisor of `world` processes that run this code."""
    environments = {
        rank: os.environ | more | {"RANK": str(rank), "WORLD": str(world), "HERE": str(folder)} for rank in range(world)
    }
    return Supervisor([sys.executable, "-c", RANK + code], environments, requests or StopRequests())


def when(ready: Callable[[], bool], then: Callable[[], None]) -> None:
    """Calls `then` in a thread as soon as `ready` returns True."""

    def wait() -> None:
        until = time.monotonic() + 30
        while not ready() and time.monotonic() < until:
            time.sleep(0.01)
        then()

    threading.Thread(target=wait, daemon=True).start()


def said(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() and (folder / name).read_text() for name in names)


def pid(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


def gone(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("fault", ["killed", "failed"])
def test_the_first_rank_that_fails_ends_the_others_at_once(tmp_path, fault):
    """The others end together with their children, even if they ignore SIGTERM."""
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nhelper = subprocess.Popen(['sleep', '60'])\n"
    says = "open(f'{here}/helper-{rank}', 'w').write(str(helper.pid))\n" + SAYS_SO
    ends = f"if rank == 1 and {fault == 'failed'}:\n    time.sleep(0.5); sys.exit('no more of this')\n"
    began = []

    def strike() -> None:
        began.append(time.time())
        if fault == "killed":
            os.kill(pid(tmp_path, "1"), signal.SIGKILL)

    when(lambda: said(tmp_path, "0", "1", "2"), strike)
    records = ranks(tmp_path, deaf + says + ends + "time.sleep(60)\n", world=3).run()
    first, *others = records
    assert (first.rank, first.ending) == ((1, Exit.KILLED) if fault == "killed" else (1, Exit.CRASHED))
    assert fault == "killed" or first.last == "no more of this"
    assert {(record.rank, record.ending) for record in others} == {(0, Exit.ENDED), (2, Exit.ENDED)}
    assert max(record.time for record in records) - first.time < 1
    assert all(gone(pid(tmp_path, name)) for name in ("0", "1", "2", "helper-0", "helper-1", "helper-2"))
    assert cause(records) is first


def test_a_rank_that_nccl_aborts_has_lost_another_one(tmp_path):
    """NCCL's watchdog aborts each rank that waits for a lost one. Otherwise their nodes would be blamed."""
    aborts = "sys.stderr.write('[rank0]: ProcessGroupNCCL.cpp:670 ...\\n'); sys.stderr.flush(); os.abort()\n"
    (record,) = ranks(tmp_path, aborts, world=1).run()
    assert (record.ending, record.code) == (Exit.LOST_PEER, -signal.SIGABRT)
    assert record.last == "[rank0]: ProcessGroupNCCL.cpp:670 ..."
    said = "ProcessGroupNCCL.cpp:670 terminated: NCCL error: remote process exited, NCCL version 2.27\\nframe #0: a\\n"
    (record,) = ranks(tmp_path, aborts.replace("ProcessGroupNCCL.cpp:670 ...\\n", said), world=1).run()
    assert record.last == "NCCL error: remote process exited, NCCL version 2.27"
    (record,) = ranks(tmp_path, "os.abort()\n", world=1).run()
    assert record.ending is Exit.KILLED


SLURM_OF_SCRIPTS = {  # squeue: the job's state, reason and excluded nodes; scontrol: fails twice at the requeue
    "squeue": """case "$*" in *%x*) echo ;; *) echo "$STATE" ;; esac""",
    "scontrol": """echo "$*" >> $SAID
case "$*" in requeue*) test $(grep -c requeue $SAID) -gt 2 ;; *hostnames*) echo n9 ;; esac""",
    "sinfo": r"printf 'n1|mix|gpu:h100|x\nn2|idle|gpu:h100|x\nn3|idle*|gpu:h100|x\nn4|idle|gpu:a100|x\n'",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Prepares Slurm's answers. Returns the calls of scontrol."""
    for name, script in SLURM_OF_SCRIPTS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for key, value in {"JOB_ID": 7, "NTASKS": 2, "JOB_PARTITION": "p", "JOB_NUM_NODES": 1}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("STATE", "RUNNING None")
    monkeypatch.setattr("launch.job.RECORD_SECONDS", 0)
    monkeypatch.setattr("launch.job.time.sleep", lambda seconds: None)
    monkeypatch.setattr("launch.job.signal.signal", lambda number, handler: None)
    return lambda: [line for line in (tmp_path / "said").read_text().splitlines() if "show" not in line]


def test_start_without_ranks_counts_as_without_progress(slurm, tmp_path, monkeypatch):
    """srun could not launch it, or it was stopped early, without handlers. The requeue is repeated until it works."""
    run = tmp_path / "run"
    run.mkdir()
    assert close(run, RestartConfig(max_failures=2, delay=9.5))
    assert slurm() == ["requeue 7"] * 3 + ["update JobId=7 StartTime=now+10"]
    assert not close(run, RestartConfig(max_failures=2)), "the job counts as failed"
    assert [line["decision"] for line in History(run).lines()] == ["restart", "give up"]
    monkeypatch.setenv("STATE", "COMPLETING None")
    assert close(run, RestartConfig()) and History(run).lines()[-1]["decision"] == "left to Slurm"
    monkeypatch.setenv("STATE", "SIGNALING None")
    assert close(run, RestartConfig()) and History(run).lines()[-1]["decision"] == "restart"


@pytest.mark.parametrize("nodes,excluded", [(1, True), (2, False)])
def test_bad_node_is_excluded_if_enough_similar_nodes_remain(slurm, tmp_path, monkeypatch, nodes, excluded):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    attempt = Attempt.of_job(tmp_path / "run")
    attempt.begin()
    attempt.record(Record(0, Exit.DEVICE, 6))
    attempt.record(Record(1, Exit.LOST_PEER, 5))
    assert close(tmp_path / "run", RestartConfig())
    assert ("update JobId=7 ExcNodeList=n1" in slurm()) is excluded
    assert ("n1 is excluded" if excluded else "n1 is not excluded") in History(tmp_path / "run").lines()[-1]["why"]


def test_a_request_to_stop_waits_for_a_rank_that_is_still_starting(tmp_path):
    """The signal arrives before the rank has its handlers."""
    with StopRequests() as requests:
        when(lambda: said(tmp_path, "0", "1"), lambda: os.kill(os.getpid(), signal.SIGUSR1))
        wait = f"while not os.path.exists('{tmp_path}/later'): time.sleep(0.01)\n"
        when(lambda: requests.count > 0, lambda: (time.sleep(0.3), (tmp_path / "later").touch()))
        records = ranks(tmp_path, SAYS_SO + wait + ACCEPTS + "time.sleep(60)\n", requests=requests).run()
    assert [record.ending for record in records] == [Exit.STOPPED, Exit.STOPPED]


def test_ranks_do_not_outlive_their_supervisor(tmp_path):
    code = f"""
import os, sys
from launch.supervisor import Supervisor
from pretrain.stops import StopRequests
command = [sys.executable, "-c", {RANK + SAYS_SO + "time.sleep(60)"!r}]
environments = {{rank: os.environ | {{"RANK": str(rank), "HERE": {str(tmp_path)!r}}} for rank in range(2)}}
Supervisor(command, environments, StopRequests()).run()
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 30
    while not said(tmp_path, "0", "1") and time.monotonic() < until:
        time.sleep(0.01)
    supervisor.kill()
    supervisor.wait()
    late = time.monotonic() + 1
    while not all(gone(pid(tmp_path, name)) for name in ("0", "1")):
        assert time.monotonic() < late
        time.sleep(0.01)


WAITING = "import os, signal, time\ndef all_reduce(stops=False):\n    stops and os.kill(os.getpid(), signal.SIGSTOP)\n"


def collectives(folder: Path) -> str:
    """Returns code that imports a module with the path of torch's collectives. Its `all_reduce` waits."""
    waits = folder / "torch" / "distributed"
    waits.mkdir(parents=True)
    (waits / "collectives.py").write_text(WAITING + "    time.sleep(60)\n")
    return f"sys.path.insert(0, {str(waits)!r})\nimport collectives\n"


def test_a_hang_shows_the_stacks_of_all_ranks_and_names_the_one_that_others_wait_for(tmp_path, capfd):
    """Rank 1 sleeps; rank 0 waits for it in a collective."""
    code = (
        WATCHED + collectives(tmp_path) + "def lost_in_thought():\n    time.sleep(60)\n"
        "watchdog.alive()\ncollectives.all_reduce() if rank == 0 else lost_in_thought()\n"
    )
    records = ranks(tmp_path, code, SECONDS="1", PYTHONPATH=str(ROOT)).run()
    assert {record.ending for record in records} == {Exit.HUNG}
    assert {record.rank: record.waits for record in records} == {0: True, 1: False}
    first = cause(records)
    assert first.rank == 1 and first.how.startswith("hung in lost_in_thought, <string>")
    stacks = capfd.readouterr().err
    assert "stacks of rank 0:\n" in stacks and "stacks of rank 1:\n" in stacks
    assert stacks.count("Current thread") == 2 and "in all_reduce" in stacks and "in lost_in_thought" in stacks


def lost_in_thought(folder: Path, waits: str) -> str:
    """Returns code in which rank 0 waits for rank 1 in this way, and rank 1 sleeps. The watchdogs of both start when
    rank 0 waits: a busy machine may need seconds to get there.
    """
    return (
        WATCHED
        + "from functools import partial\nfrom threading import Event, Thread\nfrom types import SimpleNamespace\n"
        "from pathlib import Path\nfrom pretrain.vocab.collectives import on_host\n"
        f"waiting = Path('{folder}/waiting')\n"
        "device = SimpleNamespace(cpu=partial(time.sleep, 60))\n"  # as a number that depends on a collective of NCCL's
        "def begin():\n    waiting.touch()\n    watchdog.alive()\n"
        "def read():\n    begin()\n    on_host(device)\n"
        "def lost_in_thought():\n    begin()\n    time.sleep(60)\n"
        f"if rank == 0:\n    {waits}\nwhile not waiting.exists():\n    time.sleep(0.01)\nlost_in_thought()\n"
    )


@pytest.mark.parametrize(
    "waits",
    ["read()", "Thread(target=read, daemon=True).start(); Event().wait()"],
    ids=["training", "the checkpoint's thread"],
)
def test_a_host_that_reads_from_the_gpu_waits_for_the_rank_elsewhere(tmp_path, waits):
    """NCCL's collectives do not block the host: the next read does."""
    records = ranks(tmp_path, lost_in_thought(tmp_path, waits), SECONDS="1", PYTHONPATH=str(ROOT)).run()
    assert {record.rank: record.waits for record in records} == {0: True, 1: False}
    assert cause(records).rank == 1 and cause(records).how.startswith("hung in lost_in_thought, <string>")


def test_rank_with_hanging_thread_is_at_fault(tmp_path):
    """The main thread waits for another thread, which reads a file for example."""
    waits = "Thread(target=lost_in_thought, daemon=True).start(); Event().wait()"
    records = ranks(tmp_path, lost_in_thought(tmp_path, waits), world=1, SECONDS="1", PYTHONPATH=str(ROOT)).run()
    assert [(record.ending, record.waits) for record in records] == [(Exit.HUNG, False)]


def test_stopped_rank_is_at_fault_even_if_it_waits(tmp_path):
    """It is stopped inside a collective. The end of the job continues it, as Slurm does, so it prints its stack."""
    waits = "watchdog.alive()\ncollectives.all_reduce(stops=rank == 1)\n"
    code = WATCHED + collectives(tmp_path) + SAYS_SO + waits
    when(
        lambda: said(tmp_path, "0", "1") and gone(pid(tmp_path, "0")),
        lambda: os.kill(pid(tmp_path, "1"), signal.SIGCONT),
    )
    records = ranks(tmp_path, code, SECONDS="1", PYTHONPATH=str(ROOT)).run()
    assert {(record.rank, record.ending, record.waits) for record in records} == {
        (0, Exit.HUNG, True),
        (1, Exit.HUNG, False),
    }
    first = cause(records)
    assert (first.rank, first.code) == (
        1,
        -signal.SIGALRM,
    ) and first.how == "hung in a stop, by SIGSTOP or a similar signal"


def test_rank_without_stack_is_at_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.supervisor.DUMP_SECONDS", 0.5)
    frozen = "if rank == 1:\n    os.kill(os.getpid(), signal.SIGSTOP)\nwatchdog.alive()\ntime.sleep(60)\n"
    code = WATCHED + frozen
    records = ranks(tmp_path, code, SECONDS="0.5", PYTHONPATH=str(ROOT)).run()
    assert {(record.rank, record.code) for record in records} == {(0, -signal.SIGALRM), (1, -signal.SIGKILL)}
    assert {record.ending for record in records} == {Exit.HUNG}


def test_supervisors_on_several_nodes_end_their_ranks_when_one_has_failed(tmp_path, monkeypatch):
    """Runs each supervisor in its own process, over a shared folder. The rank is killed with kill -9."""
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    code = """
import os, sys
from pathlib import Path
from launch.job import Attempt
from launch.supervisor import Supervisor
from pretrain.stops import StopRequests
here, rank, child = sys.argv[1:]
attempt = Attempt(Path(here) / "run", "7-0")
attempt.join(int(rank))
environments = {int(rank): os.environ | {"RANK": rank, "HERE": here}}
command, requests = [sys.executable, "-c", child], StopRequests()
Supervisor(command, environments, requests, record=attempt.record, elsewhere=attempt.failure).run()
"""
    child = RANK + SAYS_SO + "time.sleep(60)"
    nodes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank), child], cwd=ROOT) for rank in range(3)
    ]
    until = time.monotonic() + 30
    while not said(tmp_path, "0", "1", "2") and time.monotonic() < until:
        time.sleep(0.01)
    attempt = Attempt(tmp_path / "run", "7-0")
    assert {(record.rank, record.ending, record.last) for record in attempt.records()} == {
        (rank, Exit.KILLED, "no exit status") for rank in range(3)
    }
    os.kill(pid(tmp_path, "2"), signal.SIGKILL)
    assert [node.wait(10) for node in nodes] == [0, 0, 0]
    records = attempt.records()
    assert [record.ending for record in records] == [Exit.ENDED, Exit.ENDED, Exit.KILLED]
    assert max(record.time for record in records) - records[2].time < 1
    assert cause(records).how == "killed by SIGKILL" and attempt.failure() is Exit.KILLED


def test_a_supervisor_needs_no_torch():
    code = "import sys, launch.job; print(*{'torch', 'numpy', 'hydra', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "", done.stdout + done.stderr


THREE = RestartConfig()
DECISIONS = [  # ending, progress, consecutive failed starts without it, settings -> decision
    (Exit.FINISHED, False, 1, THREE, Decision.DONE),
    (Exit.REFUSED, True, 0, THREE, Decision.GIVE_UP),
    (Exit.DIVERGED, True, 0, THREE, Decision.GIVE_UP),
    (Exit.CANNOT_MEET, False, 1, THREE, Decision.GIVE_UP),
    (Exit.STOPPED, True, 0, RestartConfig(max_failures=0), Decision.RESTART),
    (Exit.STOPPED, False, 2, THREE, Decision.RESTART),
    (Exit.STOPPED, False, 3, THREE, Decision.GIVE_UP),
    *[
        (ending, *case)
        for ending in (Exit.CRASHED, Exit.UNSAVED, Exit.LOST_PEER, Exit.NOT_MET, Exit.DEVICE, Exit.KILLED, Exit.HUNG)
        for case in (
            (True, 0, THREE, Decision.RESTART),
            (False, 1, THREE, Decision.RESTART),
            (False, 2, THREE, Decision.RESTART),
            (False, 3, THREE, Decision.GIVE_UP),
            (True, 0, RestartConfig(max_failures=1), Decision.RESTART),
            (False, 1, RestartConfig(max_failures=1), Decision.GIVE_UP),
            (True, 0, RestartConfig(max_failures=0), Decision.GIVE_UP),
        )
    ],
]


@pytest.mark.parametrize("ending,progress,fruitless,config,decision", DECISIONS)
def test_restart_policy(ending, progress, fruitless, config, decision):
    assert decide(ending, progress, fruitless, config)[0] is decision


@pytest.mark.parametrize("key", ["max_failures", "delay"])
def test_a_wrong_setting_is_named(key):
    with pytest.raises(ValueError, match=rf"restart\.{key}=-1 must not be negative"):
        RestartConfig(**{key: -1})


def record(rank: int, ending: Exit, host: str = "a", at: float = 0.0, waits: bool = False) -> Record:
    return Record(rank, ending, 1, host=host, time=at, waits=waits)


def test_cause_is_the_first_failing_rank():
    """It is the first that failed by its own fault, even if another noticed earlier that it had lost a peer."""
    lost, killed, late = record(0, Exit.LOST_PEER, at=1), record(1, Exit.KILLED, at=2), record(2, Exit.DEVICE, at=3)
    ended, stopped = record(3, Exit.ENDED, at=0), record(4, Exit.STOPPED, at=0)
    assert cause([lost, killed, late, ended, stopped]) is killed
    assert cause([lost, ended, stopped]) is lost
    unmet, cannot = record(0, Exit.NOT_MET, at=1), record(1, Exit.CANNOT_MEET, at=2)
    assert cause([unmet, cannot, ended]) is cannot and bad_node(unmet, [unmet]) is None
    assert cause([stopped, record(5, Exit.FINISHED)]) is stopped
    silent = Record.silent(6, "b")
    assert cause([silent, late, lost]) is late, "Slurm ends the others, too"
    assert cause([silent, lost, ended]) is silent
    assert cause([silent, Record.silent(7, "b"), lost]).host == "b"
    assert cause([silent, Record.silent(0, "a"), lost]).host == "", "of several nodes nobody knows which it was"


def test_which_node_is_at_fault():
    for ending, host in ((Exit.KILLED, "b"), (Exit.DEVICE, "b"), (Exit.CRASHED, None), (Exit.UNSAVED, None)):
        first = record(1, ending, "b")
        assert bad_node(first, [first, record(0, Exit.ENDED)]) == host
    hung = record(1, Exit.HUNG, "b")
    assert bad_node(hung, [hung, record(0, Exit.HUNG, waits=True)]) == "b"
    assert bad_node(hung, [hung, record(0, Exit.HUNG)]) is None, "either may be the one"


def test_exit_codes():
    assert [Exit.of(code) for code in (0, 1, 2, 75, -9, -11, -14, 3, 76, 250)] == [
        *(Exit.FINISHED, Exit.CRASHED, Exit.REFUSED, Exit.STOPPED, Exit.KILLED, Exit.KILLED, Exit.HUNG),
        *(Exit.DIVERGED, Exit.CRASHED, Exit.CRASHED),
    ]


def test_consecutive_starts_without_progress_are_counted(tmp_path):
    history = History(tmp_path)
    failed, stopped = record(1, Exit.KILLED), record(1, Exit.STOPPED)

    def after(first: Record, start: int, step: int, decision: Decision) -> int:
        history.write("7-0", start, step, first, decision, "why")
        return history.fruitless()

    assert history.fruitless() == 0
    assert after(failed, -1, -1, Decision.RESTART) == 1
    assert after(stopped, -1, -1, Decision.RESTART) == 2, "a stop without a step is one too"
    assert after(failed, -1, -1, Decision.LEFT) == 2, "what Slurm has done is none"
    assert after(failed, -1, -1, Decision.RESTART) == 3
    assert after(failed, -1, 5, Decision.RESTART) == 0
    assert after(failed, 5, 5, Decision.RESTART) == 1
    with open(history.path, "a") as file:
        file.write('{"time": 1, "att')  # a kill
    assert after(failed, 5, 5, Decision.RESTART) == 2
    assert after(failed, 5, 5, Decision.GIVE_UP) == 0, "who starts it by hand has three more"
    assert [line["attempt"] for line in history.lines()] == list(range(1, 9))
    line = history.lines()[-1]
    assert (line["class"], line["rank"], line["host"], line["decision"]) == ("KILLED", 1, "a", "give up")


def test_unwritten_starts_are_counted(tmp_path, capsys):
    """They stay in memory, and are written with the next line that succeeds."""
    history = History(tmp_path)
    history.path.mkdir()
    for count in range(1, 3):
        assert not history.write("local-1", -1, -1, record(1, Exit.KILLED), Decision.RESTART, "why")
        assert history.fruitless() == count
    assert f"warning: {history.path}: Is a directory" in capsys.readouterr().err
    history.path.rmdir()
    assert history.write("local-1", -1, -1, record(1, Exit.KILLED), Decision.RESTART, "why")
    assert History(tmp_path).fruitless() == history.fruitless() == 3
    assert [line["attempt"] for line in History(tmp_path).lines()] == [1, 2, 3]


@pytest.mark.parametrize("line", ["5", "[]", "{}", '{"decision": "restart"}', "\x00\x00", "null"])
def test_foreign_lines_are_ignored(tmp_path, line):
    history = History(tmp_path)
    history.path.write_bytes(line.encode() + b"\xff\n" + line.encode() + b"\n")
    history.write("local-1", -1, -1, record(1, Exit.KILLED), Decision.RESTART, "why")
    assert history.fruitless() == 1


def test_launcher_on_a_full_disk_gives_up(tmp_path, monkeypatch, capsys):
    """The disk is full: each start ends without a checkpoint, and its line cannot be written."""
    History(tmp_path).path.mkdir()
    starts = []

    class Starts:
        def __init__(self, *_: object) -> None:
            starts.append(len(starts))

        def run(self) -> list[Record]:
            assert len(starts) < 9, "it never stops"
            return [record(0, Exit.UNSAVED)]

    monkeypatch.setattr("launch.local.Supervisor", Starts)
    config = SimpleNamespace(run_dir=tmp_path, path=tmp_path / "config.yaml", run=SimpleNamespace(dir=str(tmp_path)))
    assert local.run_ranks(config, 1, RestartConfig(max_failures=3), StopRequests()) == 1
    assert starts == [0, 1, 2]
    assert "3 consecutive starts without a newer checkpoint" in capsys.readouterr().err


def test_job_on_a_full_disk_is_not_requeued_endlessly(slurm, tmp_path, monkeypatch, capsys):
    """Slurm counts the requeues: no fewer than the consecutive starts without progress."""
    run = tmp_path / "run"
    History(run).path.mkdir(parents=True)
    (run / "attempts").write_text("no folder")
    Attempt.of_job(run).begin()
    closed = []
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        closed.append(close(run, RestartConfig(max_failures=3)))
    assert closed == [True, True, False]
    assert f"give up: start 3 of this job, and {run}/restarts.jsonl cannot be written" in capsys.readouterr().out


def test_progress_is_a_newer_finished_checkpoint(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step-00000004", "step-00000010", "damaged-step-00000030", ".tmp-step-00000040"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    assert newest_step(tmp_path) == 10


def test_lost_attempt_is_reported_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert Attempt(tmp_path, "6-0").begun() == (-1, 1) and not Attempt(tmp_path, "6-0").records(), "it never began"
    for restarts in range(2):
        attempt = Attempt(tmp_path, f"7-{restarts}")
        attempt.begin()
        attempt.join(0)
        attempt.record(Record(1, Exit.LOST_PEER, 5))
    (line,) = History(tmp_path).lines()
    assert (line["job"], line["rank"], line["class"], line["decision"]) == ("7-0", 0, "KILLED", "left to Slurm")
    assert line["last"] == "no exit status"
    monkeypatch.setattr("launch.job.RECORD_SECONDS", 0)
    assert {one.rank for one in _all_records(attempt, ranks=3)} == {0, 1, 2}
    assert attempt.begun() == (-1, 2)


@pytest.mark.parametrize("node,tasks", [(0, 4), (1, 4), (2, 3)])
def test_rendezvous_variables_come_from_slurm(monkeypatch, node, tasks):
    """They come only from the environment: a container may have no commands of Slurm."""
    slurm = {"JOB_ID": 4711, "RESTART_COUNT": 2, "PROCID": 9, "NTASKS": 11, "LOCALID": 1, "NODEID": node}
    slurm |= {"STEP_TASKS_PER_NODE": "4(x2),3", "JOB_NODELIST": "gpu[07-08],big", "JOB_END_TIME": 1_800_000_000}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    monkeypatch.setenv("PATH", "")
    found = rendezvous()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("9", "11", "1", "gpu07")
    assert found["LOCAL_WORLD_SIZE"] == str(tasks) and float(found["ROWSHARD_DEADLINE"]) == 1.8e9
    assert 10_000 <= int(found["MASTER_PORT"]) < 30_000
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert rendezvous()["MASTER_PORT"] != found["MASTER_PORT"], "it may be taken"


def test_the_end_of_a_job_without_a_limit(monkeypatch, tmp_path):
    """Newer versions of Slurm set a variable. For older ones squeue is asked, which reports no end here."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800000000")
    assert job_end() == 1.8e9
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "squeue").write_text("#!/bin/sh\necho $ANSWER\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, end in (("N/A", None), ("2027-01-15T08:00:00", time.mktime((2027, 1, 15, 8, 0, 0, 0, 0, -1)))):
        monkeypatch.setenv("ANSWER", answer)
        assert job_end() == end


def test_records_of_earlier_versions_without_an_exit_status_are_known():
    record = Record.silent(1, "n2")
    assert Record.of_dict(record.as_dict() | {"last": "gone without a word"}) == record  # english: quoted
