"""Writes the reference pages from the code: `python docs/reference.py` writes settings.md and metrics.md.

Each text stands beside the field, key or scalar that it describes.
"""

import re
import sys
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent
CONF = DOCS.parent / "conf"
sys.path.insert(0, str(DOCS.parent))

from data_prep import app, clean, corpus, tokenizer  # noqa: E402
from data_prep.describe import Setting, describe, type_name  # noqa: E402
from data_prep.formats import __main__ as formats  # noqa: E402
from launch.cluster import ClusterConfig  # noqa: E402
from launch.corpus import TokenizeJobConfig  # noqa: E402
from launch.hardware import HARDWARE  # noqa: E402
from launch.restart import RestartConfig  # noqa: E402
from launch.training import LaunchConfig  # noqa: E402
from pretrain import publish  # noqa: E402
from pretrain.commands import checkpoint, coordinate_check, data, hf, profile, sweep_report, tie_report  # noqa: E402
from pretrain.compose import PARTS  # noqa: E402
from pretrain.config.engine import ENGINES  # noqa: E402
from pretrain.config.evaluation import EvaluateConfig  # noqa: E402
from pretrain.config.generation import GenerateConfig  # noqa: E402
from pretrain.config.job import JobConfig  # noqa: E402
from pretrain.config.optim import OPTIMIZERS  # noqa: E402
from pretrain.families import FAMILIES  # noqa: E402
from pretrain.lens.command import LensConfig  # noqa: E402
from pretrain.monitor import scalars  # noqa: E402

COMMAND = "python docs/reference.py"
WRITTEN = f"<!-- Written by `{COMMAND}`: change the texts in the code, then run it. -->"
ALTERNATIVES = {"engine": ENGINES, "optim": OPTIMIZERS, "model": {name: f.config for name, f in FAMILIES.items()}}

SETTINGS = """# Settings

Every key of every command, with its type, its default and its meaning. A key is given as `key=value`; a text with
spaces or commas needs quotes of the shell. `null` means that the key is not set. `--help` lists all keys with
the values as chosen, and `--help KEY` shows one: `python launch/local.py --help optim.lr`. With `resume=RUN`, or
`run.dir=RUN` of a run that exists, these are the values of that run, changed by the command line.

"""
METRICS = """# Metrics

Every scalar that a run writes: `key` in `RUN/metrics.jsonl`, one JSON object per logged step, and its tag in
TensorBoard (`tensorboard --logdir runs`). `/CORPUS`, `/BIN` and `/LAYER` in a key stand for the name of a corpus, a
frequency bin or a layer; such a scalar is written once per name.

"""


def settings_page() -> str:
    """The text of settings.md."""
    parts = [SETTINGS, WRITTEN, "\n\n## Training\n\n"]
    parts.append(
        f"`launch/local.py`, `launch/slurm.py`, `launch/plan.py`, the import of a model.{_chosen('recipe', '+')}\n\n"
    )
    job, values = describe(JobConfig), yaml.safe_load((CONF / "train.yaml").read_text())
    top = {key: setting._replace(default=values[key]) for key, setting in job.items() if key not in PARTS}
    parts.append(table(top))
    for group, kind in PARTS.items():
        parts.append(f"\n### {group}\n\n{job[group].text.capitalize()}.{_chosen(group)}\n")
        for name, config in ALTERNATIVES.get(group, {"": kind}).items():
            title = f"Family `{name}`" if group == "model" else f"`{group}={name}`"
            parts += [f"\n{title}:\n" if name else "", "\n", table(_nested(group, config))]
    for title, intro, settings in _commands():
        parts.append(f"\n## {title}\n\n{intro}\n\n{table(settings)}")
    return "".join(parts)


def _commands() -> list[tuple[str, str, dict[str, Setting]]]:
    launch = {key: setting for key, setting in describe(LaunchConfig).items() if key not in ("cluster", "restart")}
    restart = _nested("restart", RestartConfig)
    local, slurm, plan = (_commented(CONF / f"{name}.yaml") for name in ("local", "slurm", "plan"))
    job = describe(TokenizeJobConfig)
    corpora = {config.kind: config for config in corpus.CorpusConfig.__subclasses__()}
    tokenizers = {config.kind: config for config in tokenizer.TokenizerConfig.__subclasses__()}
    tokenize = {key: setting for key, setting in describe(app.TokenizeConfig).items() if not is_dataclass(setting.type)}
    gpus = ", ".join(f"`{name}`" for name, hardware in HARDWARE.items() if hardware.device == "cuda")
    return [
        ("On this machine", "`launch/local.py`, besides the settings of a training.", local | restart),
        ("On Slurm", "`launch/slurm.py`, besides the settings of a training.", slurm | launch | restart),
        (
            "A cluster",
            f"For `launch/slurm.py` and `launch/plan.py`.{_chosen('cluster', '+')} `cluster.gpu` is one of {gpus}.",
            _nested("cluster", ClusterConfig),
        ),
        ("The plan", "`launch/plan.py`, besides the settings of a training and a cluster.", plan),
        (
            "Tokenising",
            f"`data_prep/tokenize.py`.{_chosen('corpus', more=corpora)}{_chosen('tokenizer', more=tokenizers)}",
            tokenize | _nested("clean", clean.CleanConfig),
        ),
        *(
            (f"Tokenising: corpus={name}", _first(config), _nested("corpus", config))
            for name, config in corpora.items()
            if describe(config)
        ),
        *(
            (f"Tokenising: tokenizer={name}", _first(config), _nested("tokenizer", config))
            for name, config in tokenizers.items()
        ),
        (
            "Tokenising on Slurm",
            "`launch/slurm.py --config-name tokenize`, besides the settings of tokenising and of a cluster.",
            {key: job[key] for key in ("dry_run", "tail")},
        ),
        ("Token files of other programs", "`python -m data_prep.formats import` and `export`.", _texts(formats.KEYS)),
        ("Weights & Biases, MLflow", "`python -m pretrain.publish`.", _texts(publish.KEYS)),
        ("Sampling", "`python -m pretrain.generate`.", describe(GenerateConfig)),
        ("Benchmarks", "`python -m pretrain.evaluate`.", describe(EvaluateConfig)),
        ("The lens", "`python -m pretrain.lens`.", describe(LensConfig)),
        ("Checkpoints", "`python -m pretrain.checkpoint list`, `verify` and `prune`.", _texts(checkpoint.KEYS)),
        ("The data of a step", "`python -m pretrain.data show`.", _texts(data.KEYS)),
        ("The profile", "`python -m pretrain.profile`.", _texts(profile.KEYS)),
        ("The sweep report", "`python -m pretrain.sweep_report`.", _texts(sweep_report.KEYS)),
        ("The coordinate check", "`python -m pretrain.coordinate_check`.", _texts(coordinate_check.KEYS)),
        ("The tie report", "`python -m pretrain.tie_report`.", _texts(tie_report.KEYS)),
        ("Hugging Face: import", "`python -m pretrain.interop.hf import`.", _texts(hf.IMPORT_KEYS)),
        ("Hugging Face: export", "`python -m pretrain.interop.hf export`.", _texts(hf.EXPORT_KEYS)),
        ("Hugging Face: push", "`python -m pretrain.interop.hf push`.", _texts(hf.PUSH_KEYS)),
    ]


def metrics_page() -> str:
    """The text of metrics.md."""
    parts, groups = [METRICS, WRITTEN, "\n"], dict.fromkeys(scalar.tag.partition("/")[0] for scalar in scalars.SCALARS)
    for group in sorted(groups):
        title = group.lstrip("0123456789 ").capitalize()
        parts.append(f"\n## {title}\n\n| key and tag | unit | meaning | healthy |\n|---|---|---|---|\n")
        for scalar in scalars.SCALARS:
            if scalar.tag.startswith(f"{group}/"):
                keys = "<br>".join(f"`{scalar.key}{form}`" for form in scalar.forms)
                parts.append(_row(f"{keys}<br>{scalar.tag}", scalar.unit, scalar.meaning, scalar.healthy))
    return "".join(parts)


def table(settings: dict[str, Setting]) -> str:
    """The settings as a table. Raises ValueError if one has no text."""
    if bare := [key for key, setting in settings.items() if not setting.text]:
        raise ValueError(f"{', '.join(bare)} must have a text: write a comment beside each")
    rows = (_row(f"`{key}`", type_name(s.type), _default(s.default), s.text) for key, s in settings.items())
    return "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _nested(prefix: str, kind: Any) -> dict[str, Setting]:
    """Keys of a dataclass and of those within it, in full."""
    found: dict[str, Setting] = {}
    for key, setting in describe(kind).items():
        inner = is_dataclass(setting.type)
        found |= _nested(f"{prefix}.{key}", setting.type) if inner else {f"{prefix}.{key}": setting}
    return found


def _texts(keys: dict[str, str]) -> dict[str, Setting]:
    """Settings of a command whose texts say what their defaults are."""
    return {key: Setting(object, "", text) for key, text in keys.items()}


def _commented(path: Path) -> dict[str, Setting]:
    """The keys at the top of a file in conf/ that has a comment beside each."""
    found = re.findall(r"^(\w+): (\w+)  # (.+)$", path.read_text(), re.MULTILINE)
    types: dict[str, Any] = {"null": str | None, "false": bool}
    return {key: Setting(types.get(value, int), value, text) for key, value, text in found}


def _chosen(group: str, sign: str = "", more: Any = ()) -> str:
    """The files of conf/ that a group may be, in words."""
    files = (path.stem for path in sorted((CONF / group).glob("*.yaml")) if group != "vocab")
    names = list(dict.fromkeys([*more, *(ENGINES if group == "engine" else ()), *files]))
    return f" `{sign}{group}=` is one of {', '.join(f'`{name}`' for name in names)}." if names else ""


def _first(kind: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(str(kind.__doc__).split("\n\n")[0].split())


def _default(value: Any) -> str:
    if value is MISSING:
        return "must be given"
    if isinstance(value, bool) or value is None:
        value = str(value).lower().replace("none", "null")
    elif isinstance(value, list | dict):
        value = ",".join(map(str, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    return f"`{value}`" if value != "" else ""


def _row(*cells: str) -> str:
    safe = (cell.replace("|", "\\|").replace("*", "\\*").replace("<\\|", "&lt;\\|") for cell in cells)
    return f"| {' | '.join(safe)} |\n"


PAGES = {"settings.md": settings_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(DOCS / name)
