"""Files that we write are read by safetensors and torch."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from pretrain.checkpoint import tensor_file
from pretrain.checkpoint.tensor_file import Slice, file_name, write_slices


@pytest.mark.parametrize("piece", [7, 8 << 20])
def test_safetensors_reads_file_back(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece)
    tensors = {
        "fp32": torch.randn(5, 3),
        "bf16": torch.randn(4).bfloat16(),
        "fp64": torch.randn(2, 3, 4, dtype=torch.float64),
        "a view": torch.randn(6, 4).T[1:],
    }
    path = tmp_path / file_name(0)
    facts = write_slices(path, [Slice(name, tensor, (7,) * tensor.dim()) for name, tensor in tensors.items()])
    content = path.read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert [*tmp_path.iterdir()] == [path]
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_torch_finds_slices_at_their_offsets(tmp_path):
    whole = torch.randn(7, 4)
    write_slices(tmp_path / file_name(0), [Slice("rows", whole[:4], (0, 0))])
    write_slices(tmp_path / file_name(1), [Slice("rows", whole[4:], (4, 0)), Slice("bias", whole[0], (0,))])
    metadata = HuggingFaceStorageReader(str(tmp_path)).read_metadata().state_dict_metadata
    assert metadata["rows"].size == whole.shape and metadata["bias"].size == (4,)
    chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in metadata["rows"].chunks)
    assert chunks == [((0, 0), (4, 4)), ((4, 0), (3, 4))]
    with safe_open(tmp_path / file_name(1), framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(KeyError):
        write_slices(tmp_path / file_name(0), [Slice("whole numbers", torch.arange(3), (0,))])
    assert not [*tmp_path.iterdir()]
