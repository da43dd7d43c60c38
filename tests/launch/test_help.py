"""`--help KEY`: value, type and text of a setting."""

import re

import pytest
import yaml

from data_prep import app
from launch import local
from tests.in_process import in_process


@pytest.mark.parametrize(
    ("main", "arguments", "expected"),
    [
        (local.main, "--help optim.lr", "optim.lr=null  number or null\n    peak learning rate; null: "),
        (local.main, "optim.lr=1e-3 --help optim.lr", "optim.lr=0.001  number or null\n    peak learning rate; null: "),
        (local.main, "--help seed", "seed=0\n    seed of the initial weights and of the order of the samples\n"),
        (app.main, "--help corpus.paths corpus=files", "corpus.paths=  list of text\n    files, globs, folders"),
    ],
)
def test_help_shows_value_type_and_text(main, arguments, expected):
    done = in_process(main, *arguments.split())
    assert done.returncode == 0 and done.stdout.startswith(expected), done.stdout + done.stderr


def test_help_shows_every_key_with_its_text():
    said = in_process(local.main, "optim.lr=1e-3", "--help").stdout
    keys = re.findall(r"^  (\S+)=\S* {2,}\w", said, re.MULTILINE)
    assert {"optim.lr", "optim.body.lr", "seed", "nproc", "restart.delay", "run.dir", "model.layers"} <= set(keys)
    assert len(keys) == len(re.findall(r"^  [\w.]+=", said, re.MULTILINE))
    assert re.search(r"^  optim\.lr=0\.001 +peak learning rate; null: ", said, re.MULTILINE)


def test_help_shows_the_values_of_the_run_to_resume(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (tmp_path / "data").mkdir()
    values = in_process(local.main, "optim.lr=3e-3", "optim.clip=2", "data.path=x", f"run.dir={run}", "--cfg", "job")
    frozen = yaml.safe_load(values.stdout)
    for key in ("nproc", "freeze", "restart", "resume"):
        del frozen[key]
    (run / "config.yaml").write_text(yaml.safe_dump(frozen))
    for given in (f"resume={run}", f"run.dir={run}"):
        done = in_process(local.main, given, "optim.clip=4", "--help", "optim.lr", "optim.clip", "nproc")
        assert done.stdout.splitlines()[::2] == [
            f"optim.lr=0.003  number or null, from {run}/config.yaml",
            "optim.clip=4.0  number, from the command line",
            "nproc=0  default",
        ], done.stderr
        whole = in_process(local.main, given, "--help").stdout
        assert f"From {run}/config.yaml" in whole and "  optim.lr=0.003 " in whole


def test_help_on_a_group_shows_all_its_keys():
    done = in_process(local.main, "--help", "checkpoint")
    assert [line.partition("=")[0] for line in done.stdout.splitlines()[::2]] == [
        f"checkpoint.{key}" for key in ("every", "asynchronous", "keep", "keep_every", "keep_best", "reserve_seconds")
    ]


def test_help_on_an_empty_key_is_the_whole_help():
    done = in_process(local.main, "--help", "")
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr


def test_help_on_an_unknown_key_is_one_line():
    done = in_process(local.main, "--help", "optim.lrr")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown key optim.lrr; did you mean optim.lr?")
