"""Errors of the rendezvous show the library's message, and are never reported as a lost rank."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import generate, mesh, rendezvous, train
from pretrain.compose import write_config
from pretrain.exits import Exit
from pretrain.mesh import ranks_or_alone
from pretrain.rendezvous import NotMet, hopeless, in_its_words, meet, words
from tests.pretrain.tiny import tiny_config, write_tokens

ROOT = Path(__file__).resolve().parents[2]
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
NCCL = """NCCL error in: /pytorch/ProcessGroupNCCL.cpp:77, remote process exited or there was a network error
ncclRemoteError: A call failed possibly due to a network error.
Last error:
Net 0: Connection refused
Exception raised from create at ProcessGroupNCCL.cpp:1 (most recent call first):
frame #0: c10::Error::Error
"""
IFACE = "[enforce fail at /gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: ib0"


@pytest.fixture
def frozen(tmp_path):
    """Writes config.yaml of a run."""
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run", train__steps=1)
    write_config(config, None)
    return config.path


def place(monkeypatch, rank=0, world=2, address="127.0.0.1", port=0):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("MASTER_ADDR", address), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def start(*arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """Starts a command or one rank, possibly without other ranks."""
    known = os.environ | {"OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in environment.items()}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "said,shown",
    [
        (GLOO, "Connection closed by peer [127.0.0.1]:1234"),
        (
            NCCL,
            "NCCL error in: /pytorch/ProcessGroupNCCL.cpp:77, remote process exited or there was a network error;"
            " ncclRemoteError: A call failed possibly due to a network error; Last error:; Net 0: Connection refused",
        ),
        (IFACE, "Unable to find address for: ib0"),
    ],
    ids=["gloo", "nccl", "interface"],
)
def test_library_error_is_one_line_without_backtrace(said, shown):
    assert words(RuntimeError(said)) == shown
    assert hopeless(RuntimeError(said)) == ("ib0" in said)


def test_rendezvous_error_is_not_a_lost_rank():
    with pytest.raises(NotMet, match="remote process exited") as caught, in_its_words():
        raise dist.DistBackendError(NCCL)
    assert not caught.value.hopeless


def test_timeout_names_number_of_ranks_that_joined(monkeypatch, capfd):
    place(monkeypatch)
    with pytest.raises(NotMet, match=r"1 of 2 ranks came within 0\.2 s") as caught:
        meet(timedelta(seconds=0.2))
    assert not caught.value.hopeless
    assert "rank 0 of 2 waits for the others at 127.0.0.1:0" in capfd.readouterr().err


def test_rank_waits_for_rank_0(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place(monkeypatch, rank=1, port=free.getsockname()[1])
        with pytest.raises(NotMet, match=r"nothing answered \(Connection refused\) within 0\.2 s"):
            meet(timedelta(seconds=0.2))


def test_unknown_host_fails_immediately(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    place(monkeypatch, address="nosuch.invalid")
    monkeypatch.setattr(rendezvous, "NAME_SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NotMet, match=r"MASTER_ADDR=nosuch\.invalid: Name or service not known") as caught:
        meet(timedelta(minutes=10))
    assert caught.value.hopeless


def test_extra_rank_cannot_join(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place(monkeypatch, rank=1, port=store.port)
    store.add("came-0", 2)
    with pytest.raises(NotMet, match=r"2 ranks have met at .* before: are RANK and WORLD_SIZE left over"):
        meet(timedelta(seconds=10))


@pytest.mark.parametrize(("name", "value"), [("RANK", "two"), ("WORLD_SIZE", ""), ("MASTER_PORT", "-1"), ("RANK", "2")])
def test_incomplete_environment_raises(monkeypatch, name, value):
    place(monkeypatch)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} in the environment must be"):
        meet(timedelta(seconds=1))


def test_taken_port_is_named_and_retried(frozen):
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        done = start("pretrain.train", str(frozen), RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, **at(taken.getsockname()[1]))
    assert done.returncode == Exit.NOT_MET
    assert "the ranks did not meet: The server socket has failed to listen" in done.stderr.splitlines()[-1]
    assert "EADDRINUSE" in done.stderr.splitlines()[-1] and "lost" not in done.stderr


def at(port: int) -> dict[str, object]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.mark.parametrize(
    ("error", "ending", "said"),
    [
        (RuntimeError(GLOO), Exit.LOST_PEER, "rank 0 has lost another rank, and stops: Connection closed by peer [127"),
        (dist.DistBackendError(NCCL), Exit.LOST_PEER, "remote process exited or there was a network error; ncclRemote"),
        (RuntimeError(IFACE), Exit.CANNOT_MEET, "the ranks did not meet: Unable to find address for: ib0"),
        (NotMet("1 of 2 ranks came"), Exit.NOT_MET, "the ranks did not meet: 1 of 2 ranks came"),
    ],
    ids=["gloo", "nccl", "a later group's interface", "no peers"],
)
def test_last_line_of_rank_is_library_error(monkeypatch, capsys, error, ending, said):
    """The last line of a rank is what restarts.jsonl shows."""

    def fails(path):
        raise error

    monkeypatch.setattr(train, "load_config", fails)
    monkeypatch.setattr(sys, "argv", ["train", "config.yaml"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == ending
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_unknown_interface_is_named_and_not_retried(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", vocab_size=97)
    settings = "model.layers=1 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.precision=fp32"
    run = f"nproc=2 data.path={tokens} vocab.size=97 run.dir={tmp_path}/run train.steps=1"
    done = start("launch.local", *run.split(), *settings.split(), GLOO_SOCKET_IFNAME="ib0")
    assert done.returncode == 1
    (line,) = map(json.loads, (tmp_path / "run" / "restarts.jsonl").read_text().splitlines())
    assert (line["class"], line["decision"]) == ("CANNOT_MEET", "give up")
    assert line["last"].endswith("the ranks did not meet: Unable to find address for: ib0")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", **at(29_999)}])
def test_stale_variables_without_peers_mean_single_process(monkeypatch, environment):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"RANK": "1"}).items():
        monkeypatch.setenv(name, str(value))
    with ranks_or_alone() as device:
        assert device.type in ("cpu", "cuda") and not dist.is_initialized()


def test_generate_with_stale_variables_says_what_it_waits_for(monkeypatch, capsys, tmp_path):
    place(monkeypatch)
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000001/manifest.json").touch()
    monkeypatch.setattr(
        generate, "read_manifest", lambda folder: {"tensors": ["embedding.weight"]}
    )  # the ranks meet before they read the checkpoint
    monkeypatch.setattr(mesh, "PATIENCE", timedelta(seconds=0.2))
    monkeypatch.setattr(sys, "argv", ["generate", f"run={tmp_path}", "prompt=x"])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == 2
    waits, error = capsys.readouterr().err.splitlines()
    assert waits.startswith("rank 0 of 2 waits for the others at 127.0.0.1:0 (RANK and WORLD_SIZE are set")
    assert error.startswith("error: 1 of 2 ranks came within 0.2 s") and "unset them to run alone" in error
