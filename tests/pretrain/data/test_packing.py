"""Best-fit packing serves every position once, keeps documents whole and needs no more bins than the paper."""

from collections import Counter

import numpy as np
import pytest

from data_prep.token_file import TokenFile, TokenFileWriter
from pretrain.config.data import DataConfig
from pretrain.data import IGNORED, PackedWindows
from pretrain.data.packing import best_fit

T = 16


def plain_best_fit(sizes, capacity):
    """Plain best-fit decreasing. Returns the room left in each bin."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    return Counter(rooms)


@pytest.mark.parametrize("capacity,n", [(1, 5), (2, 7), (16, 0), (16, 1), (16, 300), (64, 1000), (100, 40)])
def test_packing_matches_best_fit_decreasing(capacity, n):
    for seed in range(5):
        sizes = np.random.default_rng(seed).integers(1, capacity + 1, n)
        if seed % 2:
            sizes = np.maximum(1, sizes // 4)
        bins = best_fit(sizes, capacity)
        filled = np.bincount(bins, weights=sizes).astype(int)
        assert Counter((capacity - filled).tolist()) == plain_best_fit(sizes.tolist(), capacity)
        assert sorted(set(bins.tolist())) == list(range(len(filled)))


@pytest.fixture
def files(tmp_path):
    """Makes two files of documents of 1 to 70 tokens. A token encodes document and position; the last is the end's."""
    generator, made, number = np.random.default_rng(0), [], 0
    for name in "ab":
        with TokenFileWriter(tmp_path / name, 100_000) as file:
            for length in [*generator.integers(1, 70, 60).tolist(), 1, 17, 33, 16]:
                number += 1
                file.add(np.append(number * 100 + np.arange(length - 1), 0))
        made.append(TokenFile(tmp_path / name))
    return tuple(made)


def test_every_position_is_served_once(files):
    windows, pairs, pieces = PackedWindows(files, T), Counter(), Counter()
    empty = 0
    for i in range(len(windows)):
        tokens, targets, starts = windows[i]
        used = int((targets != IGNORED).sum())
        assert (targets[used:] == IGNORED).all() and (targets[:used] != IGNORED).all()
        empty += T - used
        for place in range(used):
            pairs[tokens[place], targets[place]] += 1
            begin = starts[place]
            assert begin <= place and tokens[place] // 100 == tokens[begin] // 100
            if begin == place:
                pieces[tokens[place] // 100] += 1
        assert (starts[used:] == used).all()
    pairs_read = Counter()
    for file in files:
        for document in range(file.documents):
            begin, end = file.document_start(document), file.document_start(document + 1)
            pairs_read.update(
                zip(file.tokens[begin : end - 1].tolist(), file.tokens[begin + 1 : end].tolist(), strict=True)
            )
    assert pairs == pairs_read and set(pairs.values()) == {1}
    lengths = np.concatenate([file.document_lengths() for file in files])
    assert pieces == {i + 1: -(-(n - 1) // T) for i, n in enumerate(lengths.tolist()) if n > 1}
    assert windows.documents_cut == sum(n - 1 > T for n in lengths)
    assert round(windows.waste * len(windows) * T) == empty


def test_packed_window_lists_its_documents(files):
    windows = PackedWindows(files, T)
    for i in range(len(windows)):
        tokens, _, starts = windows[i]
        end = 0
        for part in windows.documents(i):
            assert part.start == end == starts[part.start]
            low = part.file.document_start(part.document) + part.offset
            assert (
                tokens[part.start : part.stop].tolist() == part.file.tokens[low : low + part.stop - part.start].tolist()
            )
            end = part.stop
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_packing_requires_masked_documents():
    with pytest.raises(ValueError, match=r"data.documents=causal must be masked with data.packing=best_fit"):
        DataConfig("data/a", packing="best_fit")
    with pytest.raises(ValueError, match=r"data.packing=first_fit must be none or best_fit"):
        DataConfig("data/a", packing="first_fit")
