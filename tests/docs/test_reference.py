"""The reference pages are what the code says, complete, and true of a run."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from data_prep.describe import Setting
from pretrain.monitor.rows import BINS
from pretrain.monitor.scalars import BIN, BY_KEY, CORPUS, LAYER, PART, SCALARS
from pretrain.timeline import PARTS
from tests.docs.pages import DOCS
from tests.launch.commands import run

NOT_HERE = {  # forms of keys that the run below does not write
    ("mfu", ""),  # needs a GPU
    ("epochs", ""),  # only with one corpus
    ("task", "/TASK"),  # only with eval.tasks: tests/pretrain/evaluate
    *((f"guard_{key}", "") for key in ("spikes", "left_out", "rollbacks")),  # only after a spike: hooks/test_guard.py
}
FORMS = {  # what stands for the names in a key, as regular expressions
    CORPUS: "/(web|code)",
    BIN: f"/({'|'.join(BINS)}|uncounted)",
    PART: f"/({'|'.join(PARTS)})",
    LAYER: r"/(input|block_\d+|output)",
    "/topNpct": r"/top\d+pct",
}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "metrics.md"])
def test_page_is_current(reference: ModuleType, name: str) -> None:
    assert (DOCS / name).read_text() == reference.PAGES[name](), f"run {reference.COMMAND}"


def test_a_key_without_a_text_is_refused(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"train\.new must have a text"):
        reference.table({"train.new": Setting(int, 0, "")})


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two corpora and all monitors, whose matrix is split in two on the way."""
    folder = tmp_path_factory.mktemp("everything")
    for name, sign in (("web", "·"), ("code", "+")):
        lines = [f"document {i}: " + " ".join(f"{i} {sign} {j}." for j in range(60)) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenize = f"data_prep/tokenize.py corpus=files corpus.paths={folder}/web.jsonl workers=1 val_fraction=0.3"
    for arguments in (
        f"{tokenize} tokenizer=bpe tokenizer.vocab_size=300 out={folder}/web",
        f"{tokenize.replace('web', 'code')} tokenizer=file tokenizer.path={folder}/web/tokenizer out={folder}/code",
        f"launch/local.py nproc=2 run.dir={folder}/run data.corpora.web={folder}/web data.corpora.code={folder}/code"
        " log.tensorboard=false train.steps=4 log.every=1 eval.every=2 vocab.parallel=2 vocab.untie_at=2"
        " monitor.embedding_every=1 monitor.lens_every=2 monitor.lens_windows=2 ema.decay=0.9"
        " model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=4 train.micro_batch=2",
    ):
        done = run(arguments)
        assert done.returncode == 0, done.stderr
    return folder / "run"


def test_each_scalar_has_a_row_and_each_row_a_scalar(everything: Path) -> None:
    lines = [json.loads(line) for line in (everything / "metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line} - {"step", "rows"}
    unused = {(scalar.key, form) for scalar in SCALARS for form in scalar.forms}
    for key in keys:
        name, slash, rest = key.partition("/")
        assert name in BY_KEY, f"{key} is written, and not in pretrain/monitor/scalars.py"
        used = [form for form in BY_KEY[name].forms if re.fullmatch(_pattern(form), slash + rest)]
        assert used, f"{key} has none of the forms {BY_KEY[name].forms}"
        unused -= {(name, form) for form in used}
    assert unused == NOT_HERE, "these are in pretrain/monitor/scalars.py, and nothing writes them"


def _pattern(form: str) -> str:
    for name, pattern in FORMS.items():
        form = form.replace(name, pattern)
    return form
