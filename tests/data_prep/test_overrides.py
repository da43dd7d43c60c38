"""Tests that key=value reaches the settings as typed, although Hydra's grammar reads some characters differently."""

import shlex
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig

from data_prep import app
from data_prep.command import compose_settings
from data_prep.overrides import home, in_full, items_of, quoted, readable, shown
from tests.data_prep.commands import tokenize, tokenize_here

app.register()
ODD = ["a=b", "lr=1e-3, ü b", "a,b", "é", "a#b", "a(b", "a&b", "a'b", 'a"b', "1e-3", "007", "true", "[x]", "{y: 1}"]
ODD += ["a: b", "a\\'b", "end\\", "x'", "(a)", "东京", "a;b", "a*?", "$HOME", "%", "@", "a  b", "-x", "=", "nan"]


def composed(*arguments: str) -> DictConfig:
    return compose_settings("tokenize", list(arguments))


@pytest.mark.parametrize("text", ODD)
def test_text_reaches_settings_unchanged(text):
    config = composed(f"out={text}", "corpus=files", f"corpus.paths=['x/{text.replace(chr(39), '')}y']")
    assert config.out == text
    config = composed("tokenizer=file", f"tokenizer.path={text}/tokens")
    assert config.tokenizer.path == f"{text}/tokens"


@pytest.mark.parametrize(
    "typed,paths",
    [
        ("a.jsonl", ["a.jsonl"]),
        ("a=1.jsonl", ["a=1.jsonl"]),
        ("a.jsonl,b é.jsonl", ["a.jsonl", "b é.jsonl"]),
        ("[a.jsonl, b#1.jsonl]", ["a.jsonl", "b#1.jsonl"]),
        ("['a,b.jsonl',\"c\"]", ["a,b.jsonl", "c"]),
        ("/d/[0-9]*.jsonl", ["/d/[0-9]*.jsonl"]),
        ("[/d/{a,b}.jsonl]", ["/d/{a,b}.jsonl"]),
        ("[1e3,2024]", ["1e3", "2024"]),
        ("[]", []),
    ],
)
def test_list_of_paths_may_be_one_path(typed, paths):
    assert list(composed("corpus=files", f"corpus.paths={typed}").corpus.paths) == paths


def test_existing_path_with_a_comma_is_one_path(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.touch()
    assert list(composed("corpus=files", f"corpus.paths={path}").corpus.paths) == [str(path)]


def test_hydra_quotes_and_interpolations_work(monkeypatch):
    monkeypatch.setenv("PLACE", "/a b")
    assert composed('out="runs/lr=1e-3, ü b"').out == "runs/lr=1e-3, ü b"
    assert composed("out=${oc.env:PLACE}/é").out == "/a b/é"
    assert composed("out=null", "workers=2", "verify=x").out is None


def test_home_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = composed(
        "out=~/o", "corpus=files", "corpus.paths=[~/a.jsonl,b~,'~/c,d']", "tokenizer=file", "tokenizer.path=~"
    )
    assert (config.out, config.tokenizer.path) == ("/home/me/o", "/home/me")
    assert list(config.corpus.paths) == ["/home/me/a.jsonl", "b~", "/home/me/c,d"]
    assert home("init_from", "hf:~/gpt2") == "hf:/home/me/gpt2"
    assert in_full("run=~/r") == "run=/home/me/r" and in_full("in=[~/a,~/b]") == "in=[/home/me/a,/home/me/b]"
    assert in_full("prompt=~/x") == "prompt=~/x"
    with pytest.raises(ValueError, match="out=~nobody-here/x: there is no user nobody-here"):
        composed("out=~nobody-here/x")


def test_commas_are_a_sweep_only_with_multirun():
    sweep = ["corpus=files,stdlib", "val_fraction=0.1,0.2", "out=a,b"]
    assert readable(sweep, sweeps=True) == sweep
    assert readable(["out=a,b", "workers=2"], sweeps=False) == ["out='a,b'", "workers=2"]
    assert readable(["cluster=cpu"], sweeps=False) == ["+cluster=cpu"]


@pytest.mark.parametrize("text", ODD)
def test_printed_command_line_can_be_pasted(text):
    line = shown("python", "launch/local.py", f"run.dir={text}", f"out={text}")
    assert shlex.split(line) == ["python", "launch/local.py", f"run.dir={text}", f"out={text}"]
    assert composed(shlex.split(line)[-1]).out == text


FILES = {
    "unknown key": (
        "defaults: [files, _self_]\npats: [a]\n",
        ["mine.yaml:2: unknown key corpus.pats", "corpus.paths?"],
    ),
    "wrong type": ("defaults: [hub, _self_]\nname: [a]\n", ["mine.yaml:2: corpus.name"]),
    "not a list": ("defaults: [files, _self_]\npaths: a.jsonl\n", ["mine.yaml:2: corpus.paths must be a list"]),
    "indentation": ("defaults: [files, _self_]\n paths: [a]\n", ["mine.yaml:2:2: "]),
    "tab": ("defaults: [files, _self_]\npaths:\n\t- a\n", ["mine.yaml:3:1: ", "not with tabs"]),
    "open bracket": ("defaults: [files, _self_]\npaths: [a\n", ["mine.yaml:3:1: "]),
    "twice": ("defaults: [files, _self_]\npaths: [a]\npaths: [b]\n", ["mine.yaml:3:1: found duplicate key paths"]),
    "no defaults": ("paths: [a]\n", ["mine.yaml:1: it must build on one", "defaults: [files, _self_]"]),
    "empty": ("", ["mine.yaml: it must build on one"]),
    "a list": ("- a\n- b\n", ["mine.yaml"]),
    "unknown base": ("defaults: [fils, _self_]\npaths: [a]\n", ["mine.yaml", "fils", "did you mean files?"]),
    "defaults of text": ("defaults: files\npaths: [a]\n", ["mine.yaml", "defaults must be a list"]),
    "null": ("defaults: [files, _self_]\ntext_key: null\n", ["mine.yaml:2: corpus.text_key=null"]),
    "interpolation": ("defaults: [files, _self_]\npaths: ['${nowhere.x}']\n", ["nowhere.x"]),
}


@pytest.fixture
def in_process(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, which is faster; returns its stderr after exit code 2."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["tokenize.py", *arguments])
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith("error: "), said
        return said

    return run


@pytest.mark.parametrize("case", FILES)
def test_mistake_in_a_file_names_file_key_and_value(case, in_process, tmp_path: Path):
    text, parts = FILES[case]
    (tmp_path / "conf" / "corpus").mkdir(parents=True)
    (tmp_path / "conf" / "corpus" / "mine.yaml").write_text(text)
    said = in_process("--config-dir", "conf", "corpus=mine", "out=o")
    for part in parts:
        assert part in said
    assert "mine.yaml" in said or case == "interpolation"
    assert not (tmp_path / "o").exists()


TYPED = {
    "a flag": (["--resume"], ["unrecognized arguments: --resume", "key=value"]),
    "a flag without its value": (["--config-name"], ["--config-name", "expected one argument"]),
    "no value": (["out"], ["'out' must be key=value"]),
    "no key": (["=3"], ["'=3' must be key=value"]),
    "a leaf": (["sample_mib=3"], ["unknown key sample_mib; did you mean tokenizer.sample_mib?"]),
    "near": (["val_fractoin=0.1"], ["did you mean val_fraction?"]),
    "of another option": (["tokenizer=file", "tokenizer.vocab_size=9"], ["tokenizer=bpe has it"]),
    "of another option, without a default": (["corpus.paths=[x]"], ["corpus.paths: corpus=files has it"]),
    "of another command": (["dry_run=true"], ["unknown key dry_run; it is for launch/slurm.py"]),
    "a number for an option": (["tokenizer=1e3"], ["tokenizer=1e3 must be one of bpe,"]),
    "several values": (["val_fraction=0.1,0.2"], ["val_fraction=0.1,0.2 is several values"]),
    "null": (["unit_mib=null"], ["unit_mib=null must be a value"]),
    "missing interpolation": (["out=${nowhere}"], ["nowhere"]),
}


@pytest.mark.parametrize("case", TYPED)
def test_mistake_on_the_command_line_is_named(case, in_process):
    arguments, parts = TYPED[case]
    said = in_process("out=o", *arguments)
    for part in parts:
        assert part in said
    assert "hydra" not in said.lower() and "omegaconf" not in said.lower()


def test_command_takes_an_unquoted_path(tmp_path, spec_folder):
    """Tokenises and verifies a path full of special characters."""
    folder = tmp_path / "a = ü, 'b'"
    folder.mkdir()
    (folder / "x#1.jsonl").write_text('{"text": "one"}\n{"text": "two words"}\n')
    done = tokenize(
        "corpus=files", f"corpus.paths={folder / 'x#1.jsonl'}", "tokenizer=file", f"tokenizer.path={spec_folder}",
        "val_fraction=0", "workers=1", f"out={folder / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "manifest.json").is_file()
    assert tokenize_here(f"verify={folder / 'out'}").returncode == 0


def test_quoted_items_are_split_correctly():
    assert quoted("a\\") == "'a\\\\'" and quoted("a'b") == r"'a\'b'"
    assert items_of("[a, 'b,c']") == ["a", "'b,c'"]


def test_sweeps_over_a_group_without_default_get_a_plus():
    assert readable(["recipe=a,b", "+cluster=c,d", "seed=1,2"], sweeps=True) == [
        "+recipe=a,b",
        "+cluster=c,d",
        "seed=1,2",
    ]


@pytest.mark.parametrize(("override", "times"), [((), 1), (("hydra.mode=RUN",), 2), (("--run",), 2)])
def test_settings_are_composed_twice_only_if_hydras_mode_may_be_set(
    override: tuple[str, ...], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose, calls = Hydra.compose_config, list[RunMode]()

    def counted(self: Hydra, *args: Any, **kwargs: Any) -> DictConfig:
        calls.append(kwargs["run_mode"])
        return compose(self, *args, **kwargs)

    monkeypatch.setattr(Hydra, "compose_config", counted)
    done = tokenize_here(f"verify={tmp_path}", *override)
    assert "has no token files" in done.stderr, done
    assert len(calls) == times and calls[-1] is RunMode.RUN
