"""The registry has each scalar once, and its tags stay in the order in which they are to be read."""

import pytest

from pretrain.monitor.scalars import BY_KEY, DETAILS, SCALARS, tag_of


def test_keys_and_tags_are_unique():
    assert len(BY_KEY) == len(SCALARS) == len({scalar.tag for scalar in SCALARS})


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.key)
def test_every_text_is_a_sentence(scalar):
    assert scalar.title and scalar.meaning.endswith(".") and scalar.healthy.endswith(".")
    assert scalar.forms and (not scalar.card or "" in scalar.forms), "a card is of the key alone"


@pytest.mark.parametrize(
    "key,tag",
    [
        ("loss", "1 training/loss/train"),
        ("val_loss/web", f"{DETAILS}/val_loss/web"),
        ("grad_cosine", "3 matrix/grad_cosine"),
        ("grad_cosine/never", f"{DETAILS}/grad_cosine/never"),
        ("embedding_small", f"{DETAILS}/embedding_small"),
        ("my_own/value", "my_own/value"),
    ],
)
def test_a_tag_follows_from_its_key(key, tag):
    assert tag_of(key) == tag


def test_all_monitors_together_make_thirty_cards():
    heat_maps = 3
    assert sum(bool(scalar.card) for scalar in SCALARS) + heat_maps <= 30
