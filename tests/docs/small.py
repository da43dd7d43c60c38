"""Makes a command of the documentation small: its words, with other values for what is large, and settings added."""

import re
import shutil
from pathlib import Path

from data_prep.command import compose_settings
from pretrain.compose import register_groups
from tests.docs.pages import ROOT

BODY = {"model.layers": "1", "model.width": "32", "model.heads": "2", "model.context": "256"}
LLAMA = BODY | {"model.kv_heads": "1", "model.inner": "32"}
BATCH = {"train.seq_len": "16", "train.global_batch": "2", "train.micro_batch": "1"}
STEPS = {
    "train.steps": "2",
    "train.precision": "auto",
    "optim.warmup_steps": "1",
    "log.every": "1",
    "eval.max_windows": "2",
}
BPE = {"tokenizer": "bpe", "tokenizer.vocab_size": "300"}  # the others need a download, or minutes
INSTEAD = {  # only if the command has the key
    "launch/local.py": {
        "vocab.parallel": "2",
        "vocab.untie_at": "1",
        "train.stop_after": "1",
        "checkpoint.every": "1",
        "monitor.embedding_every": "1",
        "monitor.lens_every": "1",
        "engine.compile": "false",
        "profile.steps": "[1,2]",
    },
    "-m pretrain.generate": {"step": "2", "tokens": "8"},
    "-m pretrain.evaluate": {"step": "2", "limit": "2"},
    "-m pretrain.lens": {"step": "2"},
    "-m pretrain.checkpoint": {"step": "2", "steps": "1..2"},
    "-m pretrain.interop.hf": {"step": "2"},
    "-m pretrain.data": {"rank": "1", "world": "2"},
}
TOKENIZE = ("data_prep/tokenize.py", "-m data_prep.tokenize")


def program(words: list[str]) -> str:
    """`launch/local.py` of `python launch/local.py key=value`, `-m pretrain.lens` of `python -m pretrain.lens`."""
    return " ".join(words[1:3] if words[1] == "-m" else words[1:2])


def small(words: list[str], template: Path) -> list[str]:
    """`python`, the program and its arguments, as in the documentation; returned: the same, small."""
    name = program(words)
    head, arguments = words[: 1 + len(name.split())], words[1 + len(name.split()) :]
    typed = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in arguments)}
    changed = {key: value for key, value in INSTEAD.get(name, {}).items() if key in typed}
    if name in TOKENIZE or "tokenize" in arguments:
        changed |= BPE if typed.get("tokenizer", "bpe") not in ("file",) and "out" in typed else {}
        changed |= {"corpus": "files", "corpus.paths": "[texts]"} if typed.get("corpus") == "stdlib" else {}
        changed |= {"dry_run": "true"} if name == "launch/slurm.py" else {"workers": "1"}
    elif name in ("launch/local.py", "launch/slurm.py", "launch/plan.py"):
        changed |= _training(name, arguments, typed)
    elif name == "-m pretrain.coordinate_check":
        changed |= BODY | BATCH | {"widths": "32,64", "steps": "2"}
    elif name == "-m data_prep.formats" and "tokenizer" in typed:
        changed["tokenizer"] = str(template / "data" / "tokenizer")
    kept = [word for word in arguments if word.lstrip("+").partition("=")[0] not in changed]
    return [*head, *kept, *(f"{key}={value}" for key, value in changed.items())]


def _training(name: str, arguments: list[str], typed: dict[str, str]) -> dict[str, str]:
    local = name == "launch/local.py"
    if "resume" in typed or not ({"data.path", "vocab.size"} & set(typed) or "data.corpora" in " ".join(typed)):
        changed = {"train.steps": "5"} if "train.steps" in typed else {}
        changed |= {} if local else {"train.global_batch": "64"}  # the template's batch is for two ranks
    else:
        register_groups()
        chosen = [word for word in arguments if re.match(r"\+?(model|recipe)=", word)]
        changed = dict(BODY if compose_settings("train", chosen).model.family == "gpt2" else LLAMA)
        changed |= BATCH | STEPS if local else {"train.seq_len": "16"}
        changed |= {"guard.margin": "1"} if typed.get("guard.level") == "rollback" else {}
        changed |= {"vocab.size": "300"} if {"init_from", "vocab.size"} <= set(typed) else {}
    return changed | ({"nproc": "2"} if local else {"dry_run": "true"} if name == "launch/slurm.py" else {})


def provide(words: list[str], folder: Path, template: Path) -> None:
    """Puts what a command reads, and what is not there yet, into `folder`: corpora, data, runs, models."""
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key in ("data.path", "verify", "stats"):
            _copy(template / "data", folder / value)
        elif key.startswith("data.corpora."):  # two must not hold the same tokens
            first = key == next(word for word in words if word.startswith("data.corpora.")).partition("=")[0]
            _copy(template / ("data" if first else "other"), folder / value)
        elif key in ("run", "resume", "tied", "untied") and "import" not in words:
            _copy(template / ("untied" if key == "untied" else "run"), folder / value)
        elif key == "runs" and not (folder / value).exists():
            _copy(template / "run", folder / value / "a")
        elif key in ("hf", "tokenizer.path") or value.startswith("hf:"):
            _copy(template / "hf", folder / value.removeprefix("hf:"))
        elif key == "corpus.paths":
            for item in value.strip("[]").split(","):
                _corpus(folder / item, template)
        elif key == "in" and "import" in words:
            layout = next(word for word in words if word.startswith("from="))[5:]
            _copy(template / layout / ("train" if layout == "datatrove" else ""), folder / value.partition("*")[0])
        elif key == "in":
            _copy(template / "data", folder / value)
        elif key == "tasks_path":
            _copy(ROOT / "tests/pretrain/evaluate/tasks", folder / value)
        elif key == "file":
            (folder / value).write_text("One line of text.\n" * 20)
        elif key in ("out", "plot"):
            (folder / value).parent.mkdir(parents=True, exist_ok=True)


def _corpus(path: Path, template: Path) -> None:
    path = path.parent / "part-0.jsonl" if "*" in path.name else path
    if path.exists():
        return
    if not path.suffix:
        _copy(template / "texts", path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(template / f"a{path.suffix}", path)


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        shutil.copytree(source, target)


def absolute_inside(word: str, folder: Path) -> str:
    """The word, with a path that begins at the root of the file system moved into `folder`."""
    return word if str(folder) in word else re.sub(r"(^|[=\[,:])/(?=\w)", rf"\1{folder}/", word)


def script(words: list[str]) -> list[str]:
    """The same with the path of a program of this project in full."""
    return [str(ROOT / word) if (ROOT / word).is_file() and word.endswith(".py") else word for word in words]
