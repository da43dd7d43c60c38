"""Settings that an engine cannot support raise an error with the rule."""

import subprocess
import sys

import pytest
from torch.utils import cpp_extension

from pretrain.config.engine import OWNED_KEYS, DeepSpeedConfig, FSDP2Config
from pretrain.engine.deepspeed import check_extra, deepspeed_json, killed_builds

BAD = [
    (
        FSDP2Config,
        {"activation_checkpointing": "all"},
        "engine.activation_checkpointing=all must be one of",
    ),
    (FSDP2Config, {"offload": "nvme"}, "engine.offload=nvme must be none or cpu"),
    (DeepSpeedConfig, {"zero_stage": 4}, "engine.zero_stage=4 must be 0, 1, 2 or 3"),
    (DeepSpeedConfig, {"offload": "cpu"}, "engine.offload=cpu needs engine.zero_stage=2 or 3, not 1"),
    (DeepSpeedConfig, {"offload": "nvme", "zero_stage": 3}, "engine.offload=nvme must be none or cpu"),
    (DeepSpeedConfig, {"activation_checkpointing": "all"}, "engine.activation_checkpointing=all must be one of"),
    (DeepSpeedConfig, {"extra": {"zero_optimization": 3}}, "engine.extra.zero_optimization=3 must be a mapping"),
]


@pytest.mark.parametrize("config,settings,message", BAD)
def test_invalid_setting_raises(config, settings, message):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_deepspeed_key_raises(key):
    outer, _, inner = key.partition(".")
    with pytest.raises(ValueError, match=rf"engine\.extra\.{key} must not be set"):
        DeepSpeedConfig(extra={outer: {inner: 1} if inner else 1})


def test_other_deepspeed_keys_are_passed_on():
    config = DeepSpeedConfig(zero_stage=2, extra={"steps_per_print": 7, "zero_optimization": {"overlap_comm": True}})
    json = deepspeed_json(config, low_precision=True, numbers=1000)
    assert json["steps_per_print"] == 7 and json["gradient_clipping"] == 0
    assert json["zero_optimization"] == json["zero_optimization"] | {"stage": 2, "overlap_comm": True}


def test_unknown_deepspeed_key_raises():
    with pytest.raises(
        ValueError, match=r"^engine\.extra\.zero_optimization\.overlap: Extra inputs are not permitted$"
    ):
        check_extra(DeepSpeedConfig(extra={"zero_optimization": {"overlap": True}}))


def test_cpu_offload_requires_gpu():
    with pytest.raises(ValueError, match=r"engine\.offload=cpu must be none on a CPU"):
        FSDP2Config(offload="cpu").check_device("cpu")
    FSDP2Config(offload="cpu").check_device("cuda")


def test_stale_build_lock_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    asked = DeepSpeedConfig(extra={"steps_per_print": 7})
    check_extra(asked)
    build = tmp_path / "cpu_adam"
    build.mkdir()
    (build / "lock").touch()
    assert cpp_extension._get_build_directory("cpu_adam", verbose=False) == str(build)
    assert killed_builds() == [build / "lock"]
    with pytest.raises(ValueError, match=f"{build}/lock exists: a build of that operation was killed"):
        check_extra(asked)
    check_extra(DeepSpeedConfig())  # builds nothing


def test_deepspeed_is_imported_lazily():
    code = "import sys, pretrain.train; print('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
