"""Examples in the docstrings of `pretrain.vocab`, in docs/library.md and docs/how-it-works.md, run as they stand."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import pretrain.vocab

DOCS = Path(__file__).resolve().parents[3] / "docs"
#: without triton.py: it has no examples, and test_kernels.py must be the first to import it
MODULES = [
    found.name
    for found in pkgutil.walk_packages(pretrain.vocab.__path__, "pretrain.vocab.")
    if not found.name.endswith(".triton")
]
#: public methods without an example of their own: torch calls them, or the example of the class shows them
SHOWN_ELSEWHERE = {"VocabParallelEmbedding.forward", "VocabParallelEmbedding.match"}


def public_objects() -> dict[str, object]:
    """Functions, classes, and the classes' public methods that a library user calls."""
    found: dict[str, object] = {}
    for name in pretrain.vocab.__all__:
        item = getattr(pretrain.vocab, name)
        found[name] = item
        if inspect.isclass(item) and item.__module__.startswith("pretrain.vocab"):
            methods = {key: value for key, value in vars(item).items() if not key.startswith("_")}
            found |= {f"{name}.{key}": getattr(item, key) for key, value in methods.items() if _callable(value)}
    return found


def _callable(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod)


@pytest.mark.parametrize("name", sorted(public_objects().keys() - SHOWN_ELSEWHERE))
def test_every_public_name_has_an_example(name):
    assert ">>>" in (inspect.getdoc(public_objects()[name]) or ""), f"{name} has no example in its docstring"


@pytest.mark.parametrize("name", [*MODULES, "pretrain.config.vocab"])
def test_examples_of_docstrings_print_what_they_say(name):
    with torch.random.fork_rng():
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_derivation_matches_autograd_and_the_library():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "how-it-works.md").read_text(encoding="utf-8"), re.DOTALL)
    assert any("torch.testing.assert_close(torch.cat(dW), W.grad)" in block for block in blocks)
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, "how-it-works.md", "exec"), {})


@pytest.mark.parametrize("page,outputs", [("how-it-works.md", 2), ("library.md", 2)])
def test_documented_output_is_what_the_code_prints(page, outputs, capsys):
    text = (DOCS / page).read_text(encoding="utf-8")
    pairs = re.findall(r"```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(pairs) == outputs
    for code, output in pairs:
        exec(compile(code, page, "exec"), {})
        assert capsys.readouterr().out == output
