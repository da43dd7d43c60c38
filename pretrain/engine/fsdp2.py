"""FSDP2: `torch.distributed.fsdp.fully_shard`, one parameter group per block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..config.ema import AVERAGE
from ..config.engine import FSDP2Config
from ..config.optim import OptimConfig
from ..mesh import Mesh
from ..optim import Piece, apply_clip, body_factors, body_optimizer, global_norm, local
from ..vocab.shard import RowShard
from .activations import checkpoint_activations
from .footprint import hidden_matrices
from .fsdp2_footprint import FSDP2Footprint, row_cut


class FSDP2Engine:
    """Engine with fp32 shards of main weights, gradients and optimizer states. Matmuls run in `compute_dtype`."""

    footprint = FSDP2Footprint

    def __init__(
        self, config: FSDP2Config, optim: OptimConfig, compute_dtype: torch.dtype, seed: int, averaged: bool = False
    ) -> None:
        self.config, self.optim, self.compute_dtype, self.seed = config, optim, compute_dtype, seed
        self.averaged = averaged  # keep a running average of the weights

    def wrap(self, body: nn.Module, mesh: Mesh) -> Callable[..., Tensor]:
        blocks: list[nn.Module] = list(body.blocks)  # type: ignore[arg-type]
        checkpoint_activations(blocks, self.config.activation_checkpointing)
        if self.config.compile:
            for block in blocks:
                block.forward = torch.compile(block.forward)
        accurate = torch.promote_types(self.compute_dtype, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=accurate)
        offload = self.config.offload == "cpu"
        body_mesh, rank, ranks = mesh.body(replicated=self.config.hsdp)
        for module in (*blocks, body):
            fully_shard(
                module,
                mesh=body_mesh,
                mp_policy=policy,
                offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
                reshard_after_forward=self.config.reshard_after_forward,
            )
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo does not support pre-multiplied sums
        body.to_empty(device="cpu" if offload else mesh.device)
        # Saved here because the module has other parameters while its weights are gathered.
        self.parameters: dict[str, DTensor] = dict(body.named_parameters())  # type: ignore[arg-type]
        hidden, optimizer = hidden_matrices(body), body_optimizer(self.optim)
        factors = body_factors(self.optim, body, hidden, optimizer.whole_matrices)
        for name, parameter in self.parameters.items():
            rows = RowShard(rank, ranks, parameter.shape[0])  # the same split as FSDP2's
            values = body.initial_rows(name, self.seed, rows.start, rows.stop)  # type: ignore[operator]
            local(parameter.detach()).copy_(values * factors[name].initial)
        self.body, self.mesh = body, mesh
        self.optimizer = optimizer.build(
            self.parameters.values(),  # type: ignore[arg-type]
            self.optim,
            self.optim.body,
            [self.parameters[name] for name in hidden],  # type: ignore[misc]
            {self.parameters[name]: own for name, own in factors.items()},  # type: ignore[misc]
        )
        pieces = [self._piece(name, stacked, ranks) for name, stacked in hidden.items()]
        group = mesh.vocab_group if self.config.hsdp else mesh.flat.get_group()
        self.optimizer.place([pieces], group if ranks > 1 else None, self.compute_dtype)
        self.optimizer.averaged = self.averaged
        self.optimizer.load(step=0)
        return body

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.body.set_is_last_backward(last_micro_batch)  # type: ignore[operator]
        self.body.set_requires_all_reduce(last_micro_batch)  # type: ignore[operator]  # over replicas, once per step
        loss.backward()

    def grad_norm(self) -> Tensor:
        """Norm of the body's gradient; replicas count once. Equal bits on all ranks. One all-reduce of one number."""
        counts = not self.config.hsdp or self.mesh.first_replica
        return global_norm(self._local_gradients() if counts else [], self.mesh)

    def step(self, lr: float, clip: float, momentum: float | None = None) -> None:
        apply_clip(self._local_gradients(), clip)
        self.optimizer.step(lr, momentum)

    def discard(self) -> None:
        self.optimizer.discard()

    def state(self) -> dict[str, DTensor]:
        """The shards themselves, not copies: filling them in place loads them."""
        state: dict[str, DTensor] = {}
        for name, parameter in self.parameters.items():
            state |= self.optimizer.tensors(name, parameter)  # type: ignore[arg-type]
        return state

    def load(self, state: dict[str, DTensor], step: int) -> None:
        self.optimizer.load(step)

    def average(self, share: float) -> None:
        self.optimizer.average(share)

    def swap_averages(self) -> None:
        """Local: the next forward gathers the shards again."""
        self.optimizer.swap_averages()
        for module in self.body.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation can leave weights gathered

    def averages(self) -> dict[str, DTensor]:
        """The shards themselves, as in `state`."""
        return {name: self.optimizer.state_of(p)[AVERAGE] for name, p in self.parameters.items()}  # type: ignore[misc]

    def load_averages(self, state: dict[str, DTensor]) -> None:
        """Does nothing: `averages` were filled in place."""

    def _piece(self, name: str, stacked: tuple[int, ...], ranks: int) -> Piece:
        parameter = self.parameters[name]
        return Piece(parameter.shape, stacked, row_cut(parameter.shape, ranks), parameter, 0)

    def _local_gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]
