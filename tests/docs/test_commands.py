"""Every command of the documentation runs, as it is written there, but small: on what it reads, made for it.

Commands that are the same when they are small, apart from names of folders, run once, in the first block that has one.
Later commands of another block then read what `provide` puts there.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from launch import console
from tests.docs.pages import ROOT, Block, blocks, commands, pages
from tests.docs.small import absolute_inside, program, provide, script, small
from tests.warm import Command, torchrun

NOT_RUN = {  # the beginnings of commands that no test runs, and why; each is in the documentation
    "make demo": "trains for minutes",
    "make setup": "downloads",
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "python3 -m venv": "needs no test of ours",
    "pip install": "downloads; tests/test_wheel.py installs the wheel",
    "pip wheel": "downloads; tests/test_wheel.py builds the wheel",
    "uv ": "downloads",
    "conda ": "downloads",
    "docker ": "downloads",
    "tensorboard --logdir": "serves until it is stopped; tests/pretrain/monitor looks at its page",
    "python -m pretrain.publish": "needs a server; tests/pretrain/test_publish.py sends to folders",
    "python -m pretrain.interop.hf push": "needs a hub; tests/pretrain/interop/test_hub.py has a small one",
    "torchrun --nproc-per-node 2 examples/": "tests/examples runs each",
    "python -m tests.data_prep.kills": "takes minutes; tests/data_prep kills, too",
    "python tests/reliability.py": "takes an hour; tests/test_reliability.py runs a smaller one",
    "python -m tests.pretrain.lens.memory": "takes minutes; tests/pretrain/lens runs the first",
    "python -m tests.pretrain.interop.memory": "takes minutes",
    "python -m tests.benchmarks.averaging": "trains for minutes",
}
FOLDERS = ("run", "run.dir", "data.path", "out")  # keys whose values only name a folder
BLOCKS = [block for page in pages() for block in blocks(page) if block.language == "sh"]


def reason(words: list[str]) -> str | None:
    """The beginning in NOT_RUN that the command has."""
    return next((start for start in NOT_RUN if " ".join(words).startswith(start)), None)


def runnable() -> list[Block]:
    return [block for block in BLOCKS if not all(map(reason, commands(block)))]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in several forms, its token files, a tied and an untied run of a tiny GPT-2, and its export."""
    folder = tmp_path_factory.mktemp("template")
    lines = [f"document {i}: " + " ".join(f"{i} times {j} is {i * j}." for j in range(40)) for i in range(80)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "a.parquet")
    (folder / "texts").mkdir()
    for i, line in enumerate(lines):
        (folder / "texts" / f"{i}.txt").write_text(line.upper())
    data = "data_prep/tokenize.py corpus=files corpus.paths=a.jsonl tokenizer=bpe val_fraction=0.2 out=data"
    same = f"tokenizer=file tokenizer.path={folder}/data/tokenizer"
    train = f"launch/local.py model=gpt2 data.path={folder}/data checkpoint.every=1 monitor.embedding_every=1 run.dir="
    for arguments in (
        data,
        f"data_prep/tokenize.py corpus=files corpus.paths=texts {same} out=other",
        f"{train}run",
        f"{train}untied vocab.tie=untied",
        "-m pretrain.interop.hf export run=run out=hf",
        "-m data_prep.formats export to=llmc in=data out=llmc",
        "-m data_prep.formats export to=datatrove in=data out=datatrove",
    ):
        execute(["python", *arguments.split()], folder, folder, {})
    return folder


@pytest.fixture(scope="module")
def ran() -> dict[tuple[str, ...], str]:
    """The output of the small commands that have run; these are without names of folders."""
    return {}


def execute(words: list[str], folder: Path, template: Path, ran: dict[tuple[str, ...], str]) -> str:
    """Runs a command in `folder`, unless the same has run, and returns its output; it must exit with 0."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0].startswith("rowshard-"):
        own = re.search("as `(.+?)` does", getattr(console, words[0].removeprefix("rowshard-")).__doc__)
        words = [*own[1].split(), *words[1:]]
    words = [absolute_inside(word, folder) for word in words]
    world = 0
    if words[0] == "torchrun":
        world = int(words[words.index("--nproc-per-node") + 1])
        words = ["python", *words[words.index("--nproc-per-node") + 2 :]]
    assert words[0] == "python", f"no way to run {words}: teach it, or give a reason in NOT_RUN"
    part = next((word for word in words if word.startswith("part=") and word != "part=prepare"), None)
    if part and not (folder / _value(words, "out")).exists():  # the page prepares in a block of its own
        execute([word if word != part else "part=prepare" for word in words], folder, template, {})
    words = small(words, template)
    same = (str(world), *(word.partition("=")[0] if word.partition("=")[0] in FOLDERS else word for word in words))
    if same in ran:
        return ran[same]
    provide(words, folder, template)
    if world:
        done = torchrun(world, *script(words[1:]), cwd=folder)
    else:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with Command(script(words), cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams) as process:
            out, error = process.communicate(timeout=120)
        done = subprocess.CompletedProcess(words, process.returncode, out, error)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    ran[same] = done.stdout
    return done.stdout


def _value(words: list[str], key: str) -> str:
    return next(word for word in words if word.startswith(f"{key}=")).partition("=")[2]


@pytest.mark.parametrize("block", runnable(), ids=lambda block: f"{block.page}:{block.line}")
def test_runs(block: Block, template: Path, ran: dict[tuple[str, ...], str], tmp_path: Path) -> None:
    for words in commands(block):
        if reason(words) is None:
            execute(words, tmp_path, template, ran)


def test_reasons_are_of_commands() -> None:
    used = {reason(words) for block in BLOCKS for words in commands(block)}
    assert used - {None} == NOT_RUN.keys()


def test_programs_exist() -> None:
    """Checks commands that are not run as well."""
    targets = (ROOT / "Makefile").read_text()
    for words in (words for block in BLOCKS for words in commands(block)):
        if words[0] == "make":
            assert all(re.search(rf"^{word}( [\w-]+)*:", targets, re.MULTILINE) for word in words[1:]), words
        elif words[0] == "python":
            name = program(words).removeprefix("-m ")
            path = ROOT / name.replace(".", "/") if "-m" in words[1] else ROOT / name
            there = (path, path.with_suffix(".py"), path / "__main__.py")
            assert any(file.is_file() for file in there), words


PYTHON = [block for page in pages() for block in blocks(page) if block.language == "python"]
ELSEWHERE = ("docs/how-it-works.md", "docs/library.md")  # run by tests/pretrain/vocab/test_examples.py
TOKENS = 'b"(path", b"\\x8d", b"splay"'  # of the demo's tokenizer


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks_run(block: Block, template: Path, tmp_path: Path) -> None:
    text = block.text.replace(TOKENS, 'b"1", b"\\x8d"')
    compile(text, block.page, "exec")
    if block.page in ELSEWHERE:
        return
    for source, name in (("hf", "exported/a"), ("run", "runs/demo"), ("data", "data/stdlib")):
        shutil.copytree(template / source, tmp_path / name)
    (tmp_path / "block.py").write_text(text)
    assert execute(["python", "block.py"], tmp_path, template, {}), "a block prints what it computes"
