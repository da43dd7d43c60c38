"""Checkpoints of real ranks load at any world size, or raise an error that names the fault."""

import hashlib
import os
import pickle
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.build import build_model
from pretrain.checkpoint import CheckpointError, DamagedCheckpoint, checkpoints, read_manifest
from pretrain.checkpoint import manager as manager_module
from pretrain.checkpoint.folder import write_manifest
from pretrain.checkpoint.manager import CheckpointManager, read_tensors
from pretrain.checkpoint.state import ModelState, TrainState
from pretrain.commands import checkpoint as program
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.mesh import Mesh
from pretrain.vocab.shard import stable_seed
from tests.in_process import in_process
from tests.pretrain.tiny import tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

POSITION = TrainState(step=3, tokens=77, samples={"a": 5, "b": 6}, val_loss=1.5)
SMALL = {"model__layers": 1, "model__width": 3, "model__heads": 1}  # width 3: on four ranks, one has no part of a bias


def build(run: Path, world: int, vocab_size: int = 307, **changes) -> CheckpointManager:
    """Builds one rank of a new run, ready to save or load."""
    config = tiny_config(run, run, **SMALL | changes)
    axis = world if config.vocab.parallel == "auto" else int(config.vocab.parallel)
    mesh = Mesh.of(axis, torch.device("cpu"))
    engine, model, vocab_optimizer = build_model(config, mesh, vocab_size)
    state = ModelState(engine, model.vocab, vocab_optimizer, mesh)
    return CheckpointManager(run, state, mesh, config.checkpoint, seed=0, about={"vocab_size": vocab_size})


def whole(name: str, tensor: DTensor) -> torch.Tensor:
    """Whole tensor that the tests save under this name."""
    generator = torch.Generator().manual_seed(stable_seed(name))
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def fill(manager: CheckpointManager) -> None:
    for name, tensor in manager.model.tensors().items():
        mine = distribute_tensor(whole(name, tensor), tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(mine.to_local())


def is_filled(manager: CheckpointManager) -> bool:
    return all(torch.equal(t.full_tensor(), whole(name, t)) for name, t in manager.model.tensors().items())


def save(rank, world, run, changes=None, steps=(POSITION.step,)):
    """Saves. Returns the next random numbers of this rank."""
    manager = build(run, world, **changes or {})
    fill(manager)
    torch.manual_seed(100 + rank)
    for step in steps:
        manager.save(replace(POSITION, step=step))
    manager.wait()
    return torch.rand(4)


def load(rank, world, run, changes=None):
    """Loads the newest. Returns True if all values are as saved, and the next random numbers of this rank."""
    manager = build(run, world, **changes or {})
    torch.manual_seed(0)
    state, _ = manager.restore(no_warning)
    steps = {
        float(s["step"])
        for optimizer in (manager.model.engine.optimizer, manager.model.vocab_optimizer.optimizer)
        for s in optimizer.stepper.state.values()
    }
    return is_filled(manager) and state == POSITION and steps == {POSITION.step}, torch.rand(4)


def no_warning(message):
    raise AssertionError(message)


def failures(rank, world, runs, changes=None):
    """Restores each run. Returns class and message of the error."""
    messages = []
    for run in runs:
        try:
            build(run, world, **changes or {}).restore(no_warning)
            messages.append((None, "loaded"))
        except CheckpointError as error:
            messages.append((type(error), str(error)))
    return messages


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run with one checkpoint, saved by two ranks."""
    run = tmp_path_factory.mktemp("good")
    run_ranks(2, save, run)
    return run


@pytest.fixture
def copies(good, tmp_path):
    """Copies the good run: `copies(name)` returns the checkpoint's folder in a new copy."""

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
def test_checkpoint_loads_at_other_world_sizes(tmp_path, world, parallel, changes):
    run_ranks(world, save, tmp_path, {**changes, "vocab__parallel": parallel})
    for loaders, axis in [(1, "auto"), (2, "1"), (3, "auto"), (4, "auto")]:
        for right, _ in run_ranks(loaders, load, tmp_path, {**changes, "vocab__parallel": axis}):
            assert right, f"{loaders} ranks with vocab.parallel={axis} loaded other values"


def test_random_generators_are_restored(tmp_path):
    saved = run_ranks(2, save, tmp_path)
    loaded = [numbers for _, numbers in run_ranks(2, load, tmp_path)]
    assert all(map(torch.equal, saved, loaded)) and not torch.equal(*saved)
    others = [[numbers for _, numbers in run_ranks(3, load, tmp_path)] for _ in range(2)]
    assert torch.equal(
        torch.stack(others[0]), torch.stack(others[1])
    )  # with another world size: new numbers, but always the same
    assert len({tuple(numbers.tolist()) for numbers in others[0]}) == 3


@pytest.mark.parametrize(
    "rules,left",
    [
        ({"keep": 2}, [3, 4]),
        ({"keep": 1}, [4]),
        ({"keep": 0}, [1, 2, 3, 4]),
        ({"keep": 1, "keep_every": 2}, [2, 4]),
        ({"keep": 1, "keep_every": 3}, [3, 4]),
    ],
)
def test_rules_keep_expected_checkpoints(tmp_path, rules, left):
    run_ranks(1, save, tmp_path, {f"checkpoint__{key}": value for key, value in rules.items()}, (1, 2, 3, 4))
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in left]
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_leftovers_are_ignored_and_removed(good, copies):
    folder = copies("run")
    run = folder.parents[1]
    folder.with_name(".tmp-step-00000009").mkdir()
    shutil.copy(folder / "manifest.json", folder.with_name(".tmp-step-00000009"))
    unfinished = folder.with_name("step-00000008")
    unfinished.mkdir()
    (unfinished / "shard-00007-model-00001-of-00001.safetensors").write_bytes(b"half")
    assert checkpoints(run) == [folder, unfinished]
    run_ranks(2, save, run, {}, (8,))
    names = ["damaged-step-00000008", "step-00000003", "step-00000008"]
    assert sorted(path.name for path in folder.parent.iterdir()) == names
    assert not (unfinished / "shard-00007-model-00001-of-00001.safetensors").exists()


def test_saved_step_is_not_saved_again(good, copies):
    folder = copies("run")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_ranks(2, save, folder.parents[1])
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def edit_manifest(folder: Path, **changes) -> None:
    """Edits a manifest and updates its hash."""
    manifest = read_manifest(folder) | changes
    write_manifest(folder, {key: value for key, value in manifest.items() if value is not None})


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


SECOND = "shard-00002-model-00001-of-00001.safetensors"
SPOILS = {
    "flipped": (lambda folder: flip(folder / SECOND, -1), f"{SECOND} is damaged"),
    "header": (lambda folder: flip(folder / SECOND, 9), f"{SECOND} is damaged"),
    "truncated": (lambda folder: os.truncate(folder / SECOND, 100), f"{SECOND}: 100 bytes, but the manifest says"),
    "missing": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    "stray": (
        lambda folder: shutil.copy(folder / SECOND, folder / "x.safetensors"),
        "x.safetensors is not in the manifest",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "no json": (lambda folder: (folder / "manifest.json").write_text("{"), "is not a checkpoint's manifest"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a checkpoint's manifest"),
    "another step": (
        lambda folder: edit_text(folder, '"step": 3', '"step": 4'),
        "manifest.json is damaged: its sha256",
    ),
    "no files": (lambda folder: edit_manifest(folder, files=None), "manifest: it has no files"),
}


def edit_text(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_run_with_only_damaged_checkpoints_does_not_start(copies):
    """Names the fault on every rank. Nothing is renamed, so the next start reports it again."""
    folders = {name: copies(name) for name in SPOILS}
    for name, (spoil, _) in SPOILS.items():
        spoil(folders[name])
    runs = [folder.parents[1] for folder in folders.values()]
    for messages in run_ranks(2, failures, runs) + run_ranks(1, failures, runs):
        for (name, (_, expected)), (kind, message) in zip(SPOILS.items(), messages, strict=True):
            assert kind is DamagedCheckpoint, (name, message)
            assert expected in message and str(folders[name]) in message, (name, message)
            assert "is intact, and a run never restarts from step 0" in message
    assert all(folder.is_dir() for folder in folders.values())


def test_other_format_version_raises(copies):
    folder = copies("future")
    edit_manifest(folder, format_version=9)
    for ((kind, message),) in run_ranks(2, failures, [folder.parents[1]]):
        assert kind is CheckpointError and "format version 9, but this program reads 2" in message


def fall_back(rank, world, runs):
    """Restores each run. Returns True if it is at POSITION's step, and the warnings."""
    results = []
    for run in runs:
        warnings: list[str] = []
        manager = build(run, world)
        state, found = manager.restore(warnings.append)
        right = is_filled(manager) and state == POSITION and found == run / "checkpoints" / "step-00000003"
        manager.save(replace(POSITION, step=8))
        manager.wait()
        results.append((right, warnings))
    return results


def test_damaged_checkpoint_is_set_aside_for_older_one(copies):
    """Names both of two damaged checkpoints. Their steps can be saved again."""
    runs = {}
    for name, (spoil, _) in SPOILS.items():
        if name == "another step":
            continue
        folder = copies(name)
        for step in (8, 9):
            newer = folder.with_name(f"step-{step:08d}")
            shutil.copytree(folder, newer)
            edit_manifest(newer, step=step)
            spoil(newer) if step == 8 else flip(newer / SECOND, 50)
        runs[name] = folder.parents[1]
    for rank, results in enumerate(run_ranks(2, fall_back, list(runs.values()))):
        for (name, run), (right, warnings) in zip(runs.items(), results, strict=True):
            assert right, name
            if rank == 0:
                newest, second = warnings
                assert "step-00000009" in newest and f"{SECOND} is damaged" in newest
                assert SPOILS[name][1] in second and f"resuming from {run}/checkpoints/step-00000003" in second
                assert second.endswith(f"is now {run}/checkpoints/damaged-step-00000008")
            else:
                assert not warnings
    for run in runs.values():
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
            "damaged-step-00000008",
            "damaged-step-00000009",
            "step-00000003",
            "step-00000008",
        ]


def test_checkpoint_set_aside_prevents_new_start(copies):
    folder = copies("run")
    folder.rename(folder.with_name("damaged-step-00000003"))
    for ((kind, message),) in run_ranks(2, failures, [folder.parents[1]]):
        assert kind is DamagedCheckpoint and "damaged-step-00000003 was set aside" in message


def test_unreadable_tensor_is_named(copies):
    folder = copies("truncated")
    os.truncate(folder / "shard-00002-model-00001-of-00001.safetensors", 100)
    with pytest.raises(CheckpointError, match=f"{folder} cannot be read: .*header"):
        read_tensors(folder, {"embedding.weight": torch.empty(312, 3)}, alone=True)


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"model__width": 6}, "has shape [16, 3], this model needs [16, 6]: it belongs to another model"),
        ({"model__layers": 2}, "has no tensor blocks.1."),
        ({"vocab__tie": "untied"}, "has no tensor head.weight: it belongs to another model"),
        ({"vocab_size": 1000}, "embedding.weight has shape [312, 3], this model needs [1000, 3]"),
    ],
)
def test_checkpoint_of_other_model_raises(good, changes, expected):
    for ((kind, message),) in run_ranks(2, failures, [good], changes):
        assert kind is CheckpointError and expected in message


def test_checkpoint_with_extra_tensor_raises(tmp_path):
    run_ranks(1, save, tmp_path, {"vocab__tie": "untied"})
    for ((kind, message),) in run_ranks(2, failures, [tmp_path]):
        assert kind is CheckpointError and "has tensor head.weight, this model does not: it belongs" in message


def test_newest_checkpoint_of_other_model_prevents_fallback(copies, tmp_path):
    folder = copies("run")
    run_ranks(2, save, tmp_path / "other", {"model__width": 6})
    shutil.copytree(tmp_path / "other/checkpoints/step-00000003", folder.with_name("step-00000008"))
    for ((kind, message),) in run_ranks(2, failures, [folder.parents[1]]):
        assert kind is CheckpointError and "step-00000008" in message and "it belongs to another model" in message
    assert len(checkpoints(folder.parents[1])) == 2


class Bomb:
    """Creates a folder when it is unpickled."""

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
    for ((kind, _),) in run_ranks(2, failures, [replaced.parents[1]]):
        assert kind is DamagedCheckpoint
    facts = read_manifest(replaced)["files"]
    for path in replaced.glob("*.safetensors"):  # with the right size and hash
        facts[path.name] = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
    edit_manifest(replaced, files=facts)
    for ((_, message),) in run_ranks(2, failures, [replaced.parents[1]]):
        assert "cannot be read" in message
    for command in ("list", "verify"):
        for run in (folder.parents[1], replaced.parents[1]):
            assert in_process(program.main, command, f"run={run}").returncode == 0
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "unpickling must create the folder"


def save_on_full_disk(rank, world, run, leaving):
    """Saves on a full disk, then with enough space. Returns the error, and True if both checkpoints load."""
    manager = build(run, world, checkpoint__asynchronous=True)
    fill(manager)
    filler = run / "filler"
    messages = []
    for room in leaving:
        if rank == 0:
            status = os.statvfs(run)
            filler.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
        torch.distributed.barrier()
        manager.save(TrainState(POSITION.step + 1))
        deadline = time.monotonic() + 30
        while not manager.failed() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert manager.failed() and is_filled(manager)
        try:
            manager.save(TrainState(POSITION.step + 2))  # waits for the first save and raises its error
            messages.append("saved")
        except CheckpointError as error:
            messages.append(str(error))
        assert not manager.failed(), "the error must be raised once"
        torch.distributed.barrier()
        if rank == 0:
            assert [path.name for path in manager.folder.iterdir()] == [f"step-{POSITION.step:08d}"]
            filler.unlink()
        torch.distributed.barrier()
    assert manager.load(checkpoints(run)[-1]) == POSITION and is_filled(manager)
    manager.save(TrainState(POSITION.step + 1))
    manager.wait()
    return messages


def test_full_disk_keeps_last_checkpoint(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run], capture_output=True, timeout=10)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run_ranks(2, save, run)
        size = sum(path.stat().st_size for path in checkpoints(run)[-1].glob("*.safetensors"))
        for messages in run_ranks(2, save_on_full_disk, run, [0, 4096, size // 2, size]):
            for message in messages:
                assert "No space left on device" in message and f"cannot save {run}" in message
                assert message.endswith(f"the last good checkpoint is {checkpoints(run)[0]}")
        assert len(checkpoints(run)) == 2
    finally:
        subprocess.run(["umount", run], check=True, timeout=10)


@pytest.mark.parametrize("world,parallel", [(1, "auto"), (2, "auto"), (4, "2")])
def test_asynchronous_save_equals_synchronous_save(tmp_path, world, parallel):
    facts = []
    for asynchronous in (False, True):
        run = tmp_path / str(asynchronous)
        run_ranks(world, save, run, {"checkpoint__asynchronous": asynchronous, "vocab__parallel": parallel})
        manifest = read_manifest(checkpoints(run)[-1])
        facts.append({key: manifest[key] for key in manifest.keys() - {"date"}})
    assert facts[0] == facts[1] and len(facts[0]["files"]) == world


def after(seconds, work):
    """Runs `work` after a delay."""

    def late():
        time.sleep(seconds)
        return work()

    return late


def save_during_training(rank, world, run):
    """Delays the writer in its copy, then in its write while the tensors change; then saves again."""
    manager = build(run, world)
    fill(manager)
    held = threading.Event()
    write = manager_module.write_slices

    def slowly(*arguments):
        held.wait(30)
        return write(*arguments)

    manager_module.write_slices = slowly
    manager.model.digests = after(0.3, manager.model.digests)
    manager.save(POSITION)
    manager.wait_for_copy()
    assert manager.model.tensors() and not checkpoints(run)
    for tensor in manager.model.tensors().values():
        tensor.to_local().add_(1)
    torch.distributed.barrier()  # training's collectives continue meanwhile
    threading.Timer(0.3, held.set).start()
    start = time.monotonic()
    manager.save(replace(POSITION, step=POSITION.step + 1))
    waited = time.monotonic() - start
    seen = [folder.name for folder in checkpoints(run)]
    manager.wait()
    return waited, seen


def test_training_continues_during_save_and_second_save_waits(tmp_path):
    for waited, seen in run_ranks(2, save_during_training, tmp_path):
        assert waited > 0.2 and seen == ["step-00000003"]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    shutil.rmtree(checkpoints(tmp_path)[-1])
    assert all(right for right, _ in run_ranks(2, load, tmp_path)), "saved values must equal the values at the save"


def train_with_late_copies(rank, world, config):
    """Trains with copies slower than forward and backward: the next update must wait."""
    digests = ModelState.digests
    ModelState.digests = lambda state: after(0.2, lambda: digests(state))()
    train_rank(rank, world, config)


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_update_waits_for_copy_of_save(tmp_path, engine):
    data = write_tokens(tmp_path / "tokens")
    settings = {"engine": {"name": engine}, "train__steps": 4, "checkpoint__every": 1}
    late, straight = (tiny_config(data, tmp_path / name, **settings) for name in ("late", "straight"))
    straight.checkpoint.asynchronous = False
    run_ranks(2, train_with_late_copies, late)
    run_ranks(2, train_rank, straight)
    files = [
        {folder.name: read_manifest(folder)["files"] for folder in checkpoints(config.run_dir)}
        for config in (late, straight)
    ]
    assert files[0] == files[1] and len(files[0]) == 4


def copied(rank, world, run, what):
    """Returns the messages of the shard checks after one rank's rows were overwritten."""
    manager = build(run, world, vocab__parallel="2" if world == 4 else "auto", vocab__tie="untied")
    manager.check_shards()
    rows = manager.model.vocab.weight.data
    if what == "broadcast":  # like plain DeepSpeed
        torch.distributed.broadcast(rows, 0)
    elif rank == 3:
        rows[1, 1] += 1e-7
    messages = []
    for check in (lambda: (manager.save(POSITION), manager.wait()), lambda: manager.restore(no_warning)):
        try:
            check()
            messages.append("fine")
        except CheckpointError as error:
            messages.append(str(error))
    assert not checkpoints(run)
    return messages


@pytest.mark.parametrize(
    "world,what,expected",
    [
        (2, "broadcast", "embedding.weight: ranks 0 and 1 own different rows, but hold the same values"),
        (4, "broadcast", "embedding.weight: ranks 0 and 1 own different rows, but hold the same values"),
        (4, "drift", "embedding.weight: ranks 1 and 3 hold the same rows, but with different values"),
    ],
)
def test_equal_shards_and_different_replicas_raise(tmp_path, world, what, expected):
    for messages in run_ranks(world, copied, tmp_path, what):
        assert all(expected in message for message in messages), messages


def test_padding_shards_may_be_equal(tmp_path):
    settings = {"vocab_size": 3, "vocab__multiple": 8, "vocab__tie": "untied"}
    run_ranks(4, check_shards, tmp_path, settings)


def check_shards(rank, world, run, changes):
    build(run, world, **changes).check_shards()


@pytest.mark.parametrize("key", ["every", "keep", "keep_every", "keep_best", "reserve_seconds"])
def test_invalid_setting_raises(key):
    with pytest.raises(ValueError, match=rf"checkpoint\.{key}=-1 must not be negative"):
        CheckpointConfig(**{key: -1})


def test_best_checkpoints_are_kept():
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: float("nan"), 7: 9.0}
    assert CheckpointConfig(keep=1).kept(losses) == {7}
    assert CheckpointConfig(keep=1, keep_best=1).kept(losses) == {2, 7}
    assert CheckpointConfig(keep=2, keep_best=3, keep_every=3).kept(losses) == {2, 3, 4, 5, 6, 7}
    assert CheckpointConfig(keep=1, keep_best=9).kept(losses) == {1, 2, 4, 5, 7}
    assert CheckpointConfig(keep=0, keep_best=1).kept(losses) == set(losses)
