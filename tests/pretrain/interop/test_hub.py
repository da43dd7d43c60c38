"""An exported folder reaches a hub whole, by the requests of huggingface_hub itself."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pretrain.commands import hf
from tests.data_prep.commands import ROOT
from tests.in_process import in_process
from tests.test_without_torch import write_model

REPO = "me/my-model"


class Hub(ThreadingHTTPServer):
    """The part of the hub's interface that an upload uses, with large files by LFS. Refuses a wrong token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, bool] = {}  # private
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # of LFS, by sha256


class Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        hub, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repos:
                return self.answer({"url": f"{hub.address}/{name}"}, 409)
            hub.repos[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.address}/{name}"})
        if path == f"/api/models/{REPO}/preupload/main":
            files = json.loads(data)["files"]
            modes = ("lfs" if file["path"].endswith(".safetensors") else "regular" for file in files)
            answer = [
                {"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)
            ]
            return self.answer({"files": answer})
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                file | {"actions": {"upload": {"href": f"{hub.address}/lfs/{file['oid']}"}}}
                for file in json.loads(data)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert path == f"/api/models/{REPO}/commit/main", path
        for line in data.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                hub.files[entry["value"]["path"]] = hub.stored[entry["value"]["oid"]]
        self.answer({"commitUrl": f"{hub.address}/{REPO}/commit/1", "commitOid": "1" * 40})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.stored[oid] = data
        self.answer({})

    def answer(self, content: dict[str, object], code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def push(hub: str, folder: Path, token: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command. huggingface_hub reads these variables once, when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": token}
    command = [sys.executable, "-m", "pretrain.interop.hf", "push", f"folder={folder}", f"repo={REPO}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_all_files_arrive(model, tmp_path):
    """Tries a new private repository, then the same one again, a wrong token, and a hub that is gone."""
    with serving() as hub:
        wrong = push(hub.address, model, "hf_wrong", tmp_path)
        assert wrong.returncode == 2 and not hub.repos
        assert wrong.stderr.startswith(f"error: repo={REPO} could not be written: ") and "401" in wrong.stderr
        assert len(wrong.stderr.splitlines()) == 1
        done = push(hub.address, model, "hf_right", tmp_path)
        assert done.returncode == 0 and done.stdout.endswith(f"pushed: {hub.address}/{REPO}\n"), done.stderr
        assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()} and hub.stored
        assert hub.repos == {REPO: True}
        hub.files.clear()
        assert push(hub.address, model, "hf_right", tmp_path).returncode == 0 and hub.files
    gone = push(hub.address, model, "hf_right", tmp_path)
    assert gone.returncode == 2 and gone.stderr.startswith(f"error: repo={REPO} could not be written: ")
    assert len(gone.stderr.splitlines()) == 1, gone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repo=me/a"], "folder= is missing"),
        (["folder={model}"], "repo= is missing"),
        (["folder={model}", "repo=a"], "repo=a must be OWNER/NAME"),
        (["folder={model}", "repo=a/b/c"], "repo=a/b/c must be OWNER/NAME"),
        (["folder={none}", "repo=me/a"], "{none}/config.json is missing"),
        (["folder={model}", "repo=me/a", "private=no"], "private=no must be true or false"),
        (["folder={model}", "repo=me/a"], "repo=me/a needs a token that may write to it: run `hf auth login`"),
    ],
)
def test_a_wrong_push_is_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    names = {"model": model, "none": tmp_path}
    done = in_process(hf.main, "push", *(argument.format(**names) for argument in arguments))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message.format(**names)}"), done.stderr
