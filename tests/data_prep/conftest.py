"""Small corpora, and a tokenizer without training."""

from pathlib import Path

import pytest

from tests.browser import browser
from tests.data_prep.commands import small_spec, texts

__all__ = ["browser"]


@pytest.fixture(scope="session")
def spec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_spec().save(folder)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents, one per file: about 300 KB."""
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts(200)):
        (folder / f"{number:04d}.txt").write_text(text, newline="")
    return folder


@pytest.fixture
def command(text_folder: Path, spec_folder: Path) -> list[str]:
    """The arguments that tokenise `text_folder` in a few units, without `out=`."""
    return [
        "corpus=files",
        f"corpus.paths=['{text_folder}']",
        "tokenizer=file",
        f"tokenizer.path={spec_folder}",
        "unit_mib=0.05",
        "workers=2",
    ]
