"""Implementations of the head: hidden, rows, targets -> gradients of the mean loss. One builder per rival."""

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy

Step = Callable[[], tuple[Tensor, Tensor]]  # -> dX, dW


@dataclass(frozen=True)
class Problem:
    """Inputs of the head: hidden [N, D] and rows [V, D] of one dtype. A third of the targets is almost certain, as in
    a trained model.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor

    @classmethod
    def draw(cls, tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype = torch.bfloat16) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        weight_VD = torch.randn(vocab, width, generator=generator).mul_(0.02)
        targets_N = torch.randint(vocab, (tokens,), generator=generator)
        hidden_ND = torch.randn(tokens, width, generator=generator)
        sure = slice(0, tokens // 3)
        hidden_ND[sure] += 18 / (0.02**2 * width) * weight_VD[targets_N[sure]]
        return cls(hidden_ND.to(device, dtype), weight_VD.to(device, dtype), targets_N.to(device))

    @property
    def tokens(self) -> int:
        return len(self.targets_N)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_ND.detach().requires_grad_(), self.weight_VD.detach().requires_grad_()

    def truth(self) -> tuple[Tensor, Tensor]:
        """Computes dX and dW in float64, a few tokens at a time."""
        weight_VD = self.weight_VD.double()
        dhidden_ND = torch.empty_like(self.hidden_ND, dtype=torch.float64)
        dweight_VD = torch.zeros_like(weight_VD)
        for start in range(0, self.tokens, 256):
            part = slice(start, start + 256)
            hidden_mD = self.hidden_ND[part].double()
            dlogits_mV = (hidden_mD @ weight_VD.T).softmax(-1)
            dlogits_mV[torch.arange(len(hidden_mD)), self.targets_N[part]] -= 1
            dlogits_mV /= self.tokens
            dhidden_ND[part] = dlogits_mV @ weight_VD
            dweight_VD.addmm_(dlogits_mV.T, hidden_mD)
        return dhidden_ND, dweight_VD


def _gradients(problem: Problem, loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    hidden_ND, weight_VD = problem.leaves()
    loss_of(hidden_ND, weight_VD).backward()
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    return hidden_ND.grad, weight_VD.grad


def ours(problem: Problem, memory_mib: int | None = None) -> Step:
    vocab = len(problem.weight_VD)
    options = {} if memory_mib is None else {"memory_mib": memory_mib}

    def step() -> tuple[Tensor, Tensor]:
        hidden_ND = problem.hidden_ND.detach().requires_grad_()
        dweight_VD = torch.empty_like(problem.weight_VD, dtype=torch.float32)
        out = vocab_parallel_linear_cross_entropy(
            hidden_ND,
            problem.weight_VD,
            problem.targets_N,
            shard=VocabShard.of(0, 1, vocab, 1),
            scale=1 / problem.tokens,
            main_grad_vD=dweight_VD,
            main_grad_is_new=True,
            metrics=False,
            **options,
        )
        out.loss.backward()
        return hidden_ND.grad, dweight_VD

    return step


def matmuls(problem: Problem) -> Step:
    """The lower limit: hidden · rowsᵀ and the products of the two gradients, without a loss between them."""

    def step() -> tuple[Tensor, Tensor]:
        logits_NV = problem.hidden_ND @ problem.weight_VD.T
        return logits_NV @ problem.weight_VD, logits_NV.T @ problem.hidden_ND

    return step


def plain(problem: Problem) -> Step:
    return lambda: _gradients(problem, lambda x, w: F.cross_entropy(x @ w.T, problem.targets_N))


def plain_fp32(problem: Problem) -> Step:
    return lambda: _gradients(problem, lambda x, w: F.cross_entropy((x @ w.T).float(), problem.targets_N))


def plain_compiled(problem: Problem) -> Step:
    loss_of = torch.compile(lambda x, w: F.cross_entropy((x @ w.T).float(), problem.targets_N))
    return lambda: _gradients(problem, loss_of)


def torch_linear(problem: Problem) -> Step:
    return lambda: _gradients(problem, lambda x, w: F.linear_cross_entropy(x, w, problem.targets_N))


def torch_linear_chunked(problem: Problem) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: _gradients(problem, lambda x, w: F.linear_cross_entropy(x, w, problem.targets_N, options=options))


def cut_cross_entropy(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden_ND.is_cuda else "torch_compile"
    return lambda: _gradients(problem, lambda x, w: linear_cross_entropy(x, w, problem.targets_N, impl=impl))


def liger(problem: Problem) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: _gradients(problem, lambda x, w: liger_fused_linear_cross_entropy(x, w, problem.targets_N))


RIVALS: dict[str, Callable[[Problem], Step]] = {
    "three bare matmuls": matmuls,
    "Rowshard": ours,
    "F.cross_entropy": plain,
    "F.cross_entropy, logits in fp32": plain_fp32,
    "F.cross_entropy, logits in fp32, compiled": plain_compiled,
    "F.linear_cross_entropy": torch_linear,
    "F.linear_cross_entropy, chunked": torch_linear_chunked,
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
}


def lacks(name: str) -> str | None:
    """The package or tool that this machine lacks to run that rival; None if it can run."""
    compiled = name in ("cut-cross-entropy", "F.cross_entropy, logits in fp32, compiled")
    package = {"cut-cross-entropy": "cut_cross_entropy", "Liger": "liger_kernel"}.get(name)
    if name.startswith("F.linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return "a newer torch"
    if compiled and shutil.which("c++") is None:
        return "a C++ compiler"
    if package is not None and importlib.util.find_spec(package) is None:
        return "pip install -e '.[bench]'"
    if name == "Liger" and not torch.cuda.is_available():
        return "a GPU"
    return None


# --- on several ranks: all split the rows; all except one have the same tokens on every rank --------------------------


def ours_on_ranks(problem: Problem, rank: int, world: int, tokens: str) -> Step:
    """The same matmuls in both layouts: all tokens times this rank's rows."""
    shard = VocabShard.of(rank, world, len(problem.weight_VD), 1)
    weight_vD = problem.weight_VD[shard.start : shard.stop].clone()
    mine = slice(None)
    if tokens == "distinct":
        each = problem.tokens // world
        mine = slice(rank * each, (rank + 1) * each)
    hidden_ND, targets_N = problem.hidden_ND[mine].clone(), problem.targets_N[mine].clone()

    def step() -> tuple[Tensor, Tensor]:
        x_ND = hidden_ND.detach().requires_grad_()
        dweight_vD = torch.empty_like(weight_vD, dtype=torch.float32)
        out = vocab_parallel_linear_cross_entropy(
            x_ND,
            weight_vD,
            targets_N,
            shard=shard,
            group=dist.group.WORLD,
            tokens=tokens,
            scale=1 / problem.tokens,
            main_grad_vD=dweight_vD,
            main_grad_is_new=True,
            metrics=False,
        )
        out.loss.backward()
        return x_ND.grad, dweight_vD

    return step


class _SumGradients(torch.autograd.Function):
    """The entry to a tensor-parallel head, as in Megatron: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, hidden_ND):
        return hidden_ND.view_as(hidden_ND)

    @staticmethod
    def backward(ctx, dhidden_ND):
        dist.all_reduce(dhidden_ND)
        return dhidden_ND


def megatron(problem: Problem, rank: int, world: int, fused: bool) -> Step:
    with warnings.catch_warnings(action="ignore"):  # every module warns that Apex is missing
        from megatron.core import parallel_state
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    weight_vD = problem.weight_VD.chunk(world)[rank].clone()

    def step() -> tuple[Tensor, Tensor]:
        x_ND, w_vD = problem.hidden_ND.detach().requires_grad_(), weight_vD.detach().requires_grad_()
        logits_N1v = (_SumGradients.apply(x_ND) @ w_vD.T).unsqueeze(1)
        targets_N1 = problem.targets_N.unsqueeze(1)
        if fused:
            losses = fused_vocab_parallel_cross_entropy(logits_N1v, targets_N1, dist.group.WORLD)
        else:
            losses = vocab_parallel_cross_entropy(logits_N1v.float(), targets_N1)
        losses.mean().backward()
        return x_ND.grad, w_vD.grad

    return step


def loss_parallel(problem: Problem, rank: int, world: int) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu" if not torch.cuda.is_available() else "cuda", (world,))
    weight_vD = problem.weight_VD.chunk(world)[rank].clone()
    targets_N = DTensor.from_local(problem.targets_N, mesh, [Replicate()], run_check=False)

    def step() -> tuple[Tensor, Tensor]:
        x_ND, w_vD = problem.hidden_ND.detach().requires_grad_(), weight_vD.detach().requires_grad_()
        hidden_ND = DTensor.from_local(x_ND, mesh, [Replicate()], run_check=False)
        rows_VD = DTensor.from_local(w_vD, mesh, [Shard(0)], run_check=False)
        with loss_parallel():
            F.cross_entropy((hidden_ND @ rows_VD.T).float(), targets_N).backward()
        return x_ND.grad, w_vD.grad

    return step


def liger_on_ranks(problem: Problem, rank: int, world: int) -> Step:
    """Liger's tensor-parallel loss. On a CPU its fallback: 512 tokens at a time, logits computed again in backward."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as fused

    weight_vD = problem.weight_VD.chunk(world)[rank].clone()

    def losses_of(x_ND: Tensor, w_vD: Tensor) -> Tensor:
        if x_ND.is_cuda:
            return fused.LigerFusedLinearScaledCrossEntropyTPFunction.apply(
                x_ND, w_vD, problem.targets_N, dist.group.WORLD
            )
        # `apply` refuses tensors of a CPU before it chooses this
        return fused._apply_tp_fallback(x_ND, w_vD, problem.targets_N, 1.0, -100, False, dist.group.WORLD)

    def step() -> tuple[Tensor, Tensor]:
        x_ND, w_vD = problem.hidden_ND.detach().requires_grad_(), weight_vD.detach().requires_grad_()
        losses_of(x_ND, w_vD).mean().backward()
        return x_ND.grad, w_vD.grad

    return step


RANK_RIVALS: dict[str, Callable[[Problem, int, int], Step]] = {
    "Rowshard, distinct tokens": lambda problem, rank, world: ours_on_ranks(problem, rank, world, "distinct"),
    "Rowshard, same tokens": lambda problem, rank, world: ours_on_ranks(problem, rank, world, "replicated"),
    "Megatron-Core": lambda problem, rank, world: megatron(problem, rank, world, fused=False),
    "Megatron-Core, fused": lambda problem, rank, world: megatron(problem, rank, world, fused=True),
    "torch loss_parallel": loss_parallel,
    "Liger, tensor parallel": liger_on_ranks,
}
