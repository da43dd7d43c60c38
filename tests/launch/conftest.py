import json
from pathlib import Path

import pytest

from tests.launch.commands import run
from tests.launch.fake_slurm import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path_factory.mktemp("slurm"), monkeypatch)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a few made-up documents, tokenised by the real command with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"document {i}: " + " ".join(f"{i} times {j} is {i * j}." for j in range(40)) for i in range(120)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = folder / "tokens"
    done = run(
        f"data_prep/tokenize.py corpus=files corpus.paths=[{folder}/texts.jsonl] tokenizer=bpe"
        f" tokenizer.vocab_size=400 val_fraction=0.1 out={out}"
    )
    assert done.returncode == 0, done.stderr
    return out
