"""DeepSpeed over all ranks. ZeRO stage 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also weights.

DeepSpeed gets only a body and an optimizer. Batches, clipping, schedule, precision and checkpoints are ours.
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
"""

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..config.ema import AVERAGE
from ..config.engine import DeepSpeedConfig
from ..config.optim import OptimConfig
from ..mesh import Mesh, name_rank
from ..optim import body_factors, body_optimizer, saved_name
from ..vocab import summed
from ..vocab.shard import RowShard
from .activations import checkpoint_activations
from .deepspeed_footprint import LARGEST_BUCKET, DeepSpeedFootprint
from .footprint import hidden_matrices
from .zero import MAIN, weights_at


class DeepSpeedEngine:
    """Engine with fp32 main weights, gradients and optimizer states.

    At stages 1 to 3 the module's own weights are in `compute_dtype`. Stage 0 has one set of weights, in fp32, and
    computes under autocast.
    """

    footprint = DeepSpeedFootprint

    def __init__(
        self, config: DeepSpeedConfig, optim: OptimConfig, compute_dtype: torch.dtype, seed: int, averaged: bool = False
    ) -> None:
        self.config, self.optim, self.compute_dtype, self.seed = config, optim, compute_dtype, seed
        self.averaged = averaged  # keep a running average of the weights

    def wrap(self, body: nn.Module, mesh: Mesh) -> Callable[..., Tensor]:
        name_rank(mesh.device)
        deepspeed = _deepspeed()
        if mesh.rank == 0:
            for lock in killed_builds():
                print(f"stale build lock {lock}: harmless here, but DeepSpeed's builds would wait for it; delete it")
        self.body, self.mesh = body, mesh
        self.shapes = {name: parameter.shape for name, parameter in body.named_parameters()}
        self.hidden, optimizer = hidden_matrices(body), body_optimizer(self.optim)
        factors = body_factors(self.optim, body, self.hidden, optimizer.whole_matrices)
        # stage 3 hides the shapes later
        initial = {name: self._initial(body, name, factors[name].initial) for name in self.shapes}
        low_precision = self.compute_dtype != torch.float32
        if self.config.zero_stage == 0 and low_precision:
            autocast = torch.autocast(mesh.device.type, self.compute_dtype)
            body.forward = autocast(body.forward)
        elif low_precision:
            body.to(self.compute_dtype)
        body.to_empty(device=mesh.device)
        self.parameters = dict(body.named_parameters())
        for parameter in self.parameters.values():
            parameter.detach().zero_()
        blocks: list[nn.Module] = list(body.blocks)  # type: ignore[arg-type]
        checkpoint_activations(blocks, self.config.activation_checkpointing)
        for block in blocks:  # stage 3 gathers whole blocks: a recomputed part would free its own weights
            deepspeed.utils.set_z3_leaf_module(block, True)
        matrices = [self.parameters[name] for name in self.hidden]
        own = {self.parameters[name]: factors[name] for name in self.parameters}
        self.optimizer = optimizer.build(self.parameters.values(), self.optim, self.optim.body, matrices, own)
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use
            self.engine, *_ = deepspeed.initialize(
                model=body,
                optimizer=self.optimizer.stepper,
                config=deepspeed_json(self.config, low_precision and self.config.zero_stage > 0, numbers),
                dist_init_required=False,  # the process group exists; otherwise DeepSpeed would look for MPI
            )
        self.weights = weights_at(self.config.zero_stage, low_precision)(self.engine.optimizer, self.optimizer, mesh)
        known = {id(self.parameters[name]): (self.shapes[name], stacked) for name, stacked in self.hidden.items()}
        group = mesh.flat.get_group() if mesh.world > 1 else None
        self.optimizer.place(self.weights.units(known), group, self.compute_dtype)
        self.optimizer.averaged = self.averaged
        self.optimizer.load(0, self.weights.stepped())
        self.weights.link_states()
        for name, values in initial.items():  # DeepSpeed made its main weights from rounded ones
            self.weights.write(self.parameters[name], values.full_tensor(), MAIN)
        return summed(self.engine, mesh.flat.get_group())  # undoes DeepSpeed's averaging of gradients over ranks

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        self.engine.backward(loss)

    def grad_norm(self) -> Tensor:
        """Norm of the body's gradient. One all-reduce of one number; bit-identical on all ranks."""
        return self.weights.grad_norm()

    def step(self, lr: float, clip: float, momentum: float | None = None) -> None:
        self.optimizer.set_lr(lr, momentum)
        self.weights.clip(clip)
        self.engine.step()

    def discard(self) -> None:
        """Lets DeepSpeed step with an optimizer that does nothing: it then frees gradients and buffers of every stage,
        and writes the rounded weights again, from main weights that have not changed.
        """
        stepper = self.optimizer.stepper
        stepper.step = lambda *_: None  # type: ignore[assignment, method-assign]  # hides the method
        try:
            self.engine.step()
        finally:
            del stepper.step

    def state(self) -> dict[str, DTensor]:
        """Copies of this rank's rows, sharded as under FSDP2. Gathers one parameter at a time and keeps a slice."""
        return {
            saved_name(name, kind): self._slice(name, self.weights.read(parameter, kind))
            for name, parameter in self.parameters.items()
            for kind in self._kinds(name)
        }

    def load(self, state: dict[str, DTensor], step: int) -> None:
        """Restores from `state`. Gathers one parameter at a time and keeps this rank's part."""
        for name, parameter in self.parameters.items():
            for kind in self._kinds(name):
                self.weights.write(parameter, state[saved_name(name, kind)].full_tensor(), kind)
        self.optimizer.load(step, self.weights.stepped())

    def average(self, share: float) -> None:
        self.optimizer.average(share, self.weights.stepped())

    def swap_averages(self) -> None:
        """Gathers one parameter at a time from stage 1 on, for the weights that the forward uses."""
        self.optimizer.swap_averages(self.weights.stepped())
        for parameter in self.parameters.values():
            self.weights.refresh(parameter)

    def averages(self) -> dict[str, DTensor]:
        """Copies, as in `state`."""
        return {name: self._slice(name, self.weights.read(p, AVERAGE)) for name, p in self.parameters.items()}

    def load_averages(self, state: dict[str, DTensor]) -> None:
        for name, parameter in self.parameters.items():
            self.weights.write(parameter, state[name].full_tensor(), AVERAGE)

    def _kinds(self, name: str) -> tuple[str, ...]:
        return MAIN, *self.optimizer.state_names(self.shapes[name], name in self.hidden)

    def _initial(self, body: nn.Module, name: str, factor: float) -> DTensor:
        rows = self._rows(name)
        values = body.initial_rows(name, self.seed, rows.start, rows.stop)  # type: ignore[operator]
        return self._dtensor(name, values.to(self.mesh.device) * factor)

    def _slice(self, name: str, whole: Tensor) -> DTensor:
        rows = self._rows(name)
        return self._dtensor(name, whole[rows.start : rows.stop].clone())

    def _rows(self, name: str) -> RowShard:
        return RowShard(self.mesh.rank, self.mesh.world, self.shapes[name][0])

    def _dtensor(self, name: str, rows: Tensor) -> DTensor:
        shape = self.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh.flat, [Shard(0)], run_check=False, shape=shape, stride=stride)


def deepspeed_json(config: DeepSpeedConfig, low_precision: bool, numbers: int) -> dict[str, Any]:
    """Configuration of DeepSpeed. numbers: number of the body's parameters."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(numbers, LARGEST_BUCKET),
        # Stage 3's own F.linear frees weights after forward, and adds the bias in place to a product that may be kept.
        "memory_efficient_linear": config.activation_checkpointing != "selective",
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "timers": {"throughput": {"enabled": False}},  # the timer would synchronise with the GPU at each step
        **config.extra,
        "train_micro_batch_size_per_gpu": 1,  # required, but without effect: DeepSpeed does not see the batch
        "gradient_accumulation_steps": 1,  # `backward` sets the boundary itself
        "gradient_clipping": 0.0,
        "bf16": {"enabled": low_precision, "check_grad_overflow": False},  # the trainer checks the norm
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**zero, **config.extra.get("zero_optimization", {})},
    }


def check_extra(config: DeepSpeedConfig) -> None:
    """Raises ValueError if `extra` is invalid, or if DeepSpeed could wait for the lock of a killed build.

    DeepSpeed compiles some operations at first use. Only keys in `extra` can require one.
    """
    if not config.extra:
        return
    locks = killed_builds()
    if locks:
        raise ValueError(
            f"{locks[0]} exists: a build of that operation was killed, and DeepSpeed would wait for its end."
            " Delete the file if no other job is building now, or leave engine.extra empty"
        )
    zero = deepspeed_json(config, low_precision=False, numbers=1)["zero_optimization"]
    try:
        _deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        wrong = error.errors()[0]  # type: ignore[attr-defined]  # pydantic's
        key = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"engine.extra.zero_optimization.{key}: {wrong['msg']}") from error


def _deepspeed() -> Any:
    """Imports DeepSpeed, with warnings off and without the operation that it would compile on a CPU."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})  # used only to find its shared-memory all-reduce
    return deepspeed


def killed_builds() -> list[Path]:
    """Locks in the folder where torch compiles extensions for this Python: of running or killed builds."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("", verbose=False))
    return sorted(folder.glob("*/lock"))
