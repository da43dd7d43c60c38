"""Messages at the start about a missing validation split."""

from dataclasses import replace

import pytest

from pretrain.announce import not_validated
from pretrain.checks import check_job
from tests.pretrain.tiny import tiny_config, write_tokens


@pytest.mark.parametrize(
    "every,said", [(4, ["the data has no validation split, so eval.every=4 has no effect"]), (0, [])]
)
def test_missing_validation_split_prints_one_line(tmp_path, every, said):
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run", eval__every=every)
    assert not_validated(config, check_job(config, 1, "cpu")) == said


def test_corpus_without_validation_split_is_named(tmp_path):
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run")
    data = check_job(config, 1, "cpu")
    (corpus,) = data.corpora.values()
    both = replace(data, corpora={"one": replace(corpus, val=corpus.train), "two": corpus})
    assert not_validated(config, both) == ["no validation split in two: eval.every=250 evaluates the other corpora"]
