"""Settings of the data that name places: URLs, variables, secrets; and the part of the data that a node needs."""

import os
import re

import pytest

from pretrain.config.data import DataConfig
from pretrain.corpora import share_of_node


def test_settings_keep_urls_and_variables():
    config = DataConfig(corpora={"a": "s3://b/c", "d": "e"}, cache="~/f")
    config.resolve()
    assert config.cache == os.path.expanduser("~/f")
    config.cache = "$TMPDIR/f"
    config.resolve()
    assert config.corpora == {"a": "s3://b/c", "d": os.path.abspath("e")}
    assert config.cache == "$TMPDIR/f"
    assert config.reads == [os.path.abspath("e")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "sftp://me:secret@host/a"}, "data.path=sftp://host… must not have a password or a query"),
        ({"corpora": {"b": "https://host/a?sig=secret"}}, "data.corpora.b=https://host… must not have a password or a"),
        ({"path": "a", "cache": "s3://b/c"}, "data.cache=s3://b/c must be a folder of the node, not a URL"),
    ],
)
def test_secrets_in_urls_are_refused(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        DataConfig(**settings)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("local", "group", "world", "share"),
    [(8, 1, 32, 0.25), (8, 4, 32, 0.25), (8, 32, 32, 1.0), (8, 16, 32, 0.5), (6, 4, 24, 10 / 24), (2, 1, 2, 1.0)],
)
def test_node_reads_whole_vocab_groups(local, group, world, share):
    assert share_of_node(local, group, world) == share
    for first in range(0, world - local + 1, local):
        groups = {rank // group for rank in range(first, first + local)}
        assert len(groups) * group / world <= share
