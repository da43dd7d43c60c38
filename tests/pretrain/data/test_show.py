"""`python -m pretrain.data show` matches the batches that training served."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.token_file import TokenFile
from pretrain.checkpoint import checkpoints
from pretrain.commands.data import COLOURS, main
from pretrain.compose import freeze
from pretrain.config.job import JobConfig
from pretrain.corpora import samples
from pretrain.data import Windows, open_data
from pretrain.data.loader import BatchLoader
from pretrain.vocab import VocabShard
from tests.in_process import in_process
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import VOCAB, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]


def show(*arguments: str) -> subprocess.CompletedProcess[str]:
    return in_process(main, "show", *arguments)


def batches_of(config: JobConfig, rank: int, world: int, steps: int) -> list[list[list[int]]]:
    """Tokens of each sequence that the training loader serves to this rank, step by step."""
    loader = BatchLoader(
        samples(config, open_data(config.data)),
        batches=config.train.batches,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world=world,
        shard=VocabShard.of(0, 1, VOCAB),
        dtype=torch.float32,
        device=torch.device("cpu"),
        prefetch=1,
    )
    try:
        batches = [next(loader).micro_batches for _ in range(steps)]
    finally:
        loader.close()
    return [[tokens for micro in batch for tokens in micro.tokens_BT.tolist()] for batch in batches]


def shown(text: str) -> list[list[int]]:
    """Ids of each sample, as shown."""
    samples = re.split(r"\nsample .*\n", text)[1:]
    ids = [re.sub(r"(?m)^  .*, document .*$", "", sample).split() for sample in samples]
    return [[int(id) for id in sample] for sample in ids]


def test_show_matches_training_after_batch_change(tmp_path):
    data = {"a": str(write_tokens(tmp_path / "a")), "b": str(write_tokens(tmp_path / "b", seed=1))}
    settings = {"data__path": "", "data__corpora": data, "data__weights": {"a": 1, "b": 2}}
    first = tiny_config(tmp_path, tmp_path / "run", train__stop_after=3, **settings)
    run_ranks(2, train_rank, first)
    then = tiny_config(tmp_path, tmp_path / "run", train__stop_after=5, train__global_batch=6, **settings)
    freeze(then, open_data(then.data))
    assert len(checkpoints(tmp_path / "run")) == 1
    truth = batches_of(first, 1, 2, 3)
    with_first = show(
        *(f"data.corpora.{name}={path}" for name, path in data.items()),
        *("data.weights={a:1,b:2}", f"vocab.size={VOCAB}", "seed=7", "train.seq_len=16"),
        *("train.global_batch=12", "train.micro_batch=3", "step=3", "rank=1", "world=2"),
    )
    assert with_first.returncode == 0, with_first.stderr
    assert "step 3: samples 24 to 35" in with_first.stdout
    for ours, theirs in zip(shown(with_first.stdout), truth[2], strict=True):
        assert ours == theirs[: len(ours)] and len(ours) >= 15

    after = show(f"run={tmp_path / 'run'}", "step=5")
    assert after.returncode == 0 and "step 5: samples 42 to 47" in after.stdout, after.stderr + after.stdout


def test_documents_are_shown_with_file_and_position(tmp_path):
    windows = Windows((TokenFile(write_tokens(tmp_path / "a")),), 16)
    for index in range(len(windows) - 1):
        tokens = windows[index].tokens_T
        parts = windows.documents(index)
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == 16
        for part in parts:
            begin = int(part.file.pointers[part.document]) // part.file.dtype.itemsize + part.offset
            np.testing.assert_array_equal(
                part.file.tokens[begin:][: part.stop - part.start], tokens[part.start : part.stop]
            )
            assert part.offset + part.stop - part.start <= part.file.lengths[part.document]


def test_text_is_shown_with_tokenizer(tmp_path):
    data = make_corpus(tmp_path / "data")
    done = show(f"data.path={data}", "train.seq_len=32", "train.global_batch=2", "train.micro_batch=1")
    assert done.returncode == 0 and done.stdout.count("sample ") == 2, done.stderr
    assert "train-0000" in done.stdout and ", document 0 from its token " in done.stdout


def shown_on_a_terminal(*arguments: str) -> str:
    """Output of the command in a separate process, with a terminal as output."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pretrain.data", "show", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        os.close(theirs)
        pieces = []
        with suppress(OSError):  # end of a terminal after its last writer closed
            while piece := os.read(ours, 1 << 16):
                pieces.append(piece)
        os.close(ours)
    assert process.returncode == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_colours_only_on_terminal(tmp_path):
    data = write_tokens(tmp_path / "a")
    command = [f"data.path={data}", f"vocab.size={VOCAB}", "train.seq_len=64", "train.global_batch=2"]
    command += ["train.micro_batch=1"]
    plain, coloured = show(*command).stdout, shown_on_a_terminal(*command)
    shades = re.compile(r"\033\[(48;5;(\d+)|0)m")
    assert "\033" not in plain and "sample " in plain
    assert shades.sub("", coloured).split() == plain.split()
    documents = [int(number) for number in re.findall(r", document ([\d,]+) from", plain)]
    used = [
        {int(match[2]) for match in shades.finditer(text) if match[2]}
        for text in re.split(r"(?m)^  .*, document .*$", coloured)[1:]
    ]
    assert used == [set(COLOURS[document % len(COLOURS)]) for document in documents] and len(set(documents)) > 1


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["run=nowhere"], "nowhere/config.yaml is missing"),
        (["step=0", "data.path=x"], "step=0 must be at least 1"),
        (["world=0", "data.path=x"], "world=0 must be at least 1"),
        (["step=99999999999999999999", "data.path=x"], "step=99999999999999999999 must be at most"),
        (["rank=2", "world=2", "data.path=x"], "rank=2 must be below world=2"),
        (["data.path=x", "trian.steps=3"], "trian"),
        (["data.path=nowhere"], "data.path=nowhere must be a folder of token files: nowhere does not exist"),
        (["run=a", "seed=3"], "seed=3 must not be given with run=a"),
    ],
)
def test_invalid_command_prints_one_line(arguments, expected):
    done = show(*arguments)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
