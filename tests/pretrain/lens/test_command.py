"""The command `python -m pretrain.lens`, as users type it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.describe import describe, shown
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer
from pretrain.commands import hf
from pretrain.commands import lens as program
from pretrain.commands.lens_show import see
from pretrain.compose import freeze, load_config
from pretrain.config.job import CONFIG_FILE
from pretrain.data import open_data
from pretrain.lens.examples import EXAMPLES
from tests.in_process import in_process
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import tiny_config, train_rank
from tests.ranks import run_ranks
from tests.warm import torchrun

ROOT = Path(__file__).resolve().parents[3]
TEXT = "ab, ab, ab"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps, with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    data = make_corpus(folder / "data")
    config = tiny_config(data, folder / "a", vocab__size=None, train__steps=3, model__context=256, train__seq_len=16)
    freeze(config, open_data(config.data))
    run_ranks(1, train_rank, config)
    return folder / "a"


def lens(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs the command: one rank in this process, several ranks in their own."""
    if ranks == 1:
        return in_process(program.main, *arguments)
    return torchrun(ranks, "-m", "pretrain.lens", *arguments, cwd=ROOT)


def sheet_of(out: Path) -> dict:
    return json.loads(re.search(r"const sheet = (.*);\n", (out / "lens.html").read_text())[1])


def near(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else a == b


def test_two_ranks_match_one(run, tmp_path):
    settings = [f"run={run}", f"text={TEXT}", "norm=plain", "decoder=mlp", "points=attention,block", "guesses=3"]
    sheets = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        done = lens(*settings, f"out={out}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written:") == 1 and "KL(output‖layer)" in done.stdout
        assert len(list(out.glob("*.png"))) == 9
        sheets.append(sheet_of(out))
    assert near(*sheets)
    shown = sheets[0]
    assert shown["layers"] == ["input", "block 0 attention", "block 0", "block 1 attention", "output"]
    assert shown["tokens"][0] == "<|endoftext|>" and shown["tokens"][1:] == shown["nexts"][:-1]
    assert "".join(shown["tokens"][1:]).replace("·", " ") == TEXT and shown["nexts"][-1] == ""
    assert "norm plain, through the last mlp" in shown["title"]
    facts = dict(shown["facts"])
    assert facts["prompt"] == TEXT and facts["step"] == "3" and facts["checkpoint"].endswith("step-00000003")
    count = sum(parameter.numel() for parameter in load_config(run / CONFIG_FILE).model.body().parameters())
    rows = Tokenizer.load(run / TOKENIZER_FOLDER).vocab_size
    count += rows * load_config(run / CONFIG_FILE).model.width
    assert facts["model"] == f"a, {count / 1e6:.1f}M parameters, vocabulary of {rows:,}"


def test_window_and_only_choose_positions(run, tmp_path):
    done = lens(f"run={run}", "example=commas", f"out={tmp_path}", "window=20:200", "step=3")
    assert done.returncode == 0, done.stderr
    shown = sheet_of(tmp_path)
    tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
    ids = [tokenizer.end_of_document, *tokenizer.encode(EXAMPLES["commas"].text).tolist()]
    assert shown["positions"] == [n for n in range(20, 200) if tokenizer.decode([ids[n]]) == ","]
    assert set(shown["tokens"]) == {","}


def test_exported_model_gives_the_same_views(run, tmp_path):
    list(hf.export_model([f"run={run}", f"out={tmp_path / 'model'}"]))
    settings = {"text": TEXT, "norm": "none"}
    ours, _ = see(program.LensConfig(run=str(run), **settings), torch.device("cpu"))
    theirs, _ = see(program.LensConfig(hf=str(tmp_path / "model"), **settings), torch.device("cpu"))
    assert (
        theirs.title == ours.title.replace("a, ", "model, ").replace("step 3, ", "")
        and theirs.guesses == ours.guesses
        and theirs.tokens == ours.tokens
    )
    for a, b in zip(theirs.views, ours.views, strict=True):
        assert np.allclose(a.values, b.values, rtol=1e-5, atol=1e-6), a.key


def test_help_has_each_example_and_each_key_with_its_text():
    done = lens("--help")
    assert done.returncode == 0 and all(f"example={name}" in done.stdout for name in EXAMPLES)
    said = " ".join(done.stdout.split())
    for key, setting in describe(program.LensConfig).items():
        assert f" {key}={shown(setting.default)} {setting.text}" in said


def test_text_after_the_window_does_not_matter(run):
    text = "".join(f"{i:03}" for i in range(100))  # 300 tokens and <|endoftext|>; the context has 256

    def seen(text: str):
        settings = program.LensConfig(run=str(run), text=text, window="20:30")
        return see(settings, torch.device("cpu"))[0]

    long, short = seen(text), seen(text[:40])
    assert long.tokens == short.tokens and long.guesses == short.guesses
    for a, b in zip(long.views, short.views, strict=True):
        assert np.allclose(a.values, b.values, rtol=1e-5, atol=1e-5), a.key


@pytest.mark.parametrize(
    "settings,message",
    [
        ([], "give one of run=, the folder of a run, and hf=, the folder of a Hugging Face model"),
        (["run={run}", "hf=x", "text=a"], "give one of run="),
        (["run={run}", "text=a", "out="], "out= must be a folder; it may be new"),
        (["run={run}", "text=a", f"out={sys.executable}"], "must be a folder; it may be new"),
        (["run={run}"], "give one of text=, file= and example=: the prompt"),
        (["run={run}", "text=a", "file=b"], "give one of text="),
        (["run={run}", f"file={sys.executable}"], "must be UTF-8 text: invalid"),
        (["run={run}", "text=a\udcff"], "text must be UTF-8 text: surrogates not allowed"),
        (["run={run}", "text=a", "guesses=101"], "guesses=101 must be in [1, 100]"),
        (["run={run}", "example=x"], "example=x must be one of rare_word, repetition, commas"),
        (["run={run}", "text=a", "norm=half"], "norm=half must be one of full, plain, none"),
        (["run={run}", "text=a", "step=7"], "step=7 has no checkpoint"),
        (["run=nowhere", "text=a"], "run=nowhere has no checkpoint"),
        (["run={run}", "file=nowhere.txt"], "nowhere.txt"),
        (["run={run}", "text=a", "window=0:9"], "window=0:9 must be START:STOP within the text's 2 positions"),
        (["run={run}", "text=a", "only=b"], "only=b must be the text of a token in the window"),
        (["run={run}", "text=" + "a" * 256], "the text has 257 tokens up to the end of the window, but model"),
        (["run={run}", "text=a", "colour=red"], "unknown key colour; there are run, step, weights, hf"),
        (["run={run}", "text=a", "step=abc"], "step=abc must be a whole number or null"),
        (["run={run}", "text=a", "guesses=many"], "guesses=many must be a whole number"),
        (["run={run}", "text"], "'text' must be key=value"),
        (["hf=nowhere", "text=a"], "nowhere"),
        (["hf=x", "step=3", "text=a"], "step=3 must be null with hf=x"),
    ],
)
def test_wrong_setting_is_one_line(run, settings, message):
    done = lens(*(setting.format(run=run) for setting in settings or ["out=x"]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
