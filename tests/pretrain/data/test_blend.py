"""Blending: the corpus of each sample follows the weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.blend import Blend

WEIGHTS = st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 1e-3)


@settings(deadline=None)
@given(first=WEIGHTS, data=st.data())
def test_counts_match_enumeration(first, data):
    stages = {0: first}
    for begin in sorted(data.draw(st.lists(st.integers(1, 300), max_size=3, unique=True))):
        weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(first), max_size=len(first)))
        stages[begin] = weights
    blend = Blend(stages)
    start = data.draw(st.integers(0, 400))
    stop = data.draw(st.integers(start, 500))
    corpora = blend.corpora(start, stop)
    assert blend.counts(start, stop) == np.bincount(corpora, minlength=len(first)).tolist()
    assert (corpora == np.concatenate([blend.corpora(i, i + 1) for i in range(start, stop)] or [corpora])).all()
    if len(stages) == 1:
        assert all(first[corpus] > 0 for corpus in corpora), "weight 0 must never be chosen"


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 1e-3], [1 / 3, 1 / 3, 1 / 3]])
def test_shares_of_any_range_match_weights(weights):
    blend, shares = Blend({0: weights}), np.array(weights) / sum(weights)
    for start in (0, 12345, 10**15):
        for length in (10, 100, 1000, 10_000):
            counts = np.array(blend.counts(start, start + length))
            assert counts.sum() == length
            assert (abs(counts - shares * length) < 6).all(), "random draws would differ by about √length / 2"


def test_weights_change_at_given_sample():
    blend = Blend({0: [1, 0], 100: [0, 1], 150: [1, 1]})
    corpora = blend.corpora(0, 250)
    assert (corpora[:100] == 0).all() and (corpora[100:150] == 1).all() and 40 <= corpora[150:].sum() <= 60
    assert blend.counts(0, 100) == [100, 0] and blend.counts(90, 160)[0] == 10 + (corpora[150:160] == 0).sum()


def test_far_position_is_found_immediately():
    blend = Blend({0: [0.6, 0.3, 0.1], 10**12: [1, 1, 1]})
    counts = blend.counts(0, 2 * 10**12)  # a loop over the samples would take days
    assert sum(counts) == 2 * 10**12 and abs(counts[2] - (10**11 + 10**12 / 3)) < 10
