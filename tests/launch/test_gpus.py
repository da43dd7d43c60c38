"""The launcher imports torch to count GPUs only if the system may have one."""

from pathlib import Path

import pytest

from launch import local


@pytest.fixture
def bus(tmp_path, monkeypatch) -> Path:
    """Fakes a PCI bus without devices, on a system without device files."""
    monkeypatch.setattr(local, "GPU_DEVICES", (str(tmp_path / "dev" / "nvidia*"),))
    monkeypatch.setattr(local, "PCI_DEVICES", str(tmp_path / "bus" / "*"))
    return tmp_path / "bus"


def plug_in(device: Path, vendor: str, kind: str) -> None:
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


def test_empty_system_has_no_gpu(bus):
    assert not local.has_gpu() and local.gpus() == 0 and local.device_type() == "cpu"


@pytest.mark.parametrize(
    "vendor,kind,gpu",
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x1002", "0x038000", True),
        ("0x10de", "0x040300", False),
        ("0x8086", "0x030000", False),
        ("0x1d0f", "0x020000", False),
    ],
    ids=["3d", "vga", "amd", "its audio", "another maker", "network"],
)
def test_a_card_is_found_on_the_bus_before_it_has_device_files(bus, vendor, kind, gpu):
    plug_in(bus / "0000:00:1e.0", vendor, kind)
    assert local.has_gpu() is gpu


def test_device_files_are_enough(bus):
    (bus.parent / "dev").mkdir()
    (bus.parent / "dev" / "nvidia0").touch()
    assert local.has_gpu()


def test_unreadable_device_is_ignored(bus):
    (bus / "0000:00:1e.0").mkdir(parents=True)
    assert not local.has_gpu()
