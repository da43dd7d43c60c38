"""Gradients of the body together with those of the matrix: one sum over ranks, one norm, one clip.

It stands apart from embedding.py because it works on the body, which the owner of the matrix never sees.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .collectives import on_host
from .embedding import VocabParallelEmbedding

BLOCK = 2**15  # numbers that a CPU converts to float64 at once: they stay in its cache, and start no threads


def summed(body: Callable[..., Tensor], group: dist.ProcessGroup | None = None) -> Callable[..., Tensor]:
    """Wraps a body whose gradients DDP or FSDP averages over `group` (None: all ranks). Call the result instead.

    The matrix needs gradients that are summed over the ranks, not averaged. So inside the body gradients are multiplied
    by the number of ranks, and the average becomes the sum. The gradient of the first argument, the hidden states of
    the lookup, is divided by the same number when it leaves the body. No collective.

    >>> layer = nn.Linear(8, 8)  # in a program: DistributedDataParallel(layer), or a layer after fully_shard
    >>> body = summed(layer)
    >>> hidden = torch.ones(3, 8)
    >>> torch.equal(body(hidden), layer(hidden))
    True
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
    """Scales all gradients so that their common norm does not exceed `max_norm`; returns the norm before, in float64.

    The norm is over the rows of all ranks and the body. Call it on all ranks of the matrix's group. The bodies must
    have equal gradients on all ranks (DDP), or shards of one gradient as DTensors (fully_shard). All ranks get the same
    norm and scale by the same factor. `body_parameters` may include the rows: they count once. One all-reduce of two
    numbers, and one more for DTensors. Raises RuntimeError if `error_if_nonfinite` and the norm is not finite.

    >>> vocab = VocabParallelEmbedding.create(1000, 8)
    >>> layer = nn.Linear(8, 8)
    >>> vocab.weight.grad, layer.weight.grad = torch.full((1024, 8), 0.5), torch.zeros(8, 8)
    >>> norm = clip_grad_norm_(vocab, layer.parameters(), max_norm=1.0)
    >>> round(norm.item(), 3)
    45.255
    >>> round(vocab.weight.grad.norm().item(), 3)
    1.0
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
    """Returns True for a DTensor, without importing torch.distributed.tensor, which takes long."""
    return hasattr(gradient, "to_local")


def _dtensor_square(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Returns Σx² over DTensors of one mesh, a float64 scalar. One all-reduce, if there are any."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    return torch.linalg.vector_norm(norms).full_tensor().square().to(device)


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Returns Σx² over local tensors, a float64 scalar on `device`; 0 if there are none.

    The sum is in float64, so that it does not depend on how the tensors are sharded. torch's fp32 norms on a CPU add
    one number after the other: their error is 4e-3 at 200 million numbers.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
    if on_gpu:
        total += torch.stack(torch._foreach_norm(on_gpu, dtype=torch.float64)).square().sum()
    on_cpu = [tensor for tensor in tensors if not tensor.is_cuda]
    if on_cpu:  # on a CPU, foreach_norm in float64 takes three times as long as this
        room, square = torch.empty(BLOCK, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part in (part for tensor in on_cpu for part in tensor.flatten().split(BLOCK)):
            exact = room[: len(part)].copy_(part)
            square += torch.linalg.vector_norm(exact).square()  # a dot product would start threads
        total += square.to(device)
    return total
