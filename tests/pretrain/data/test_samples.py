"""Several corpora in one run: no window is repeated or lost after any change."""

from collections import Counter

import numpy as np
import pytest

from data_prep.token_file import TokenFile
from pretrain.config.data import DataConfig
from pretrain.config.lengths import Batches
from pretrain.data import Order, Samples, Windows, open_data
from pretrain.data.blend import Blend
from tests.pretrain.helpers import make_corpus, write_tokens

SIZES = {"web": 60, "code": 30, "books": 20}


@pytest.fixture
def sources(tmp_path):
    """Makes corpora with the given numbers of windows of 4 tokens."""
    found = {}
    for name, size in SIZES.items():
        write_tokens(tmp_path / name, np.arange(4 * size + 1), 1000)
        windows = Windows((TokenFile(tmp_path / name),), 4)
        found[name] = windows, Order(len(windows), seed=0, corpus=name)
    return found


def served(samples: Samples, consumed: dict[str, int], count: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
    titles = {id(windows): title for title, (windows, _) in samples.sources.items()}
    windows = [(titles[id(windows)], index) for windows, index in samples.next(consumed, count)]
    return windows, samples.after(consumed, count)


def test_samples_do_not_depend_on_batch_size(sources):
    samples = Samples(sources, Blend({0: [3, 2, 1], 50: [1, 1, 1]}))
    whole, end = served(samples, {}, 90)
    pieces, consumed = [], {}
    for count in (1, 7, 32, 50):
        part, consumed = served(samples, consumed, count)
        pieces += part
    assert pieces == whole and consumed == end
    assert Counter(title for title, _ in whole) == {title: end[title] for title in SIZES}


@pytest.mark.parametrize("skip", [[[0, 3]], [[5, 8], [7, 20], [48, 61]], [[40, 41], [90, 10_000]]])
def test_left_out_samples_are_missing_and_others_stay(sources, skip):
    samples = Samples(sources, Blend({0: [3, 2, 1], 50: [1, 1, 1]}))
    whole, _ = served(samples, {}, 120)
    gone = {number for first, stop in skip for number in range(first, stop)}
    left = [number for number in range(120) if number not in gone]
    some, pieces, consumed = samples.without(skip), [], {}
    for count in (1, 4, 30, len(left) - 35):
        assert some.numbers(consumed, count) == left[len(pieces) :][:count]
        part, consumed = served(some, consumed, count)
        pieces += part
        assert sum(consumed.values()) == left[len(pieces) - 1] + 1, "left out samples count as consumed"
    assert pieces == [whole[number] for number in left]
    assert consumed == samples.after({}, sum(consumed.values()))


@pytest.mark.parametrize("skip", [[], [[0, 3]], [[5, 8], [10, 31], [48, 61]], [[29, 30], [33, 34], [90, 97]]])
def test_steps_go_on_batch_by_batch(sources, skip):
    samples = Samples(sources, Blend({0: [3, 2, 1], 50: [1, 1, 1]}), skip)
    batches = Batches.of(2, {"9 samples": 5, "30 samples": 3, "31 samples": 4, "70 samples": 7}, seq_len=4)
    positions = [samples.after({}, 0)]
    for _ in range(25):
        first = samples.numbers(positions[-1], 1)[0]
        positions.append(samples.after(positions[-1], batches.size_at(first)))
    for begin in (0, 1, 7):
        for steps in range(25 - begin):
            assert samples.after_steps(positions[begin], steps, batches) == positions[begin + steps]
    assert sum(samples.after_steps({}, 2**40, batches).values()) > 7 * 2**39


def test_no_window_repeats_after_corpora_change(sources):
    """Adds a corpus, changes weights, removes a corpus and adds it again. No window repeats within an epoch."""
    some = {name: sources[name] for name in ("web", "code")}
    less = {name: sources[name] for name in ("web", "books")}
    consumed, seen = {}, []
    for samples, count in [
        (Samples(some, Blend({0: [3, 1]})), 24),
        (Samples(sources, Blend({0: [1, 1, 1]})), 21),
        (Samples(sources, Blend({0: [5, 1, 1]})), 21),
        (Samples(less, Blend({0: [1, 1]})), 10),
        (Samples(sources, Blend({0: [1, 2, 0]})), 20),
    ]:
        windows, consumed = served(samples, consumed, count)
        seen += windows
        assert sum(consumed.values()) == len(seen)
    assert len(set(seen)) == len(seen), "no window may repeat"
    for name, (_, order) in sources.items():
        assert {index for title, index in seen if title == name} == set(order(0, consumed[name]).tolist()), (
            "no window may be lost"
        )


def test_epochs_are_counted_per_corpus(sources):
    samples = Samples(sources, Blend({0: [1, 1, 0]}))
    consumed = samples.after({}, 120)
    assert samples.epochs(consumed) == {"web": consumed["web"] / 60, "code": consumed["code"] / 30, "books": 0}
    assert sum(consumed.values()) == 120 and consumed["code"] > 30


@pytest.mark.parametrize(
    "settings,message",
    [
        ({}, "data.path is missing"),
        ({"path": "a", "corpora": {"web": "b"}}, "data.path=a must not be given together with data.corpora"),
        (
            {"path": "a", "stages": {5: {"web": 1.0}}},
            r"data.stages.5=.* must give one weight per corpus of data.corpora: none",
        ),
        ({"corpora": {"web": ""}}, "data.corpora must give a path for each corpus"),
        (
            {"corpora": {"web": "a"}, "weights": {"wab": 1.0}},
            r"data.weights=.* must give one weight per corpus of data.corpora: web",
        ),
        ({"corpora": {"web": "a"}, "weights": {"web": -1.0}}, r"data.weights.web=-1.0 must be a number of at least 0"),
        ({"corpora": {"web": "a"}, "weights": {"web": float("nan")}}, r"data.weights.web=nan must be"),
        ({"corpora": {"web": "a"}, "weights": {"web": 0.0}}, r"data.weights must have a weight above 0"),
        ({"corpora": {"web": "a"}, "stages": {0: {"web": 1.0}}}, r"data.stages.0 must be a sample number"),
        ({"corpora": {"web": "a"}, "stages": {9: {"wab": 1.0}}}, r"data.stages.9=.* must give one weight per corpus"),
        ({"corpora": {"web": "a"}, "stages": {9: {"web": "much"}}}, r"data.stages.9.web=much must be a number"),
        ({"path": "a", "skip": [[5, 5]]}, r"data.skip=\[\[5,5\]\] must be \[first, stop\)"),
        ({"path": "a", "skip": [[5]]}, r"data.skip=\[\[5\]\] must be"),
        ({"path": "a", "documents": "packed"}, "data.documents=packed must be causal or masked"),
    ],
)
def test_invalid_setting_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_corpora_must_share_tokenizer_and_differ_in_tokens(tmp_path):
    one, same = (make_corpus(tmp_path / name, train=100) for name in ("one", "same"))
    other = write_tokens(tmp_path / "other", np.arange(50), 100).prefix
    with pytest.raises(ValueError, match=r"data.corpora.b=.* must have the tokenizer of data.corpora.a"):
        open_data(DataConfig(corpora={"a": str(one), "b": str(other)}))
    with pytest.raises(ValueError, match=r"data.corpora.a and data.corpora.b have the same tokens"):
        open_data(DataConfig(corpora={"a": str(one), "b": str(same)}))
    longer = make_corpus(tmp_path / "longer", train=300)
    data = open_data(DataConfig(corpora={"a": str(one), "b": str(longer)}, stages={7: {"a": 3.0, "b": 1.0}}))
    assert data.blend.shares(0) == [0.25, 0.75] and data.blend.shares(7) == [0.75, 0.25]
