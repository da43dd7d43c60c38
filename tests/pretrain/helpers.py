"""Helpers for the tests of several packages."""

from pathlib import Path

import numpy as np
from torch import Tensor

from data_prep.token_file import Manifest, TokenFileEntry, TokenFileWriter
from pretrain.timeline import PARTS
from pretrain.vocab import VocabShard
from tests.data_prep.commands import small_spec

# Keys of metrics.jsonl that differ between equal runs:
TIMES = {"tokens_per_s", "tokens_per_s_per_rank", "step_s", "peak_memory_gib", "data_wait", "communication_s"}
TIMES |= {f"step_s/{part}" for part in PARTS}


def padded_rows(weight_VD: Tensor, shard: VocabShard) -> Tensor:
    """Rows of a dense matrix on a shard, [v, D]; padding rows are zero."""
    padded = weight_VD.new_zeros(shard.padded_size, weight_VD.shape[1])
    padded[: shard.vocab_size] = weight_VD
    return padded[shard.start : shard.stop].clone()


def write_tokens(prefix: Path, ids: np.ndarray, vocab_size: int) -> TokenFileWriter:
    """Writes a token file of one document; of none if there are no ids."""
    with TokenFileWriter(prefix, vocab_size) as writer:
        if len(ids):
            writer.add(np.asarray(ids))
    return writer


def make_corpus(folder: Path, train: int = 4000, val: int = 600) -> Path:
    """Makes a complete folder: two training files, one validation file, random ids below 260."""
    spec = small_spec()
    spec.save(folder / "tokenizer")
    random = np.random.default_rng(0)
    entries = []
    for name, count in (("train-00000", train // 2), ("train-00001", train - train // 2), ("val-00000", val)):
        ids = random.integers(spec.vocab_size, size=count)
        writer = write_tokens(folder / name, ids, spec.vocab_size)
        split = name.split("-")[0]
        entries.append(TokenFileEntry(name, split, writer.documents, count, count, writer.largest_id, writer.sha256))
    Manifest(1, spec.fingerprint, spec.vocab_size, {}, {}, tuple(entries)).save(folder)
    return folder
