"""Tests conversion to other programs and back, with their own readers if there are any, else with published layouts."""

import errno
import importlib
import io
import os
import pickle
import struct
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.durable import DurableFile
from data_prep.faults import check
from data_prep.formats import stream as streams
from data_prep.formats import transfer
from data_prep.formats.__main__ import main
from data_prep.formats.layouts import LAYOUTS, in_short
from data_prep.formats.stream import Tokens, stream
from data_prep.token_file import Manifest, TokenFile, TokenFileWriter
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec
from data_prep.verify import verify
from tests.data_prep.commands import assert_one_error, python, small_spec, texts

END = 259  # of small_spec
DOCUMENTS = [text[:900] for text in texts(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(small_spec())


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text).tolist(), END] for text in DOCUMENTS]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, ids: list[list[int]]) -> Path:
    """A folder with two training files and one validation file, imported from raw ids."""
    folder = tmp_path_factory.mktemp("ours")
    raw(folder / "train.bin", ids[:30])
    raw(folder / "val.bin", ids[30:])
    done = formats("import", "from=nanogpt", f"in={folder}", f"out={folder / 'made'}", f"tokenizer={saved(folder)}")
    assert done.returncode == 0, done.stderr
    return folder / "made"


def formats(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in this process, because a start takes a second."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["formats", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def saved(folder: Path, spec: TokenizerSpec | None = None) -> Path:
    (spec or small_spec()).save(folder / "spec")
    return folder / "spec"


def raw(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    np.array([id for ids in documents for id in ids], dtype).tofile(path)
    return path


def documents_of(folder: Path, split: str) -> list[list[int]]:
    files = [TokenFile(folder / entry.name) for entry in Manifest.load(folder).split(split)]
    return [ids.tolist() for file in files for ids in np.split(file.tokens, np.cumsum(file.lengths)[:-1])]


def test_import_writes_a_valid_folder(ours: Path, ids: list[list[int]]) -> None:
    assert documents_of(ours, "train") == ids[:30] and documents_of(ours, "val") == ids[30:]
    assert verify(ours) == [] and check(ours).corpus["from"] == "nanogpt"
    text_bytes = check(ours).totals()[2]
    assert text_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert not [path for path in ours.parent.iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("name", ["llmc", "datatrove", "nanogpt"])
def test_export_and_import_round_trip(name: str, ours: Path, tmp_path: Path) -> None:
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert formats("export", f"to={name}", f"in={ours}", f"out={theirs}").returncode == 0
    given = f"{theirs}/*/*.ds" if name == "datatrove" else theirs
    done = formats("import", f"from={name}", f"in={given}", f"tokenizer={ours / 'tokenizer'}", f"out={back}")
    for split in ("train", "val"):
        assert documents_of(back, split) == documents_of(ours, split)
    assert done.returncode == 0 and verify(back) == []


def test_llmc_byte_for_byte(tmp_path: Path) -> None:
    """Expects the bytes of write_datafile in llm.c's dev/data/data_common.py, with the id before each document."""
    with TokenFileWriter(tmp_path / "a", 300) as writer:
        for document in ([1, 2, END], [3, END]):
            writer.add(np.array(document))
    file = TokenFile(tmp_path / "a")
    for vocab_size, magic, version, kind in ((300, 20240520, 1, "H"), (2**16 + 1, 20240801, 7, "I")):
        (tmp_path / kind).mkdir()
        LAYOUTS["llmc"].export([file], tmp_path / kind, "train", vocab_size, "small")
        content = (tmp_path / kind / "train_000000.bin").read_bytes()
        assert content == struct.pack("<256i", magic, version, 5, *[0] * 253) + struct.pack(
            f"<5{kind}", END, 1, 2, END, 3
        )


def test_llmc_documents_may_cross_shards(tmp_path: Path, ids: list[list[int]]) -> None:
    """Shards of llm.c end after a fixed number of tokens, also inside a document; the last document has no id after
    it.
    """
    tokens = np.array([id for document in ids for id in [END, *document[:-1]]], "<u2")
    for number, low in enumerate(range(0, len(tokens), 1001)):
        part = tokens[low : low + 1001]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        name = f"edu_fineweb_{'val' if number == 0 else 'train'}_{number:06d}.bin"
        (tmp_path / name).write_bytes(header.tobytes() + part.tobytes())
    spec, out = saved(tmp_path), tmp_path / "o"
    done = formats("import", "from=llmc", f"in={tmp_path}/edu*.bin", f"tokenizer={spec}", f"out={out}")
    assert done.returncode == 0, done.stderr
    found = [id for split in ("val", "train") for ids in documents_of(tmp_path / "o", split) for id in ids]
    cut = 1001 - 1 if tokens[1001] != END else 1001
    assert found[:cut] == tokens[1 : cut + 1].tolist()
    assert found[-500:] == [*tokens[-499:].tolist(), END]
    assert verify(tmp_path / "o") == []


def test_datatrove_byte_for_byte(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "a", 300) as writer:
        for document in ([1, 2, END], [3, END]):
            writer.add(np.array(document))
    LAYOUTS["datatrove"].export([TokenFile(tmp_path / "a")], tmp_path, "train", 300, "small")
    path = tmp_path / "train" / "train-00000.ds"
    assert path.read_bytes() == struct.pack("<5H", 1, 2, END, 3, END)
    assert Path(f"{path}.index").read_bytes() == struct.pack("<2Q", 3, 5)
    assert Path(f"{path}.metadata").read_text() == "small|2\n5\n5.00 T"


def test_datatrove_reads_exported_files(ours: Path, tmp_path: Path, ids: list[list[int]]) -> None:
    dataset = pytest.importorskip("datatrove.utils.dataset", reason="needs datatrove")
    formats("export", "to=datatrove", f"in={ours}", f"out={tmp_path / 'ds'}")
    theirs = dataset.DatatroveFolderDataset(str(tmp_path / "ds" / "train"), seq_len=15, return_positions=True)
    flat = [id for document in ids[:30] for id in document]
    starts = [0, *np.cumsum([len(document) for document in ids[:30]]).tolist()]
    assert len(theirs) == len(flat) // 16
    for number in range(len(theirs)):
        item, window = theirs[number], slice(16 * number, 16 * number + 16)
        assert item["input_ids"].tolist() == flat[window]
        begins = [max(low for low in (window.start, *starts) if low <= i) for i in range(window.start, window.stop)]
        assert item["positions"].tolist() == [i - begin for i, begin in enumerate(begins, start=window.start)]


def test_datatrove_files_are_imported(tmp_path: Path, ids: list[list[int]]) -> None:
    tokenized = pytest.importorskip("datatrove.pipeline.tokens.tokenizer", reason="needs datatrove")
    for size in (2, 4):
        made = tokenized.TokenizedFile(str(tmp_path / str(size)), "a.ds", token_size=size, save_final_metadata=True)
        for document in ids:
            made.write(document, None)
        made.close()
        out = tmp_path / f"{size}.out"
        formats("import", "from=datatrove", f"in={tmp_path / str(size)}", f"tokenizer={saved(tmp_path)}", f"out={out}")
        assert documents_of(out, "train") == ids


@pytest.mark.parametrize("tokens", [0, 5, 99, 999, 1000, 1_234_567, 10**12])
def test_short_number_matches_datatrove(tokens: int) -> None:
    humanize = pytest.importorskip("humanize", reason="comes with datatrove")
    assert in_short(tokens) == humanize.metric(tokens, unit="T")


@pytest.mark.parametrize("ended", [True, False])
def test_megatron_documents_of_several_sequences_are_imported(
    ended: bool, tmp_path: Path, ids: list[list[int]]
) -> None:
    """Megatron's preprocess_data without --append-eod omits the end-of-document ids; the import adds them."""
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    torch = importlib.import_module("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.y.bin"), dtype=np.int32)
    for document in ids:
        shown = document if ended else document[:-1]
        builder.add_document(torch.tensor(shown), [3, len(shown) - 3])
    builder.finalize(str(tmp_path / "x.y.idx"))
    for number, name in enumerate(("x.y", "x.y.bin", "x.y.idx", ".", "*.bin")):
        out = tmp_path / "out" / str(number)
        done = formats("import", "from=megatron", f"in={tmp_path / name}", f"tokenizer={saved(tmp_path)}", f"out={out}")
        assert done.returncode == 0, done.stderr
        assert documents_of(out, "train") == ids and verify(out) == []


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 8), max_size=7), min_size=1, max_size=12),
    before=st.booleans(),
    piece=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 60), max_size=3),
)
def test_stream_is_identical_for_any_pieces_and_files(
    documents: list[list[int]], before: bool, piece: int, cuts: list[int]
) -> None:
    """Puts the id before or after each document, ends files anywhere, and reads pieces of any size."""
    documents = [document or [1] for document in documents]
    flat = np.array([id for ids in documents for id in ([9, *ids] if before else [*ids, 9])])
    files = [Tokens(Path("x"), part) for part in np.split(flat, sorted(min(cut, len(flat)) for cut in cuts))]
    expected = [[*ids, 9] for ids in documents]
    ends = np.cumsum([len(ids) for ids in documents])
    bare = np.array([id for ids in documents for id in ids])
    with_index = Tokens(Path("x"), bare, lambda start, stop: ends[(ends > start) & (ends <= stop)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE_TOKENS", piece)
        assert read(files) == expected and read([with_index]) == expected


def read(files: list[Tokens]) -> list[list[int]]:
    documents, document = [], []
    for piece in stream(files, 9):
        low = 0
        for end in piece.ends.tolist():
            documents.append([*document, *piece.ids[low:end].tolist()])
            document, low = [], end
        document += piece.ids[low:].tolist()
    assert not document
    return documents


def test_files_are_cut_between_documents(
    tmp_path: Path, ids: list[list[int]], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "FILE_TOKENS", 2000)
    monkeypatch.setattr(streams, "PIECE_TOKENS", 700)
    manifest = transfer.import_tokens(LAYOUTS["nanogpt"], [raw(tmp_path / "a.bin", ids)], [], tokenizer, tmp_path / "o")
    assert len(manifest.files) > 3 and documents_of(tmp_path / "o", "train") == ids
    assert verify(tmp_path / "o") == []


def test_import_uses_flat_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Imports 200 MB of one document: the process holds pieces only; the page cache does not count."""
    ids = np.tile(tokenizer.encode(" the loss of rows"), 10_000_000)[:100_000_000].astype("<u2")
    ids.tofile(tmp_path / "a.bin")
    program = f"""
from data_prep.formats.__main__ import run
run(["import", "from=nanogpt", "in={tmp_path / "a.bin"}", "tokenizer={saved(tmp_path)}", "out={tmp_path / "o"}"])
print(int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) // 1024)
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200
    assert documents_of(tmp_path / "o", "train")[0][:9] == ids[:9].tolist()


def llmc(path: Path, magic: int = 20240520, version: int = 1, claimed: int | None = None) -> Path:
    tokens = np.array([END, 1, 2], "<u2")
    header = struct.pack("<256i", magic, version, 3 if claimed is None else claimed, *[0] * 253)
    path.write_bytes(header + tokens.tobytes())
    return path


MISTAKES = {
    "nothing": (["import"], "from= must be given"),
    "command": (["convert", "from=llmc"], "convert must be import or export"),
    "key": (["import", "form=llmc"], "form=llmc"),
    "layout": (["import", "from=x", "in=a", "tokenizer=b", "out=c"], "from=x must be one of megatron, llmc"),
    "no file": (["import", "from=llmc", "in={here}/none*", "tokenizer={spec}", "out={here}/o"], "no such file"),
    "empty item": (
        ["import", "from=llmc", "in=[{here}/id.bin,]", "tokenizer={spec}", "out={here}/o"],
        "an entry of the list is empty",
    ),
    "empty folder": (["import", "from=datatrove", "in={here}", "tokenizer={spec}", "out={here}/o"], "no file *.ds"),
    "magic": (
        ["import", "from=llmc", "in={here}/magic.bin", "tokenizer={spec}", "out={here}/o"],
        "not a file of llm.c",
    ),
    "count": (["import", "from=llmc", "in={here}/count.bin", "tokenizer={spec}", "out={here}/o"], "of 7 tokens"),
    "short": (
        ["import", "from=llmc", "in={here}/short.bin", "tokenizer={spec}", "out={here}/o"],
        "not a file of llm.c",
    ),
    "odd": (["import", "from=nanogpt", "in={here}/odd.bin", "tokenizer={spec}", "out={here}/o"], "must be even"),
    "empty": (["import", "from=nanogpt", "in={here}/empty.bin", "tokenizer={spec}", "out={here}/o"], "have no tokens"),
    "id": (["import", "from=nanogpt", "in={here}/id.bin", "tokenizer={spec}", "out={here}/o"], "id 260 must be in"),
    "other": (["import", "from=nanogpt", "in={here}/other.bin", "tokenizer={spec}", "out={here}/o"], "other ids"),
    "narrow": (["import", "from=nanogpt", "in={here}/id.bin", "tokenizer={wide}", "out={here}/o"], "100000 rows"),
    "no index": (["import", "from=datatrove", "in={here}/id.bin", "tokenizer={spec}", "out={here}/o"], "is missing"),
    "val": (["import", "from=nanogpt", "in={here}/val.bin", "tokenizer={spec}", "out={here}/o"], "for training"),
    "tokenizer": (["import", "from=nanogpt", "in={here}/id.bin", "tokenizer=x", "out={here}/o"], "tokenizer.name=x"),
    "there": (["import", "from=nanogpt", "in={here}/good.bin", "tokenizer={spec}", "out={here}"], "nothing was over"),
    "not ours": (["export", "to=llmc", "in={here}", "out={here}/o"], "manifest.json is missing"),
    "native": (["export", "to=megatron", "in={ours}", "out={here}/o"], "no export is needed"),
    "out": (["export", "to=llmc", "in={ours}", "out={here}"], "nothing was overwritten"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(case: str, tmp_path: Path, ours: Path) -> None:
    arguments, message = MISTAKES[case]
    llmc(tmp_path / "magic.bin", magic=20240521)
    llmc(tmp_path / "count.bin", claimed=7)
    (tmp_path / "short.bin").write_bytes(b"123456")
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.bin").write_bytes(b"")
    raw(tmp_path / "id.bin", [[1, 260, END]])
    raw(tmp_path / "other.bin", [[116, 104, 101, END]])  # "the" as bytes, although it has its own row
    raw(tmp_path / "good.bin", [[1, 2, END]])
    raw(tmp_path / "val.bin", [[1, 2, END]])
    wide = TokenizerSpec("wide", small_spec().pattern, {END_OF_DOCUMENT: 99_999}, small_spec().ranks)
    places = {"here": tmp_path, "spec": saved(tmp_path), "wide": saved(tmp_path / "w", wide), "ours": ours}
    before = sorted(tmp_path.rglob("*"))
    assert_one_error(formats(*(part.format(**places) for part in arguments)), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_datatrove_index_is_refused(tmp_path: Path) -> None:
    raw(tmp_path / "a.ds", [[1, 2, END, 3, END]])
    for ends, message in (([3, 9], "its index says 9"), ([4, 3, 5], "must rise")):
        np.array(ends, "<u8").tofile(tmp_path / "a.ds.index")
        done = formats(
            "import", "from=datatrove", f"in={tmp_path}", f"tokenizer={saved(tmp_path)}", f"out={tmp_path / 'o'}"
        )
        assert_one_error(done, message)


def test_killed_import_leaves_no_folder_and_can_be_repeated(tmp_path: Path, ids: list[list[int]]) -> None:
    raw(tmp_path / "a.bin", ids * 2000)
    command = [sys.executable, "-m", "data_prep.formats", "import", "from=nanogpt", f"in={tmp_path / 'a.bin'}"]
    command += [f"tokenizer={saved(tmp_path)}", f"out={tmp_path / 'o'}"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("o.unfinished/train-*.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, 9)
    process.wait()
    assert not (tmp_path / "o").exists() and (tmp_path / "o.unfinished").exists()
    done = python(*command[1:])
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "o") == [] and not list(tmp_path.glob("o.unfinished*"))


def test_import_reads_no_pickle(tmp_path: Path, ids: list[list[int]]) -> None:
    """nanoGPT stores its vocabulary in meta.pkl beside the tokens."""
    raw(tmp_path / "train.bin", ids)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({}))
    done = formats("import", "from=nanogpt", f"in={tmp_path}", f"tokenizer={saved(tmp_path)}", f"out={tmp_path / 'o'}")
    assert done.returncode == 0


def test_help_lists_the_options() -> None:
    done = python("-m", "data_prep.formats", "--help")
    assert done.returncode == 0 and "from=llmc" in done.stdout and not done.stderr


@pytest.mark.parametrize("command", ["import", "export"])
def test_full_disk_leaves_nothing(command: str, tmp_path: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw(tmp_path / "a.bin", [[1, 2, END]])
    settings = {
        "import": ["from=nanogpt", f"in={tmp_path / 'a.bin'}", f"tokenizer={saved(tmp_path)}"],
        "export": ["to=llmc", f"in={ours}"],
    }

    def full(self: DurableFile) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    monkeypatch.setattr(DurableFile, "finish", full)
    before = sorted(tmp_path.rglob("*"))
    done = formats(command, *settings[command], f"out={tmp_path / 'o'}")
    assert_one_error(done, "No space left on device", "nothing was kept")
    assert sorted(tmp_path.rglob("*")) == before
