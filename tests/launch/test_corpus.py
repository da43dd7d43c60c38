"""Tokenising as jobs: submissions, dependencies and refusals. Without Slurm; tests/slurm has one."""

import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.app import TokenizeConfig
from data_prep.corpus import FilesCorpus
from data_prep.errors import DataError
from data_prep.tokenizer import BpeTokenizer, FileTokenizer, TokenizerConfig
from launch.cluster import ClusterConfig
from launch.corpus import WARNING, CorpusTask, TokenizeJobConfig, steps_of
from tests.data_prep.commands import ROOT, python

SCRIPT = ROOT / "launch" / "slurm.py"


def config_of(tokenizer: TokenizerConfig | None = None, tasks: int = 3, **settings) -> TokenizeJobConfig:
    cluster = ClusterConfig(time="0:10:00", tasks=tasks, cpus_per_task=4, **settings.pop("cluster", {}))
    settings = {"out": "data/mine"} | settings
    return TokenizeJobConfig(FilesCorpus(["texts"]), tokenizer or BpeTokenizer(), cluster=cluster, **settings)


def test_the_parts_wait_for_a_tokenizer_and_the_manifest_for_all() -> None:
    prepare, parts, manifest = steps_of(config_of(), prepared=False)
    assert (prepare.parts, parts.parts, manifest.parts) == (["prepare"], ["0/3", "1/3", "2/3"], [None])
    jobs = {"prepare": "7"}
    assert prepare.dependency({}) == {}
    assert parts.dependency(jobs) == {"dependency": "afterok:7", "kill-on-invalid-dep": "yes"}
    assert manifest.dependency({**jobs, "parts": "8"})["dependency"] == "afterok:7,afterany:8"
    assert manifest.dependency({"parts": "8"})["dependency"] == "afterany:8"


@pytest.mark.parametrize(
    ("tokenizer", "prepared", "tasks", "names"),
    [
        (BpeTokenizer(), True, 3, ["parts", "manifest"]),
        (FileTokenizer("x"), False, 3, ["parts", "manifest"]),  # saved by the command itself
        (BpeTokenizer(), False, 1, ["manifest"]),  # which is the plain run
    ],
)
def test_finished_corpus_submits_no_job(
    tokenizer: TokenizerConfig, prepared: bool, tasks: int, names: list[str]
) -> None:
    assert [step.name for step in steps_of(config_of(tokenizer, tasks), prepared)] == names


def test_a_job_tokenises_as_the_command_says() -> None:
    config = config_of(val_fraction=0.5).tokenizing()
    assert type(config) is TokenizeConfig and config.val_fraction == 0.5
    assert config.out == str(Path.cwd() / "data/mine") and config.workers == 4
    assert config_of(workers=2).tokenizing().workers == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"part": "0/2"}, "verify=, stats= and part= are for data_prep/tokenize.py"),
        ({"out": None, "verify": "data/mine"}, "verify=, stats= and part= are for data_prep/tokenize.py"),
        ({"cluster": {"nodes": 2}}, "must be 1 × 1: cluster.tasks sets the number of parallel jobs"),
        ({"cluster": {"tasks_per_node": 3}}, "cluster.nodes=1 × 3 tasks"),
    ],
)
def test_settings_not_for_jobs_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        config_of(**settings)
    assert message in str(error.value)


def test_task_near_its_time_limit_requeues_itself_after_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = config_of(out=str(tmp_path)).tokenizing()
    task = CorpusTask(replace(config, part="1/3"), str(tmp_path))
    records = tmp_path / "unfinished"
    records.mkdir()
    (records / "00001.json").touch()
    (records / "settings.json").touch()
    before = task._done()

    def warn() -> list[list[str]]:
        """Sends a signal to this thread only."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [WARNING])
        signal.pthread_kill(threading.get_ident(), WARNING)
        task._go_on_later(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return asked

    (records / "00002.json").touch()  # another part's
    assert warn() == []
    (records / "00004.json").touch()
    assert warn() == [["scontrol", "requeue", "7"]]


def test_a_dry_run_prints_every_script_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    command = ["--config-name", "tokenize", "corpus=files", "corpus.paths=[a.txt]", "out=out", "cluster.tasks=3"]
    done = python(SCRIPT, *command, "+cluster=cpu", "dry_run=true", cwd=tmp_path, PATH="")
    assert done.returncode == 0, done.stderr
    scripts = done.stdout.split("#!/bin/bash\n")[1:]
    assert [value_of("job-name", script) for script in scripts] == ["out-prepare", "out-parts", "out-manifest"]
    assert [value_of("array", script) for script in scripts] == [None, "0-2%3", None]
    assert [value_of("dependency", script) for script in scripts] == [
        None,
        "afterok:PREPARE",
        "afterok:PREPARE,afterany:PARTS",
    ]
    assert all(f"-m submitit.core._submit {tmp_path}/out.slurm\n" in script for script in scripts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def value_of(key: str, script: str) -> str | None:
    return next((line.split("=", 1)[1] for line in script.splitlines() if line.startswith(f"#SBATCH --{key}=")), None)
