"""Settings of the engine, which shards and steps the body: FSDP2 or DeepSpeed. Group engine; engine.name chooses."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

OWNED_KEYS = {  # keys of DeepSpeed's JSON, with the setting to use instead
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "managed_gradient_accumulation": "train.global_batch",
    "gradient_clipping": "optim.clip",
    "gradient_allreduce_op": "",
    "gradient_predivide_factor": "",
    "prescale_gradients": "",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "seq_parallel_communication_data_type": "train.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "checkpoint",
    "curriculum_learning": "data",
    "data_efficiency": "data",
    "weight_quantization": "",
    "compression_training": "",
    "pipeline": "",
    "hybrid_engine": "",
    "tensor_parallel": "",
    "expert_parallel": "",
    "sequence_parallel_size": "",
    "data_parallel_size": "",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "engine.offload",
    "zero_optimization.compute_grad_norm": "optim.clip",
    "zero_optimization.memory_efficient_linear": "engine.activation_checkpointing",
    "zero_optimization.zenflow": "",
    "zero_optimization.zero_hpz_partition_size": "",
}
ACTIVATION_CHECKPOINTING = ("none", "block", "selective")


@dataclass
class FSDP2Config:
    """`torch.distributed.fsdp.fully_shard` over all ranks."""

    reads_values: ClassVar[bool] = False  # a step can run on fake tensors

    name: str = "fsdp2"  # fsdp2 or deepspeed
    #: free a block's gathered weights after forward and gather them again in backward
    reshard_after_forward: bool = True
    #: shard over the vocab axis only and replicate over dp: all-gathers stay within a vocab group,
    #: and each group holds the whole body
    hsdp: bool = False
    offload: str = "none"  # cpu: keep and step main weights, gradients and optimizer states in host memory; none: off
    #: activations kept for backward; none: all of them; block: only the input of each block; selective: also the
    #: outputs of matmuls and attention
    activation_checkpointing: str = "none"
    compile: bool = False  # compile each block with torch.compile

    def __post_init__(self) -> None:
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"engine.offload={self.offload} must be none or cpu")
        check_kind(self.activation_checkpointing)

    @property
    def title(self) -> str:
        return "fsdp2 over vocab, replicated over dp" if self.hsdp else "fsdp2"

    def check_device(self, device_type: str) -> None:
        """Raises ValueError if the settings are not possible on this device."""
        if self.offload == "cpu" and device_type == "cpu":
            raise ValueError("engine.offload=cpu must be none on a CPU: there is no GPU memory to save")

    @property
    def can_offload(self) -> bool:
        """True if engine.offload=cpu is possible with the other settings."""
        return True

    def sharding_more(self) -> "list[tuple[str, FSDP2Config]]":
        """Engines that shard more than this one, each with the setting that chooses it."""
        found = []
        if self.hsdp:
            found.append(("engine.hsdp=false", replace(self, hsdp=False)))
        if not self.reshard_after_forward:
            found.append(("engine.reshard_after_forward=true", replace(self, reshard_after_forward=True)))
        return found

    def less_memory(self, world: int, replicas: int) -> list[str]:
        """Settings that lower the memory per rank, on `world` ranks; replicas: copies of the matrix."""
        less = ["engine.hsdp=false"] if self.hsdp and replicas > 1 else []
        return less + ["engine.reshard_after_forward=true"] * (not self.reshard_after_forward and world > 1)


@dataclass
class DeepSpeedConfig:
    """DeepSpeed's ZeRO over all ranks."""

    reads_values: ClassVar[bool] = True  # a step cannot run on fake tensors

    name: str = "deepspeed"  # fsdp2 or deepspeed
    zero_stage: int = 1  # shards 0: nothing, 1: optimizer states, 2: gradients as well, 3: weights as well
    #: cpu: keep and step main weights and optimizer states in host memory (stages 2 and 3); none: off
    offload: str = "none"
    #: activations kept for backward; none: all of them; block: only the input of each block; selective: also the
    #: outputs of matmuls and attention
    activation_checkpointing: str = "none"
    #: further keys of DeepSpeed's JSON, passed on unchanged; empty: none
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero_stage not in range(4):
            raise ValueError(f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"engine.offload={self.offload} must be none or cpu")
        if self.offload == "cpu" and self.zero_stage < 2:
            raise ValueError(f"engine.offload=cpu needs engine.zero_stage=2 or 3, not {self.zero_stage}")
        check_kind(self.activation_checkpointing)
        zero = self.extra.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"engine.extra.zero_optimization={zero} must be a mapping")
        for key in [*self.extra, *(f"zero_optimization.{key}" for key in zero)]:
            if key in OWNED_KEYS:
                instead = f"use {OWNED_KEYS[key]}" if OWNED_KEYS[key] else "it would change results or sharding"
                raise ValueError(f"engine.extra.{key} must not be set: {instead}")

    @property
    def title(self) -> str:
        return f"deepspeed ZeRO-{self.zero_stage}"

    @property
    def can_offload(self) -> bool:
        """True if engine.offload=cpu is possible with the other settings."""
        return self.zero_stage >= 2

    def sharding_more(self) -> "list[tuple[str, DeepSpeedConfig | FSDP2Config]]":
        """Engines that shard more than this one, each with the setting that chooses it.

        Leaves out FSDP2 if `extra` is set: FSDP2 does not have it.
        """
        found: list[tuple[str, DeepSpeedConfig | FSDP2Config]] = [
            (f"engine.zero_stage={stage}", replace(self, zero_stage=stage)) for stage in range(self.zero_stage + 1, 4)
        ]
        if not self.extra:
            fsdp2 = FSDP2Config(offload=self.offload, activation_checkpointing=self.activation_checkpointing)
            found.append(("engine=fsdp2", fsdp2))
        return found

    def less_memory(self, world: int, replicas: int) -> list[str]:
        """Settings that lower the memory per rank, on `world` ranks; `replicas` does not matter."""
        return ["engine.zero_stage=3"] if self.zero_stage < 3 and world > 1 else []


def check_kind(kind: str) -> None:
    """Raises ValueError if `kind` is not a kind of activation checkpointing."""
    if kind not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"engine.activation_checkpointing={kind} must be one of {', '.join(ACTIVATION_CHECKPOINTING)}")


ENGINES: dict[str, type] = {"fsdp2": FSDP2Config, "deepspeed": DeepSpeedConfig}
