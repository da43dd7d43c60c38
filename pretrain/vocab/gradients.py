"""The body's gradients beside the matrix's: one sum over ranks, one norm, one clip.

Apart from embedding.py because it works on the body, which the matrix's owner never meets.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import on_host
from .embedding import VocabParallelEmbedding

BLOCK = 2**15  # numbers that a CPU converts to float64 at once, in its cache; more would start threads


def summed(body: Callable[..., Tensor], group: dist.ProcessGroup | None = None) -> Callable[..., Tensor]:
    """The body, to be called as it is, whose gradients are averaged over `group` (None: all ranks), as DDP and FSDP do.

    The matrix sums gradients over ranks. Within the body they become `world` times as large, so that the average is
    the sum; the gradient of its first argument, the hidden states of the lookup, leaves it as it should be. No
    collective.
    """

    def call(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        world = dist.get_world_size(group) if dist.is_initialized() else 1
        hidden = hidden.view_as(hidden)  # other users of the same hidden states keep their gradients
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient / world)
        out = body(hidden, *args, **kwargs)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * world)
        return out

    return call


def clip_grad_norm_(
    vocab: VocabParallelEmbedding,
    body_parameters: Iterable[nn.Parameter],
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Norm of the whole gradient, rows of all ranks and body; scales it so that it does not exceed `max_norm`.

    To be called on all ranks of the matrix's group, whose bodies have equal gradients (DDP) or shards of one as
    DTensors (fully_shard). All ranks get the same norm, float64, and scale by the same factor. `body_parameters` may
    hold the rows too: they count once. One all-reduce of two numbers; for DTensors another.
    Raises RuntimeError if `error_if_nonfinite` and the norm is not finite.
    """
    rows = list(vocab.parameters())
    known = {id(parameter) for parameter in rows}
    body = [parameter for parameter in body_parameters if id(parameter) not in known]
    drows, dbody = ([p.grad for p in part if p.grad is not None] for part in (rows, body))
    device = vocab.weight.device
    replicated = [gradient for gradient in dbody if not _is_dtensor(gradient)]
    squares_2 = torch.stack([sum_of_squares(drows, device), sum_of_squares(replicated, device)])
    if vocab.group is not None:
        dist.all_reduce(squares_2, group=vocab.group)
        squares_2[1] /= dist.get_world_size(vocab.group)  # of equal numbers: the same bits on all ranks
    norm = (squares_2.sum() + _dtensor_square([g for g in dbody if _is_dtensor(g)], device)).sqrt()
    if error_if_nonfinite and not bool(on_host(norm.isfinite())):
        raise RuntimeError(f"the norm of the gradient is {float(on_host(norm))}, so it cannot be clipped")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*drows, *dbody):
        local = gradient.to_local() if _is_dtensor(gradient) else gradient  # type: ignore[attr-defined]
        local.mul_(factor.to(local.device))
    return norm


def _is_dtensor(gradient: Tensor) -> bool:
    """True for a DTensor: who has one has imported torch.distributed.tensor, which takes its time."""
    return hasattr(gradient, "to_local")


def _dtensor_square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Σx² over DTensors of one mesh, a float64 scalar. One all-reduce, if there are any."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    return torch.linalg.vector_norm(norms).full_tensor().square().to(device)


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Σx² over local tensors, a float64 scalar on `device`; 0 for none.

    Added up in float64, so that it does not depend on how the tensors are split: torch's fp32 norms on a CPU add one
    number after the other, and are wrong by 4e-3 at 200 million numbers.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    if on_gpu:
        total += torch.stack(torch._foreach_norm(on_gpu, dtype=torch.float64)).square().sum()
    on_cpu = [tensor for tensor in tensors if not tensor.is_cuda]
    if on_cpu:  # there, foreach_norm in float64 takes three times as long as this
        room, square = torch.empty(BLOCK, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part in (part for tensor in on_cpu for part in tensor.flatten().split(BLOCK)):
            exact = room[: len(part)].copy_(part)
            square += torch.linalg.vector_norm(exact).square()  # a dot product would start threads
        total += square.to(device)
    return total
