"""Token stream, windows and order."""

import importlib
import itertools
import os
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.token_file import HEADER, MOST_MAPPED, Manifest, TokenFile, TokenFileWriter
from pretrain.config.data import DataConfig
from pretrain.data import IGNORED, Order, PackedWindows, Permutation, Windows, open_corpus, open_data
from tests.benchmarks.reading import write_sparse
from tests.data_prep.commands import small_spec
from tests.pretrain.helpers import make_corpus, write_tokens


@settings(deadline=None)
@given(n=st.integers(1, 2000), seed=st.integers(0, 2**63))
def test_permutation_is_bijection(n, seed):
    permutation = Permutation(n, seed, "corpus", 0)
    images = permutation(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))
    spots = np.array([n - 1, 0, n // 2])
    assert (permutation(spots) == images[spots]).all()
    for outside in (-1, n):
        with pytest.raises(IndexError, match="are not inside"):
            permutation(np.array([0, outside]))


@settings(deadline=None)
@given(n=st.integers(1, 2**40), seed=st.integers(0, 2**63), data=st.data())
def test_permutation_of_any_size_is_injective(n, seed, data):
    """Checks some indices, their neighbours and both ends."""
    permutation = Permutation(n, seed, "corpus", 0)
    some = data.draw(st.lists(st.integers(0, n - 1), max_size=50))
    spots = np.unique([0, n - 1, *(near for i in some for near in (max(i - 1, 0), i, min(i + 1, n - 1)))])
    images = permutation(spots)
    assert len(np.unique(images)) == len(spots) and 0 <= images.min() <= images.max() < n
    assert [int(permutation(spots[i : i + 1])[0]) for i in range(len(spots))] == images.tolist()  # alone or together


def test_order_is_stable_across_versions():
    """Resumed runs rely on the order."""
    assert Permutation(1000, 7, "corpus", 0)(np.arange(8)).tolist() == [594, 349, 71, 525, 59, 522, 335, 706]
    assert Permutation(2**40 - 3, 7, "corpus", 1)(np.arange(4)).tolist() == [
        415128220993,
        353697706856,
        931257678066,
        157301166067,
    ]
    assert Order(10, 7, "corpus")(8, 4).tolist() == [5, 3, 9, 3]


@pytest.mark.parametrize("n", [2**20 + 1, 10**9 + 7, 2**40 - 3, 2**40])
def test_huge_permutation_has_constant_cost(n):
    permutation = Permutation(n, 0)
    spots = np.array([0, 1, 2, n // 2, n - 2, n - 1, *range(12345, 14345)])
    images = permutation(spots).tolist()
    assert len(set(images)) == len(spots) and all(0 <= image < n for image in images)
    tenths = np.bincount([10 * image // n for image in images[6:]], minlength=10)
    assert (abs(tenths - 200) < 6 * np.sqrt(180)).all()  # neighbours are spread everywhere
    assert len(pickle.dumps(permutation)) < 300  # O(1) memory


def test_any_key_changes_order():
    keys = [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0)]
    images = [tuple(Permutation(500, *key)(np.arange(500)).tolist()) for key in keys]
    assert len(set(images)) == 4
    for one, other in itertools.combinations(images, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # two random ones agree in 1 place


@pytest.mark.parametrize("n", [0, -1])
def test_empty_permutation_raises(n):
    with pytest.raises(ValueError, match=f"permutation of {n} items"):
        Permutation(n)


def test_order_is_a_permutation_in_each_epoch():
    order = Order(50, seed=3, corpus="a")
    epochs = [order(50 * e, 50).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order(7, 1) == epochs[0][7]  # backwards, and in any order
    assert order(45, 60).tolist() == epochs[0][45:] + epochs[1] + epochs[2][:5]
    assert Order(50, 3, "b")(0, 50).tolist() != epochs[0] != Order(50, 4, "a")(0, 50).tolist()


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), seq_len=st.integers(1, 9))
def test_every_token_except_first_is_target_once(tmp_path_factory, lengths, seq_len):
    folder = tmp_path_factory.mktemp("files")
    whole = np.arange(sum(lengths))  # every token is its position in the stream
    pieces = np.split(whole, np.cumsum(lengths)[:-1])
    for i, piece in enumerate(pieces):
        write_tokens(folder / f"{i}", piece, 100)
    windows = Windows(tuple(TokenFile(folder / f"{i}") for i in range(len(pieces))), seq_len)
    assert windows.tokens == len(whole)
    seen = []
    for index in range(len(windows)):
        tokens, targets, _ = windows[index]
        assert tokens.shape == targets.shape == (seq_len,) and tokens.dtype == targets.dtype == np.int64
        valid = targets != IGNORED
        assert valid.any() and (targets[valid] == tokens[valid] + 1).all()  # across file boundaries, too
        assert not valid[np.argmin(valid) :].any() or valid.all()  # only the end of the stream has no targets
        seen += targets[valid].tolist()
    assert seen == whole[1:].tolist()


@settings(deadline=None, max_examples=50)
@given(
    files=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=3),
    seq_len=st.integers(1, 9),
)
def test_masked_windows_separate_documents(tmp_path_factory, files, seq_len):
    folder = tmp_path_factory.mktemp("files")
    place = 0
    document = []  # document of each token in the stream
    for i, lengths in enumerate(files):
        with TokenFileWriter(folder / f"{i}", 1000) as file:
            for length in lengths:
                file.add(np.arange(place, place + length))  # every token is its position in the stream
                document += [place] * length
                place += length
    windows = Windows(tuple(TokenFile(folder / f"{i}") for i in range(len(files))), seq_len, masked=True)
    for index in range(len(windows)):
        tokens, targets, starts = windows[index]
        for t in range(min(seq_len, len(document) - index * seq_len)):
            here = index * seq_len + t
            if here + 1 == len(document):  # the last token of the stream is only a target
                assert targets[t] == IGNORED
                continue
            assert tokens[t] == here and starts[t] == max(0, document[here] - index * seq_len)
            goes_on = document[here + 1] == document[here]
            assert targets[t] == (here + 1 if goes_on else IGNORED)


@settings(deadline=None, max_examples=50)
@given(
    files=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    seq_len=st.integers(1, 9),
    data=st.data(),
)
def test_batch_has_the_windows_in_any_order(tmp_path_factory, files, seq_len, data):
    folder = tmp_path_factory.mktemp("files")
    for i, lengths in enumerate(files):
        with TokenFileWriter(folder / f"{i}", 1000) as file:
            for length in lengths:
                file.add(np.arange(1, 1 + length))
    opened = tuple(TokenFile(folder / f"{i}") for i in range(len(files)))
    separate = Windows(opened, seq_len, masked=True)
    for windows in (Windows(opened, seq_len), separate, PackedWindows(opened, seq_len)):
        if not len(windows):
            continue
        indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=6))
        batch = windows.batch(indices)
        assert (batch.starts_T is None) == (not windows.masked)
        for row, index in enumerate(indices):
            for part, alone in zip(batch, windows[index], strict=True):
                assert part is alone is None or (part[row] == alone).all()


def test_document_of_several_sequences_starts_once(tmp_path):
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(np.arange(7), [3, 0, 4])
    builder.add_document(np.arange(7, 9), [2])
    builder.end_document()  # a document without sequences
    builder.add_document(np.arange(9, 14), [4, 1])
    builder.finalize(str(tmp_path / "a.idx"))
    file = TokenFile(tmp_path / "a")
    assert file.document_starts(0, 14) == [0, 7, 9]
    assert file.document_starts(1, 9) == [7] and file.document_starts(10, 14) == []
    assert Windows((file,), 14, masked=True)[0].starts_T.tolist() == [0] * 7 + [7] * 2 + [9] * 5


def test_window_out_of_range_raises(tmp_path):
    write_tokens(tmp_path / "a", np.arange(9), 100)
    windows = Windows((TokenFile(tmp_path / "a"),), 4)
    assert len(windows) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"window {index} is outside \[0, 2\)"):
            windows[index]


def test_open_corpus_reads_manifest(tmp_path):
    corpus = open_corpus(make_corpus(tmp_path / "mine", train=100, val=30))
    assert corpus.vocab_size == small_spec().vocab_size and corpus.bytes_of_ids is not None
    for text, id in small_spec().ranks.items():
        assert corpus.bytes_of_ids[id] == len(text)
    assert corpus.bytes_of_ids[small_spec().end_of_document] == 0
    assert [len(file.tokens) for file in corpus.train] == [50, 50] and [len(file.tokens) for file in corpus.val] == [30]
    assert corpus.tokenizer_fingerprint == small_spec().fingerprint


@pytest.mark.parametrize("given", ["theirs", "theirs.bin", "theirs.idx"])
def test_megatron_pair_is_opened(tmp_path, given):
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in ([5, 6, 7], [70_000, 9]):
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    corpus = open_corpus(tmp_path / given)
    assert corpus.name == open_corpus(tmp_path / "theirs").name, "one name for all spellings of the path"
    assert not corpus.val and corpus.vocab_size is None and corpus.tokenizer is None
    tokens, targets, _ = Windows(corpus.train, 4)[0]
    assert tokens.tolist() == [5, 6, 7, 70_000] and targets.tolist() == [6, 7, 70_000, 9]


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncate(folder: Path) -> None:
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def drop_file(folder: Path) -> None:
    (folder / "val-00000.idx").unlink()


def swap_tokenizer(folder: Path) -> None:
    small_spec(("an", "other", " one")).save(folder / "tokenizer")


@pytest.mark.parametrize(
    "spoil,message",
    [
        (drop_manifest, r"manifest\.json is missing"),
        (truncate, r"train-00001\.bin: 98 bytes, but the manifest says 100"),
        (drop_file, r"val-00000\.idx is missing"),
        (swap_tokenizer, "it is another tokenizer"),
    ],
)
def test_damaged_folder_raises(tmp_path, spoil, message):
    spoil(make_corpus(tmp_path / "mine", train=100, val=30))
    with pytest.raises(ValueError, match=message):
        open_corpus(tmp_path / "mine")


def test_more_token_files_than_open_file_limit(tmp_path):
    """Opens more pairs than the limit of 1,024 files allows; the last 200 stay mapped. Reads them in any order."""
    stream = np.random.default_rng(0).integers(1000, size=4 * 450)
    for number, ids in enumerate(stream.reshape(450, 4)):
        write_tokens(tmp_path / f"a-{number:03}", ids, 1000)
    before = len(os.listdir("/proc/self/fd"))
    windows = Windows(tuple(TokenFile(tmp_path / f"a-{number:03}") for number in range(450)), 6, masked=True)
    for index in np.random.default_rng(1).permutation(len(windows)):
        tokens, *_ = windows[index]
        expected = stream[6 * index : 6 * index + 6]
        assert tokens[: len(expected)].tolist()[:5] == expected.tolist()[:5]
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * MOST_MAPPED


@pytest.mark.parametrize("number", ["documents", "pointers"])
def test_wrong_index_raises_if_documents_are_separated(tmp_path, number):
    """Opens a folder that `verify` would reject. Packing reads the indices completely, too."""
    folder = make_corpus(tmp_path / "mine", train=100, val=30)
    for prefix in (tmp_path / "theirs", folder / "train-00001"):
        with TokenFileWriter(prefix, 1000) as writer:
            for size in (20, 10, 20):
                writer.add(np.arange(size))
        index = bytearray(prefix.with_suffix(".idx").read_bytes())
        place = len(index) - 16 if number == "documents" else HEADER.size + 4 * 3 + 8
        index[place : place + 8] = (99).to_bytes(8, "little")
        prefix.with_suffix(".idx").write_bytes(index)
    open_data(DataConfig(path=str(tmp_path / "theirs")))
    lies = {"documents": "must rise from 0 to 3", "pointers": "the offsets do not match the lengths"}[number]
    with pytest.raises(ValueError, match=rf"theirs\.idx: .*{lies}"):
        open_data(DataConfig(path=str(tmp_path / "theirs"), documents="masked"))
    manifest = Manifest.load(folder)
    entries = tuple(replace(entry, documents=3) if "00001" in entry.name else entry for entry in manifest.files)
    replace(manifest, files=entries).save(folder)
    with pytest.raises(ValueError, match=rf"train-00001\.idx: .*{lies}"):
        open_data(DataConfig(path=str(folder), documents="masked", packing="best_fit"))


def test_invalid_path_raises(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*nowhere must be a folder of token files: .*nowhere does"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        DataConfig()


def test_corpus_name_depends_on_training_tokens_only(tmp_path, monkeypatch):
    """Otherwise a resumed run would restart in moved data, or continue in the middle of new data."""
    mine = open_corpus(make_corpus(tmp_path / "mine", train=100, val=30)).name
    monkeypatch.chdir(tmp_path / "mine")
    assert open_corpus(Path(".")).name == mine
    assert open_corpus(make_corpus(tmp_path / "moved", train=100, val=30)).name == mine
    assert open_corpus(make_corpus(tmp_path / "other" / "mine", train=120, val=30)).name != mine
    pair = open_corpus(write_tokens(tmp_path / "a", np.arange(50), 100).prefix).name
    assert open_corpus(write_tokens(tmp_path / "b", np.arange(51), 100).prefix).name != pair


def test_fewer_than_two_tokens_raises(tmp_path):
    write_tokens(tmp_path / "a", np.arange(1), 100)
    with pytest.raises(ValueError, match="fewer than two training tokens"):
        open_corpus(tmp_path / "a")


def test_memory_does_not_grow_with_samples(tmp_path):
    """Measures the memory to open a sparse pair, and to find and read a far batch."""
    peaks = []
    for samples in (1_000, 10**9):
        write_sparse(tmp_path / "a", samples * 64 + 1)
        tracemalloc.start()
        windows = Windows((TokenFile(tmp_path / "a"),), 64)
        assert len(windows) == samples
        served = Order(samples, 0, "a")(samples * 3 + samples // 2, 100).tolist()
        for index in served:
            windows[index]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(set(served)) == 100
    assert peaks[1] < peaks[0] + 2**14 < 2**20
