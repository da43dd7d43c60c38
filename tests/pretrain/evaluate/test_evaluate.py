"""Tasks of lm-eval on our model: its log-probabilities are those of the exported model, on any number of ranks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from data_prep.tokenizer import Tokenizer
from pretrain.checkpoint import checkpoint_of
from pretrain.checks import check_job
from pretrain.commands.evaluate import main
from pretrain.commands.hf import export_model
from pretrain.compose import build_config, freeze
from pretrain.config import evaluation
from pretrain.data import open_data
from pretrain.evaluate.harness import windows_of
from pretrain.evaluate.scoring import Window
from pretrain.evaluate.tasks import load_tasks
from pretrain.generation import load_model
from pretrain.hooks.tasks import TasksHook
from tests.in_process import in_process
from tests.pretrain.evaluate.on_ranks import NAMES, TASKS, WINDOWS, measured, scored
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import tiny_config, train_rank
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps, with the tasks after steps 2 and 3."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = make_corpus(folder / "data")
    config = tiny_config(
        data,
        folder / "run",
        vocab__size=None,
        train__steps=3,
        log__tensorboard=True,
        eval__tasks=NAMES,
        eval__tasks_path=TASKS,
        eval__tasks_every=2,
    )
    freeze(config, open_data(config.data))
    run_ranks(2, train_rank, config, timeout=120)
    return config.run_dir


def test_log_probabilities_are_those_of_the_exported_model(run, tmp_path):
    list(export_model([f"run={run}", f"out={tmp_path / 'hf'}"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = []
    for window in WINDOWS:
        with torch.no_grad():
            log_probs_TV = theirs(torch.tensor([window.ids[:-1]])).logits[0].double().log_softmax(-1)
        asked = torch.tensor(window.ids[-window.scored :])
        kept_TV = log_probs_TV[-window.scored :]
        total = kept_TV.gather(1, asked[:, None]).sum().item()
        expected.append((total, bool((kept_TV.argmax(-1) == asked).all())))
    for world in (1, 2, 4):
        for found in run_ranks(world, scored, run):
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert all(math.isclose(a, b, abs_tol=1e-4) for (a, _), (b, _) in zip(found, expected, strict=True))


def test_measures_are_the_same_on_any_number_of_ranks_and_in_the_run(run):
    alone = measured(0, 1, run)
    assert set(alone) == {"facts/acc", "stories/bits_per_byte", "copies/exact_match"}
    for world in (2, 4):
        for found in run_ranks(world, measured, run):
            assert found == pytest.approx(alone, abs=1e-6)
            assert found["facts/acc"] == alone["facts/acc"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    during = {line["step"]: {key: line[key] for key in line if key.startswith("task/")} for line in lines}
    assert not during[1] and set(during[2]) == {f"task/{key}" for key in alone}
    assert during[3] == pytest.approx({f"task/{key}": value for key, value in alone.items()}, abs=1e-6)
    assert any(b"details/task/facts/acc" in path.read_bytes() for path in run.glob("events*"))


def test_command_prints_a_table_and_writes_the_results(run):
    done = in_process(main, f"run={run}", "tasks=[facts,stories]", f"tasks_path={TASKS}", "limit=5")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "evaluations" / "step-00000003.json").read_text())
    assert results["n-samples"]["facts"]["effective"] == 5 and results["step"] == 3
    assert f"{results['results']['facts']['acc,none']:.4f}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("step 3: 2 measures; all results are in")


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    def error(*arguments: str) -> str:
        done = in_process(main, f"run={run}", *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "tasks=fact must be the name of a task" in error("tasks=fact", f"tasks_path={TASKS}")
    assert "has copies, facts, stories" in error("tasks=fact", f"tasks_path={TASKS}")
    assert "tasks_path=nowhere must be a folder" in error("tasks=facts", "tasks_path=nowhere")
    assert "limit=0 must be at least 1" in error("tasks=facts", "limit=0")
    config = build_config(OmegaConf.load(run / "config.yaml"))
    config.eval.tasks = ["fact"]
    with pytest.raises(ValueError, match=r"eval\.tasks=fact must be the name of a task"):
        check_job(config, 2, "cpu")
    (tmp_path / "lost.yaml").write_text((Path(TASKS) / "facts.yaml").read_text())
    assert "tasks=facts cannot be loaded" in error("tasks=facts", f"tasks_path={tmp_path}")
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    assert "tasks=facts need lm-eval: pip install 'rowshard[eval]'" in error("tasks=facts", f"tasks_path={TASKS}")


def test_mistake_in_a_task_does_not_end_the_training(run, tmp_path, capsys):
    task = (Path(TASKS) / "facts.yaml").read_text().replace("facts.jsonl", f"{TASKS}/facts.jsonl")
    wrong = "{{1 // (question != '5 and 3 make')}}"  # in the last document: lm-eval tries the first one when it loads
    (tmp_path / "facts.yaml").write_text(task.replace("{{question}}", wrong))
    config, loaded = build_config(OmegaConf.load(run / "config.yaml")), load_tasks("", ["facts"], str(tmp_path))
    model, _ = load_model(checkpoint_of(run, None), torch.device("cpu"))
    hook = TasksHook(config, SimpleNamespace(log=object()), loaded, Tokenizer.load(run / "tokenizer"))
    assert hook.measure(SimpleNamespace(model=model, must_stop=lambda: False)) == {}
    assert "cannot be measured: integer division or modulo by zero" in capsys.readouterr().err


def test_windows_are_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows

    for length in (0, 1, 4, 5, 8, 11):
        ids = list(range(10, 10 + length))
        theirs = [([*given, asked[-1]], len(asked)) for given, asked in get_rolling_token_windows(ids, 3, 4, 1)]
        assert [(window.ids, window.scored) for window in windows_of([3], ids, 4)] == theirs
    assert list(windows_of([1, 2, 3, 4], [5, 6], 4)) == [Window([2, 3, 4, 5, 6], 2)]
    assert list(windows_of([1], [2, 3, 4, 5, 6], 4)) == [Window([1, 2, 3, 4, 5], 4), Window([2, 3, 4, 5, 6], 1)]
