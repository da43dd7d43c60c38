"""launch/local.py as users type it, with real processes and files. Stops and faults are in test_faults.py."""

import fcntl
import importlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data_prep import app
from data_prep.token_file import Manifest
from launch import local
from pretrain import generate
from pretrain.checkpoint import checkpoints, step_of
from pretrain.data import Windows, open_corpus
from pretrain.generation import load_model
from tests.in_process import ROOT, in_process
from tests.launch.commands import SMALL, refused, run, scalars
from tests.pretrain.helpers import TIMES
from tests.pretrain.tiny import write_tokens
from tests.warm import torchrun


def bits_per_byte(folder: Path, data: Path) -> float:
    """Computes the truth: dense, in one process and fp32, over the whole validation split."""
    corpus = open_corpus(data)
    model, context = load_model(checkpoints(folder)[-1], torch.device("cpu"))
    nats, text_bytes = 0.0, 0
    for tokens, targets, _ in Windows(corpus.val, context):
        targets = torch.from_numpy(targets)
        with torch.no_grad():
            hidden = model.body(model.vocab.lookup(torch.from_numpy(tokens)[None]))[0]
            logits = hidden @ model.vocab.weight[: corpus.vocab_size].T
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        text_bytes += int(corpus.bytes_of_ids[targets[targets >= 0]].sum())
    assert text_bytes > 0.99 * Manifest.load(data).totals(["val"])[2], "all but the first token's text"
    return nats / math.log(2) / text_bytes


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Trains 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    settings = f"train.steps=12 log.every=4 train.precision=fp32 optim.lr=1e-2 optim.warmup_steps=2 {SMALL}"
    done = run(f"launch/local.py nproc=2 data.path={data} run.dir={folder} {settings}")
    assert done.returncode == 0, done.stderr
    (folder.parent / "said").write_text(done.stdout)
    return folder


def test_freeze_writes_settings_that_ranks_of_another_launcher_train(data, tmp_path):
    folder = tmp_path / "a"
    settings = f"data.path={data} run.dir={folder} train.steps=2 optim.warmup_steps=1 {SMALL}"
    done = in_process(local.main, "freeze=true", "nproc=2", *settings.split())
    assert done.returncode == 0 and f"frozen: {folder}/config.yaml" in done.stdout, done.stderr
    assert not checkpoints(folder)
    done = torchrun(2, "-m", "pretrain.train", folder / "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [step_of(found) for found in checkpoints(folder)] == [2]


def test_freeze_must_be_true_or_false(data, tmp_path):
    assert "freeze=maybe must be true or false" in refused(f"freeze=maybe data.path={data} run.dir={tmp_path}/a")


def test_a_run_leaves_config_metrics_curves_and_a_checkpoint(trained, data):
    assert f"run: {trained}" in (trained.parent / "said").read_text().splitlines()[-3]
    assert [line["step"] for line in scalars(trained)] == [1, 4, 8, 12]
    assert scalars(trained)[-1]["val_bits_per_byte"] == pytest.approx(bits_per_byte(trained, data), rel=1e-4)
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s"}
    keys |= {"tokens_per_s_per_rank", "step_s", "peak_memory_gib"}
    assert keys <= scalars(trained)[0].keys() and {"val_loss", "val_bits_per_byte"} <= scalars(trained)[-1].keys()
    assert scalars(trained)[-1]["tokens"] == 12 * 8 * 32
    assert "mfu" not in scalars(trained)[-1], "the peak of a CPU is not known"
    for line in scalars(trained):
        assert line["tokens_per_s"] == pytest.approx(8 * 32 / line["step_s"])
        assert line["tokens_per_s_per_rank"] == line["tokens_per_s"] / 2 and line["peak_memory_gib"] > 0.05
    assert [folder.name for folder in checkpoints(trained)] == ["step-00000012"]
    assert not list(trained.rglob("*.pt")) and not list(trained.rglob(".metadata"))
    assert list(trained.glob("events.out.tfevents.*"))
    assert (trained / "config.yaml").is_file() and (trained / "tokenizer" / "spec.json").is_file()


def test_a_log_has_plain_lines_and_a_table(trained):
    said = (trained.parent / "said").read_text()
    assert "\x1b" not in said and "\r" not in said and said.count("first step: done ") == 1
    table = said.split("\n\n")[1].splitlines()
    assert table[0] == "steps          12 of 12" and table[-1] == "checkpoints    1, the newest is step 12"
    assert [line.split("  ")[0] for line in table] == [
        "steps", "tokens", "loss", "val loss", "val bits/byte", "time", "speed", "peak memory", "checkpoints"
    ]  # fmt: skip


def test_the_same_command_resumes_and_another_number_of_ranks_may_take_over(trained, data, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(trained, folder)
    again = f"data.path={data} run.dir={folder} log.every=4 {SMALL}"
    done = run(f"launch/local.py nproc=1 train.steps=16 {again}")
    assert done.returncode == 0, done.stderr
    assert "resumed:" in done.stdout and "step 12" in done.stdout
    assert [line["step"] for line in scalars(folder)] == [1, 4, 8, 12, 13, 16]


def test_rank_says_why_nothing_is_left_to_train(trained, data, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    frozen = (folder / "config.yaml").read_text().replace("steps: 12", "steps: 16").replace(str(trained), str(folder))
    (folder / "config.yaml").write_text(frozen.replace("stop_after: null", "stop_after: 12"))
    done = torchrun(1, "-m", "pretrain.train", folder / "config.yaml", cwd=ROOT)
    stands = (
        f"nothing to train: {folder} has reached train.stop_after=12 (step 12 of 16); train.stop_after=null continues"
    )
    assert done.returncode == 0 and stands in done.stdout and "freeze=true" in done.stdout, done.stderr
    assert "tokens/s" not in done.stdout, "no step ran"


def test_a_run_says_how_the_matrix_is_split_and_what_the_lookup_saves(trained, data, tmp_path):
    said = (trained.parent / "said").read_text()
    assert "vocab.parallel=auto: 2 of 2 ranks share a copy\n" in said and "(FSDP2)" in said
    for line in scalars(trained):
        assert 0 < line["lookup_saved"] < 1 and 1 <= line["lookup_balance"] <= 2

    arguments = f"data.path={data} run.dir={tmp_path}/run log.every=1 train.steps=2 {SMALL}"
    done = run(f"launch/local.py nproc=2 vocab.parallel=1 {arguments}")
    assert done.stdout.count("vocab.parallel=1 is clearly worse than 2, which auto would choose") == 1, done.stdout
    assert "lookup_saved" not in scalars(tmp_path / "run")[0]  # nothing crosses


def test_deepspeed_trains_as_fsdp2_does_and_is_quiet(trained, data, tmp_path):
    """Evaluates, and shards every parameter. The exact resume is tested with the engines."""
    settings = f"train.steps=12 log.every=4 train.precision=fp32 optim.lr=1e-2 optim.warmup_steps=2 {SMALL}"
    engine = "engine=deepspeed engine.zero_stage=3 engine.extra.zero_optimization.stage3_param_persistence_threshold=0"
    arguments = f"nproc=2 data.path={data} run.dir={tmp_path / 'run'} {settings}"
    done = run(f"launch/local.py {arguments} {engine}")
    assert done.returncode == 0, done.stderr
    assert "deepspeed ZeRO-3, float32" in done.stdout and "DeepSpeed" not in done.stdout and not done.stderr
    for one, other in zip(scalars(tmp_path / "run"), scalars(trained), strict=True):
        for key in one.keys() - TIMES:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_generating_alone_and_on_two_ranks_gives_the_same_text(trained):
    arguments = ["-m pretrain.generate", f"run={trained} tokens=25 seed=3 top_k=50 top_p=0.9 prompt=document"]
    alone = run(*arguments)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("document") and len(alone.stdout) > 20
    assert in_process(generate.main, *arguments[1].split()).stdout == alone.stdout
    split = run("-m torch.distributed.run --standalone --nproc-per-node 2", *arguments)
    assert split.stdout == alone.stdout, split.stderr


@pytest.fixture(scope="module")
def longer(trained, data, tmp_path_factory) -> Path:
    """Continues the same run to step 16."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("longer") / "run"))
    settings = f"nproc=2 data.path={data} run.dir={folder} train.steps=16 log.every=4 train.precision=fp32 {SMALL}"
    done = run(f"launch/local.py {settings}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("fault", ["flipped", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(longer, data, tmp_path, fault):
    folder = tmp_path / "run"
    shutil.copytree(longer, folder)
    settings = f"nproc=2 data.path={data} run.dir={folder} log.every=4 train.precision=fp32 {SMALL}"
    again = f"launch/local.py {settings}"
    before = scalars(folder)
    older, newest = checkpoints(folder)
    (second,) = newest.glob("shard-00002*")
    if fault == "flipped":
        content = bytearray(second.read_bytes())
        content[len(content) // 2] ^= 4
        second.write_bytes(content)
    else:
        (newest / "manifest.json").unlink()
    done = run(f"{again} train.steps=16")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert str(newest) in warning and f"resuming from {older}" in warning
    assert f"is now {newest.with_name('damaged-' + newest.name)}" in warning
    assert f"resumed: {older}, step 12" in done.stdout
    compared = [{key: value for key, value in line.items() if key not in TIMES} for line in before]
    assert [{key: line[key] for key in was} for was, line in zip(compared, scalars(folder), strict=True)] == compared
    assert [step_of(path) for path in checkpoints(folder)] == [12, 16], "the same step was saved again"

    for path in checkpoints(folder):
        (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-9])
    frozen = (folder / "config.yaml").read_bytes()
    error = refused(f"{settings} train.steps=20")
    assert "is intact, and a run never restarts from step 0" in error and str(newest) in error
    assert (folder / "config.yaml").read_bytes() == frozen and scalars(folder)[-1]["step"] == 16


def test_run_without_a_whole_checkpoint_is_refused(trained, data, tmp_path):
    """The launcher reads manifests; the ranks read the files."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (only,) = checkpoints(folder)
    os.truncate(next(only.glob("*.safetensors")), 1000)
    done = run(f"launch/local.py nproc=2 data.path={data} run.dir={folder} train.steps=16 {SMALL}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "1000 bytes, but the manifest says" in done.stderr and "never restarts from step 0" in done.stderr
    assert checkpoints(folder) == [only] and scalars(folder)[-1]["step"] == 12


def test_a_megatron_written_pair_is_trained_on(tmp_path):
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    prefix = tmp_path / "megatron"
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i in range(60):
        builder.add_document(torch.arange(i, i + 50) % 97, [50])
    builder.finalize(f"{prefix}.idx")
    done = run(f"launch/local.py data.path={prefix} vocab.size=97 run.dir={tmp_path}/run train.steps=8 {SMALL}")
    assert done.returncode == 0, done.stderr
    assert scalars(tmp_path / "run")[-1]["loss"] < 4.7


BAD = {
    "an unknown key": ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
    "a value of the wrong type": ("train.steps=many", "train.steps=many must be a whole number"),
    "a rate that is not a number": ("optim.lr=fast", "optim.lr=fast must be a number"),
    "neither true nor false": ("log.tensorboard=perhaps", "log.tensorboard=perhaps must be true or false"),
    "a value out of range": ("optim.lr=-1", "optim.lr=-1.0 must be positive"),
    "an unknown model": ("model=gpt9", "model=gpt9 must be one of gpt2, "),
    "a value of a recipe": (
        "recipe=gpt2_124m",
        "must not exceed model.context=32; recipe=gpt2_124m sets train.seq_len",
    ),
    "a value of a preset": ("model=gpt2 train.seq_len=2048", "model.context=32"),
    "heads that do not divide the width": ("model.heads=3", "model.heads=3 must divide model.width=32"),
    "a sequence longer than the context": ("train.seq_len=64", "train.seq_len=64 must not exceed model.context=32"),
    "a batch that the ranks cannot share": (
        "train.global_batch=6",
        "× 2 ranks = 4 must divide train.global_batch=6; give train.global_batch=4 or 8, or train.micro_batch=1",
    ),
    "a batch of no micro-batch": ("train.global_batch=9", "train.global_batch=9; give train.global_batch=8 or 12\n"),
    "a vocabulary axis that does not divide the ranks": ("vocab.parallel=3", "vocab.parallel=3 must divide"),
    "a vocabulary smaller than the tokenizer's": ("vocab.size=300", "vocab.size=300 must be at least 400"),
    "an unknown group": ("+trian.steps=5", "unknown key trian"),
    "a time that is none": ("train.time_limit=soon", "train.time_limit=soon must be a time such as 4h"),
    "a time too short to save in": ("train.time_limit=50s", "train.time_limit=50s must exceed checkpoint.reserve_s"),
    "an unknown engine": ("engine.name=zero", "engine.name=zero must be one of fsdp2, deepspeed"),
    "a stage that there is not": ("engine=deepspeed engine.zero_stage=4", "engine.zero_stage=4 must be 0, 1, 2 or 3"),
    "a key of DeepSpeed's that is ours": (
        "engine=deepspeed engine.extra.train_batch_size=8",
        "engine.extra.train_batch_size must not be set: use train.global_batch",
    ),
    "moving off from no GPU": ("engine.offload=cpu", "engine.offload=cpu must be none on a CPU"),
    "a clip that is not a number": ("optim.clip=nan", "optim.clip=nan must be a number"),
    "more rows than there can be": ("vocab.size=20000000", "vocab.size=20000000 must be in [1, 16777216]"),
    "several values": ("seed=1,2", "seed=1,2 is several values: give one, or a list as seed=[1,2]; a sweep is launch/"),
    "no data": ("data.path=", "data.path is missing"),
    "data that is not there": (
        "data.path=/nowhere",
        "data.path=/nowhere must be a folder of token files: /nowhere does not exist",
    ),
    "no run folder": ("run.dir=", "run.dir is missing"),
    "ranks that are no number": ("nproc=two", "nproc=two must be a number of ranks"),
    "a negative number of starts": ("restart.max_failures=-1", "restart.max_failures=-1 must not be negative"),
    "a key that restarts have not": ("restart.retries=3", "unknown key restart.retries; there are"),
}


@pytest.mark.parametrize("bad,message", BAD.values(), ids=BAD.keys())
def test_a_wrong_setting_is_one_clear_error_before_anything_is_written(data, tmp_path, bad, message):
    folder = tmp_path / "run"
    assert message in refused(f"nproc=2 data.path={data} run.dir={folder} {SMALL} {bad}")
    assert not folder.exists()


def test_a_process_with_a_wrong_setting_says_one_line_and_exits_with_2(tmp_path):
    """Compares all output: there is no warning of a library."""
    done = run(f"launch/local.py data.path=/nowhere run.dir={tmp_path}/run {SMALL}", cold=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: data.path=/nowhere must be a folder") and not (tmp_path / "run").exists()


def test_missing_path_names_its_neighbour(trained, data, tmp_path):
    typed = data.parent / "tokns"
    for setting in (f"data.path={typed}", f"data.corpora.web={typed}"):
        error = refused(f"nproc=2 {setting} run.dir={tmp_path}/run {SMALL}")
        assert f"{setting} must be a folder of token files: {typed} does not exist; there is {data}\n" in error
    run = f"{trained}-"
    assert f"config.yaml is missing; {run} does not exist; there is {trained}\n" in refused(f"resume={run}")
    done = in_process(generate.main, f"run={run}")
    assert done.stderr == f"error: run={run} has no checkpoint: {run} does not exist; there is {trained}\n"


def test_folder_of_text_names_the_command_that_makes_token_files(data, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for text in (tmp_path, tmp_path / "a.txt"):
        error = refused(f"nproc=2 data.path={text} run.dir={tmp_path}/run {SMALL}")
        assert f"data.path={text} has no token files; make them: python data_prep/tokenize.py corpus=files" in error
    (tmp_path / "unfinished").mkdir()
    assert "is unfinished: the same tok" in refused(f"nproc=2 data.path={tmp_path} run.dir={tmp_path}/run {SMALL}")


def test_number_of_rows_names_what_brought_it(trained, data, tmp_path):
    error = refused(f"resume={trained} train.steps=20 vocab.size=500")
    assert f"holds a run with 400 vocabulary rows (data.path={data}), this command has 500 (vocab.size=500)" in error


def test_more_ranks_than_cores_are_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with patch.object(local, "run_ranks", return_value=0):
        done = in_process(local.main, *f"nproc=2 data.path={data} run.dir={tmp_path}/run {SMALL}".split())
    assert done.stderr == "warning: nproc=2 should not exceed the 1 CPU cores of this process: the ranks take turns\n"


def test_broken_data_is_named(data, tmp_path):
    for spoil, message in ((_truncate, "bytes, but the manifest says"), (_other_tokenizer, "another tokenizer")):
        copy = tmp_path / spoil.__name__
        shutil.copytree(data, copy)
        spoil(copy)
        assert message in refused(f"data.path={copy} run.dir={tmp_path}/run {SMALL}")
        assert not (tmp_path / "run").exists()


def _truncate(folder: Path) -> None:
    path = next(folder.glob("train-*.bin"))
    path.write_bytes(path.read_bytes()[:-2])


def _other_tokenizer(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer" / "spec.json").read_text())
    spec["pattern"] += "|x"
    (folder / "tokenizer" / "spec.json").write_text(json.dumps(spec))


def test_ids_beyond_the_vocabulary_stop_the_run(tmp_path):
    prefix = write_tokens(tmp_path / "tokens", vocab_size=97)
    done = run(f"launch/local.py data.path={prefix} vocab.size=50 run.dir={tmp_path}/run {SMALL}")
    assert done.returncode == 1
    assert "the data contains id 96: vocab.size=50 must be larger" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change,message",
    [("model.width=64", "model.width=32"), ("seed=5", "seed=0"), ("vocab.tie=untied", "vocab.tie=tied")],
)
def test_a_run_is_not_continued_as_another_model(trained, data, change, message):
    before = (trained / "config.yaml").read_bytes()
    error = refused(f"nproc=2 data.path={data} run.dir={trained} train.steps=20 {SMALL} {change}")
    assert message in error and "choose another run.dir" in error
    assert (trained / "config.yaml").read_bytes() == before


def test_a_run_is_not_continued_with_another_tokenizer(trained, data, tmp_path):
    """The other tokenizer has as many rows, but another split pattern, so other tokens."""
    settings = "tokenizer=bpe tokenizer.vocab_size=400 tokenizer.pattern=gpt2 val_fraction=0.1"
    texts = data.parent / "texts.jsonl"
    arguments = f"corpus=files corpus.paths=[{texts}] {settings} workers=1 out={tmp_path}/other"
    done = in_process(app.main, *arguments.split())
    assert done.returncode == 0, done.stderr
    error = refused(f"nproc=2 data.path={tmp_path}/other run.dir={trained} train.steps=20 {SMALL}")
    assert re.search(
        rf"holds a run with tokenizer \w{{12}} \(data.path={data}\), this command has tokenizer \w{{12}} \(data", error
    )


def test_a_run_in_use_is_refused(trained, data):
    with open(trained / ".ranks.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by" in refused(f"nproc=1 data.path={data} run.dir={trained} train.steps=20 {SMALL}")


def test_help_names_the_keys():
    done = run("launch/local.py --help")
    assert done.returncode == 0
    for key in ("nproc", "global_batch", "vocab", "data.path=", "gpt2_xl", "resumes"):
        assert key in done.stdout
    assert "temperature" in in_process(generate.main, "--help").stdout
