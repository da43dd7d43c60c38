"""Checkpoints through real ranks: whole at any split, or refused by name."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    ModelState,
    TrainState,
    checkpoints,
    read_tensors,
)
from pretrain.mesh import Mesh
from pretrain.train import build_model
from pretrain.vocab import stable_seed
from tests.pretrain.tiny import tiny_config
from tests.ranks import run_ranks

POSITION = TrainState(step=3, tokens=77, samples={"a": 5, "b": 6})
SMALL = {"model__layers": 1, "model__width": 3, "model__heads": 1}  # width 3: on four ranks one holds no bias


def build(run: Path, world: int, vocab_size: int = 307, keep: int = 0, **changes) -> CheckpointManager:
    """One rank of a fresh run, ready to save or to load."""
    config = tiny_config(run, run, **SMALL | changes)
    mesh = Mesh.of(world, torch.device("cpu"))
    engine, model, matrix = build_model(config, mesh, vocab_size)
    about = {"vocab_size": vocab_size}
    return CheckpointManager(run, ModelState(engine, model.vocab, matrix, mesh), mesh, keep=keep, seed=0, about=about)


def whole(name: str, tensor: DTensor) -> torch.Tensor:
    """What the tests save under that name."""
    generator = torch.Generator().manual_seed(stable_seed(name))
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def fill(manager: CheckpointManager) -> None:
    for name, tensor in manager.model.tensors().items():
        mine = distribute_tensor(whole(name, tensor), tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(mine.to_local())


def is_filled(manager: CheckpointManager) -> bool:
    return all(torch.equal(t.full_tensor(), whole(name, t)) for name, t in manager.model.tensors().items())


def save(rank, world, run, changes=None, steps=(POSITION.step,)):
    """Saves; then the next random numbers of this rank."""
    manager = build(run, world, **changes or {})
    fill(manager)
    torch.manual_seed(100 + rank)
    for step in steps:
        manager.save(TrainState(step, POSITION.tokens, POSITION.samples))
    return torch.rand(4)


def load(rank, world, run, changes=None):
    """Loads the newest; whether all is as saved, and the next random numbers of this rank."""
    manager = build(run, world, **changes or {})
    torch.manual_seed(0)
    state = manager.load(checkpoints(run)[-1])
    steps = {
        float(s["step"])
        for adamw in (manager.model.engine.adamw, manager.model.matrix.adamw)
        for s in adamw.state.values()
    }
    return is_filled(manager) and state == POSITION and steps == {POSITION.step}, torch.rand(4)


def failures(rank, world, runs, changes=None):
    """The error of loading each of the runs."""
    messages = []
    for run in runs:
        try:
            build(run, world, **changes or {}).load(checkpoints(run)[-1])
            messages.append("loaded")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run with a checkpoint of two ranks."""
    run = tmp_path_factory.mktemp("good")
    run_ranks(2, save, run)
    return run


@pytest.fixture
def copies(good, tmp_path):
    """Copies of the good run: `copies(name)` is the checkpoint's folder in a new one."""

    def copy(name: str) -> Path:
        shutil.copytree(good, tmp_path / name)
        return checkpoints(tmp_path / name)[-1]

    return copy


@pytest.mark.parametrize(
    "changes",
    [{}, {"vocab__tie": "untied", "vocab_size": 5, "vocab__multiple": 1}],
    ids=["tied", "untied, empty shards"],
)
@pytest.mark.parametrize("world,parallel", [(2, "auto"), (4, "2")])
def test_saved_at_one_split_and_loaded_at_others(tmp_path, world, parallel, changes):
    run_ranks(world, save, tmp_path, {**changes, "vocab__parallel": parallel})
    for loaders, axis in [(1, "auto"), (2, "1"), (3, "auto"), (4, "auto")]:
        for right, _ in run_ranks(loaders, load, tmp_path, {**changes, "vocab__parallel": axis}):
            assert right, f"{loaders} ranks with vocab.parallel={axis} got something else"


def test_generators_go_on_where_they_were(tmp_path):
    saved = run_ranks(2, save, tmp_path)
    loaded = [numbers for _, numbers in run_ranks(2, load, tmp_path)]
    assert all(map(torch.equal, saved, loaded)) and not torch.equal(*saved)
    others = [[numbers for _, numbers in run_ranks(3, load, tmp_path)] for _ in range(2)]
    assert torch.equal(
        torch.stack(others[0]), torch.stack(others[1])
    )  # in another world: new ones, but always the same
    assert len({tuple(numbers.tolist()) for numbers in others[0]}) == 3


@pytest.mark.parametrize("keep,left", [(2, [3, 4]), (1, [4]), (0, [1, 2, 3, 4])])
def test_keep(tmp_path, keep, left):
    run_ranks(1, save, tmp_path, {"keep": keep}, (1, 2, 3, 4))
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in left]
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_leftovers_are_no_checkpoints_and_go_away(good, copies):
    folder = copies("run")
    run = folder.parents[1]
    folder.with_name(".tmp-step-00000009").mkdir()
    shutil.copy(folder / "manifest.json", folder.with_name(".tmp-step-00000009"))
    unfinished = folder.with_name("step-00000008")
    unfinished.mkdir()
    (unfinished / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints(run) == [folder]
    run_ranks(2, save, run, {}, (8,))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000003", "step-00000008"]
    assert not (unfinished / "shard-00007-model-00001-of-00001.safetensors").exists()


def test_a_step_that_is_saved_stays(good, copies):
    folder = copies("run")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_ranks(2, save, folder.parents[1])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_is_named_on_every_rank(copies):
    second = "shard-00002-model-00001-of-00001.safetensors"
    spoils = {
        "flipped": (lambda folder: flip(folder / second, -1), f"{second} is damaged"),
        "header": (lambda folder: flip(folder / second, 9), f"{second} is damaged"),
        "truncated": (lambda folder: os.truncate(folder / second, 100), f"{second}: 100 bytes, but the manifest says"),
        "missing": (lambda folder: (folder / second).unlink(), f"{second} is missing"),
        "stray": (
            lambda folder: shutil.copy(folder / second, folder / "x.safetensors"),
            "x.safetensors is not in the manifest",
        ),
        "no json": (lambda folder: (folder / "manifest.json").write_text("{"), "is not a checkpoint's manifest"),
        "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a checkpoint's manifest"),
        "no files": (lambda folder: edit_manifest(folder, files=None), "manifest: it has no files"),
        "version": (
            lambda folder: edit_manifest(folder, format_version=2),
            "format version 2, but this program reads 1",
        ),
    }
    folders = {name: copies(name) for name in spoils}
    for name, (spoil, _) in spoils.items():
        spoil(folders[name])
    for messages in run_ranks(2, failures, [folder.parents[1] for folder in folders.values()]):
        for (name, (_, expected)), message in zip(spoils.items(), messages, strict=True):
            assert expected in message and str(folders[name]) in message, (name, message)


def test_reading_alone_names_what_it_cannot_read(copies):
    folder = copies("truncated")
    os.truncate(folder / "shard-00002-model-00001-of-00001.safetensors", 100)
    with pytest.raises(CheckpointError, match=f"{folder} cannot be read: .*header"):
        read_tensors(folder, {"embedding.weight": torch.empty(312, 3)}, alone=True)


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"model__width": 6}, "has shape [16, 3], this model needs [16, 6]: it is of another model"),
        ({"model__layers": 2}, "has no tensor blocks.1."),
        ({"vocab__tie": "untied"}, "has no tensor head.weight: it is of another model"),
        ({"vocab_size": 1000}, "embedding.weight has shape [312, 3], this model needs [1000, 3]"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(good, changes, expected):
    for (message,) in run_ranks(2, failures, [good], changes):
        assert expected in message


def test_a_checkpoint_with_more_tensors_is_of_another_model(tmp_path):
    run_ranks(1, save, tmp_path, {"vocab__tie": "untied"})
    for (message,) in run_ranks(2, failures, [tmp_path]):
        assert "has tensor head.weight, this model has not: it is of another model" in message


class Bomb:
    """Leaves a folder where it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_no_pickle_is_read(copies, tmp_path):
    marker = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(str(marker)))
    folder, replaced = copies("planted"), copies("replaced")
    for name in (".metadata", "__0_0.distcp", "model.pt", "optimizer.bin", "rng.pkl", "manifest.pickle"):
        (folder / name).write_bytes(bomb)
    for path in replaced.glob("*.safetensors"):
        path.write_bytes(bomb)
    edit_manifest(folder, rng=[{"cpu": bomb.hex()}] * 3)
    assert [right for right, _ in run_ranks(2, load, folder.parents[1])] == [True, True]
    for (message,) in run_ranks(2, failures, [replaced.parents[1]]):
        assert message != "loaded"
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb itself is a dud"


def save_on_a_full_disk(rank, world, run, leaving):
    """Saves with no more room than that: the error; then with room, whether the old and the new one load."""
    manager = build(run, world)
    fill(manager)
    filler = run / "filler"
    messages = []
    for room in leaving:
        if rank == 0:
            status = os.statvfs(run)
            filler.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
        torch.distributed.barrier()
        try:
            manager.save(TrainState(POSITION.step + 1))
            messages.append("saved")
        except CheckpointError as error:
            messages.append(str(error))
        torch.distributed.barrier()
        if rank == 0:
            assert [path.name for path in manager.folder.iterdir()] == [f"step-{POSITION.step:08d}"]
            filler.unlink()
        torch.distributed.barrier()
    assert manager.load(checkpoints(run)[-1]) == POSITION and is_filled(manager)
    manager.save(TrainState(POSITION.step + 1))
    return messages


def test_a_full_disk_leaves_the_last_checkpoint_good(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run], capture_output=True, timeout=10)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run_ranks(2, save, run)
        size = sum(path.stat().st_size for path in checkpoints(run)[-1].glob("*.safetensors"))
        for messages in run_ranks(2, save_on_a_full_disk, run, [0, 4096, size // 2, size]):
            for message in messages:
                assert "No space left on device" in message and f"cannot save {run}" in message
                assert message.endswith(f"the last good one is {checkpoints(run)[0]}")
        assert len(checkpoints(run)) == 2
    finally:
        subprocess.run(["umount", run], check=True, timeout=10)


@pytest.mark.parametrize("key", ["every", "keep"])
def test_a_wrong_setting_is_named(key):
    with pytest.raises(ValueError, match=rf"checkpoint\.{key}=-1 must not be negative"):
        CheckpointConfig(**{key: -1})
