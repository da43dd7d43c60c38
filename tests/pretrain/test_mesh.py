"""Choice of a rank's device, without a GPU."""

import os

import pytest
import torch

from pretrain.mesh import name_rank, ranks


def device_of(local_rank: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    for key, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(key, value)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, device_id, **kwargs: taken.append(device_id)
    )
    monkeypatch.setattr("pretrain.mesh.meet", lambda *args: (None, 3, 8))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with ranks() as device:
        assert taken == [device, device]
    return device


@pytest.mark.parametrize("local_rank,gpus,index", [(0, 8, 0), (3, 8, 3), (3, 1, 0), (0, 1, 0)])
def test_rank_uses_its_gpu_or_only_visible_one(monkeypatch, local_rank, gpus, index):
    device = device_of(local_rank, gpus, monkeypatch)
    assert device == torch.device("cuda", index)
    name_rank(device)  # DeepSpeed reads it
    assert os.environ["LOCAL_RANK"] == str(index)


def test_fewer_gpus_than_ranks_raises(monkeypatch):
    with pytest.raises(ValueError, match=r"^LOCAL_RANK=3 must be below 2, the GPUs that this rank sees: "):
        device_of(3, 2, monkeypatch)
