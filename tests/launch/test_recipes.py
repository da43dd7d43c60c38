"""conf/recipe/*.yaml: every value has a source, each recipe fits its cluster and trains, docs/recipes.md agrees."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import local, plan
from pretrain.compose import load_config
from pretrain.config.job import JobConfig
from tests.benchmarks.plan import CONF, configured
from tests.in_process import in_process
from tests.launch.commands import refused, run, scalars
from tests.pretrain.tiny import write_tokens

RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
KEYS = {  # of every recipe
    *(f"train.{key}" for key in ("steps", "global_batch", "micro_batch", "seq_len", "precision")),
    *(f"optim.{key}" for key in ("lr", "schedule", "warmup_steps", "min_lr_ratio", "beta1", "beta2", "eps")),
    *("optim.weight_decay", "optim.clip", "eval.every", "eval.max_windows", "checkpoint.every"),
}
TINY = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.seq_len=32 train.global_batch=4"
TINY += " train.micro_batch=2 train.precision=fp32 log.every=1 vocab.size=307"
TINY_LLAMA = f"{TINY} model.kv_heads=1 model.inner=64"


def lines_of(recipe: str) -> list[str]:
    return (CONF / "recipe" / f"{recipe}.yaml").read_text().splitlines()


def values_of(recipe: str) -> dict[str, Any]:
    """Reads what the file sets, by full keys."""
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            elif key != "defaults":
                found[f"{prefix}{key}"] = value

    walk("", yaml.safe_load("\n".join(lines_of(recipe))))
    return found


def value(config: JobConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def cluster_of(recipe: str) -> str:
    found = re.search(r"[Pp]lanned for \+cluster=(\w+)\.", "\n".join(lines_of(recipe)))
    assert found is not None
    return found[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_names_a_source(recipe):
    """A tag in brackets beside it, whose address the head of the file has; [ours] says that there is none."""
    lines = lines_of(recipe)
    known = {found[1]: found[2] for line in lines if (found := re.match(r"# \[([^\]]+)\] +(.+)", line))}
    assert known.pop("ours")
    assert known and all("https://" in address for address in known.values())
    begin = next(i for i, line in enumerate(lines) if line.startswith("train:"))
    for line in lines[begin:]:
        if re.match(r" +\w+: \S", line):
            tag = re.search(r"  # \[([^\]]+)\]", line)
            assert tag is not None and tag[1] in {"ours", *known}, line


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_to_what_it_says(recipe):
    given = values_of(recipe)
    assert given.keys() >= KEYS
    config = configured(f"+recipe={recipe}")
    assert {key: value(config, key) for key in given} == given
    config.optim.check_steps(config.train.steps)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stated_tokens_are_steps_times_batch_times_length(recipe):
    config = configured(f"+recipe={recipe}")
    stated = re.search(r"× ([\d,]+) × ([\d,]+) = ([\d,]+) tokens", "\n".join(lines_of(recipe)))
    assert stated is not None
    batch, length, tokens = (int(number.replace(",", "")) for number in stated.groups())
    assert (batch, length) == (config.train.global_batch, config.seq_len)
    assert tokens == config.train.steps * batch * length


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_fits_the_cluster_that_it_names(recipe):
    rows = 50_257 if recipe.startswith("gpt2") else 128_256
    planned = in_process(plan.main, f"+cluster={cluster_of(recipe)}", f"recipe={recipe}", f"vocab.size={rows}")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "does not fit" not in planned.stdout and f"+cluster={cluster_of(recipe)}" in PAGE.read_text()
    tokens, peak = re.findall(r"([\d,]+)  +([\d,]+)   <", planned.stdout)[0]
    begins = f"| `{recipe}` | `{cluster_of(recipe)}` |"
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(begins))
    assert row.endswith(f"| {int(peak.replace(',', '')) / 1024:.1f} | {tokens} |")


@pytest.mark.parametrize("recipe", RECIPES)
def test_page_has_every_value(recipe):
    """A row for each key in the recipe's section: | `key` | value | source |."""
    section = PAGE.read_text().split(f"\n## {recipe}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", section, re.MULTILINE))
    assert rows.pop("model") == next(line.split()[-1] for line in lines_of(recipe) if "override /model" in line)
    assert {key: yaml.safe_load(text) for key, text in rows.items()} == values_of(recipe)


def test_command_line_wins():
    config = configured("+recipe=gpt2_124m", "model=gpt2_large", "optim.lr=1e-3", "train.steps=7000")
    assert (config.model.layers, config.optim.lr, config.train.steps) == (36, 1e-3, 7000)
    assert config.optim.warmup_steps == 700
    assert configured("optim.lr=1e-3", "+recipe=gpt2_124m").optim.lr == 1e-3


def test_recipe_of_ones_own_builds_on_another(tmp_path):
    (tmp_path / "recipe").mkdir()
    (example,) = re.findall(r"```yaml\n(.+?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "recipe" / "own.yaml").write_text(example)
    config = configured(f"hydra.searchpath=[file://{tmp_path}]", "+recipe=own")
    assert (config.train.steps, config.train.global_batch, config.optim.lr) == (5000, 512, 6e-4)


def test_recipe_of_another_name_is_refused_with_the_list():
    for plus in ("", "+"):
        error = refused(f"{plus}recipe=gpt2_124 data.path=x run.dir=y")
        assert f"recipe=gpt2_124 must be one of {', '.join(RECIPES)}; did you mean gpt2_124m?" in error


def test_help_lists_recipes():
    said = in_process(local.main, "--help").stdout
    assert f"recipe: {', '.join(RECIPES)}\n" in said


@pytest.mark.parametrize("recipe", RECIPES)
def test_shrunk_recipe_trains_and_resumes_as_frozen(recipe, tmp_path):
    """Two steps of the recipe's own schedule on two ranks; of the first two, one more by each of the ways to resume."""
    folder, data = tmp_path / "run", write_tokens(tmp_path / "tokens")
    tiny = TINY if recipe.startswith("gpt2") else TINY_LLAMA
    begin = f"launch/local.py nproc=2 +recipe={recipe} data.path={data} run.dir={folder} {tiny}"
    ways = {RECIPES[0]: f"launch/local.py nproc=2 resume={folder}", RECIPES[1]: begin}
    steps = 3 if recipe in ways else 2
    for command in (f"{begin} train.stop_after=2", *([f"{ways[recipe]} train.stop_after=3"] if recipe in ways else [])):
        done = run(command)
        assert done.returncode == 0, done.stderr
    optim = configured(f"+recipe={recipe}").optim
    assert optim.warmup_steps is not None
    assert [line["lr"] for line in scalars(folder)] == pytest.approx(
        [optim.lr * step / optim.warmup_steps for step in range(1, steps + 1)]
    )
    assert load_config(folder / "config.yaml").optim == optim
    error = refused(f"resume={folder} +recipe={recipe}")
    assert f"recipe={recipe} must be left out with resume={folder}" in error
