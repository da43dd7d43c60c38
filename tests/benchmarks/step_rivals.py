"""Rivals of the whole training step: FSDP2 with the embedding inside, and Megatron-Core's tensor parallelism.

Separate from step.py, which measures them: one builder per system, as in rivals.py for the head alone.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from pretrain.config.optim import OptimConfig
from pretrain.families.family import ModelConfig
from pretrain.families.gpt2 import GELUS, GPT2Config
from pretrain.mesh import Mesh
from pretrain.optim import body_optimizer
from pretrain.vocab import VocabShard
from pretrain.vocab.gradients import sum_of_squares

OPTIM = OptimConfig(lr=1e-4, warmup_steps=0)
STD = 0.02  # of the matrix's initial values
SPLIT = "tensor_model_parallel"  # Megatron's mark of a parameter that is split over the ranks
Step = Callable[[], float]  # -> loss
Build = Callable[[ModelConfig, int, int, torch.dtype], Step]  # model, rows, sequences per rank, dtype of the matmuls
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> sum over targets


def ids_as_in_text(vocab: int, sequences: int, length: int, ranks: int) -> list[Tensor]:
    """The ids of every rank, [sequences, length + 1] each, identical in every process."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1, vocab + 1)
    ids = torch.multinomial(frequency, ranks * sequences * (length + 1), replacement=True, generator=generator)
    return list(ids.view(ranks, sequences, length + 1))


def device_of_ranks() -> torch.device:
    """The device of this rank's process group: the GPU with nccl, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, cast: bool = False) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD)
    return F.cross_entropy(logits_NV.float() if cast else logits_NV, targets_N, reduction="sum")


def chunked_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Computes the logits of an eighth of the tokens at a time, in fp32, and again in backward."""
    losses = [
        checkpoint(cross_entropy, hidden_mD, weight_VD, targets_m, True, use_reentrant=False)
        for hidden_mD, targets_m in zip(hidden_ND.chunk(8), targets_N.chunk(8), strict=True)
    ]
    return torch.stack(losses).sum()


def fused_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden_ND.is_cuda else "torch_compile"
    return linear_cross_entropy(hidden_ND, weight_VD, targets_N, impl=impl, reduction="sum")


class Whole(nn.Module):
    """The usual model: embedding, body and head in one module, all sharded by FSDP2."""

    def __init__(self, model: ModelConfig, vocab: int, loss: Loss) -> None:
        super().__init__()
        self.embedding, self.body, self.loss = nn.Embedding(vocab, model.width), model.body(), loss

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_ND = self.body(self.embedding(tokens_BT)).flatten(0, 1)
        return self.loss(hidden_ND, self.embedding.weight, targets_BT.flatten())


def fsdp2(
    model: ModelConfig, vocab: int, sequences: int, dtype: torch.dtype, loss: Loss, compiled: bool = False
) -> Step:
    mesh = Mesh.of(1, device_of_ranks())
    with torch.device("meta"):
        whole = Whole(model, vocab, loss)
    if compiled:
        for block in whole.body.blocks:
            block.forward = torch.compile(block.forward)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*whole.body.blocks, whole):
        fully_shard(module, mesh=mesh.flat, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    whole.to_empty(device=mesh.device)
    for name, parameter in whole.named_parameters():
        rows = VocabShard.of(mesh.rank, mesh.world, parameter.shape[0], multiple=1)
        if name == "embedding.weight":
            values = rows.initial_rows(name, 0, model.width, STD)
        else:
            values = whole.body.initial_rows(name.removeprefix("body."), 0, rows.start, rows.stop)
        parameter.detach().to_local().copy_(values)
    optimizer = body_optimizer(OPTIM).build(whole.parameters(), OPTIM, OPTIM.body)
    mine = ids_as_in_text(vocab, sequences, model.context, mesh.world)[mesh.rank].to(mesh.device)
    targets = mesh.world * sequences * model.context

    def step() -> float:
        loss = whole(mine[:, :-1].contiguous(), mine[:, 1:].contiguous()) / targets
        loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), OPTIM.clip)
        optimizer.step(OPTIM.lr)
        total = loss.detach()
        dist.all_reduce(total)
        return float(total)

    return step


# --- Megatron-Core ----------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """torch's causal attention inside Megatron's block: its own, without Transformer Engine, allocates on CUDA only."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, query_TBHd: Tensor, key_TBHd: Tensor, value_TBHd: Tensor, *_: object, **__: object) -> Tensor:
        queries, keys, values = (part.permute(1, 2, 0, 3) for part in (query_TBHd, key_TBHd, value_TBHd))
        mixed_BHTd = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return mixed_BHTd.permute(2, 0, 1, 3).flatten(2)


def gpt_model(model: GPT2Config, vocab: int, dtype: torch.dtype) -> nn.Module:
    """Builds Megatron-Core's GPT model of its local spec: tied, learned positions, biases and layer norms as in GPT-2.

    Heads, MLP and rows are split over all ranks. Its weights are left unset.
    """
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")  # at each step
    with warnings.catch_warnings(action="ignore"):  # every module warns that Apex is missing
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
        config = TransformerConfig(
            num_layers=model.layers,
            hidden_size=model.width,
            num_attention_heads=model.heads,
            tensor_model_parallel_size=dist.get_world_size(),
            activation_func=partial(F.gelu, approximate=GELUS[model.gelu]),
            layernorm_epsilon=model.eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = _Attention
        built = GPTModel(config, spec, vocab, model.context, share_embeddings_and_output_weights=True)
    return built.to(dtype)  # norms as well, as Megatron's Float16Module does


def copy_weights(theirs: nn.Module, model: GPT2Config, vocab: int) -> None:
    """Sets this rank's part of Megatron's model to the initial weights of the other systems."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        body = model.body()

    def ours(name: str) -> Tensor:
        return body.initial_rows(name, 0, 0, body.get_parameter(name).shape[0])

    def by_head(qkv: Tensor) -> Tensor:  # theirs: queries, keys and values of a head are neighbours
        return qkv.unflatten(0, (3, model.heads, -1)).transpose(0, 1).flatten(0, 2)

    rows = VocabShard.of(rank, world, vocab, multiple=1)
    values = {
        "embedding.word_embeddings.weight": rows.initial_rows("embedding.weight", 0, model.width, STD),
        "embedding.position_embeddings.weight": ours("positions"),
    }
    for ending in ("weight", "bias"):
        values[f"decoder.final_layernorm.{ending}"] = ours(f"norm.{ending}")
        for i in range(model.layers):
            own, its = f"blocks.{i}", f"decoder.layers.{i}"
            values[f"{its}.input_layernorm.{ending}"] = ours(f"{own}.norm1.{ending}")
            values[f"{its}.pre_mlp_layernorm.{ending}"] = ours(f"{own}.norm2.{ending}")
            qkv, up = ours(f"{own}.attention.qkv.{ending}"), ours(f"{own}.mlp.up.{ending}")
            values[f"{its}.self_attention.linear_qkv.{ending}"] = by_head(qkv).chunk(world)[rank]
            values[f"{its}.mlp.linear_fc1.{ending}"] = up.chunk(world)[rank]
            for owner, name in (("self_attention.linear_proj", "attention.out"), ("mlp.linear_fc2", "mlp.down")):
                whole = ours(f"{own}.{name}.{ending}")
                values[f"{its}.{owner}.{ending}"] = whole.chunk(world, dim=1)[rank] if ending == "weight" else whole
    for name, parameter in theirs.named_parameters():
        parameter.detach().copy_(values.pop(name))
    assert not values, f"Megatron's model has no {list(values)}"


def norm_over_ranks(parameters: list[nn.Parameter]) -> float:
    """Returns the norm of the gradients. Each rank has a part of the split parameters, and all of the others."""
    squares = torch.zeros(2, dtype=torch.float64)
    for split in (False, True):
        mine = [parameter for parameter in parameters if getattr(parameter, SPLIT, False) == split]
        squares[int(split)] = sum_of_squares([parameter.grad for parameter in mine], squares.device)
    dist.all_reduce(squares[1:])
    return math.sqrt(squares.sum())


def megatron(model: GPT2Config, vocab: int, sequences: int, dtype: torch.dtype) -> Step:
    """Every rank has all tokens. In bf16 an fp32 copy of the weights is stepped, as by Megatron's own optimizer."""
    theirs = gpt_model(model, vocab, dtype)
    copy_weights(theirs, model, vocab)
    parameters = list(theirs.parameters())
    mains = [nn.Parameter(parameter.detach().float()) for parameter in parameters]  # in fp32 they share the memory
    for main, parameter in zip(mains, parameters, strict=True):
        setattr(main, SPLIT, getattr(parameter, SPLIT, False))
    optimizer = body_optimizer(OPTIM).build(mains, OPTIM, OPTIM.body)
    ids_BT = torch.cat(ids_as_in_text(vocab, sequences, model.context, dist.get_world_size()))
    tokens_BT, targets_BT = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
    positions_BT = torch.arange(model.context).expand_as(tokens_BT)

    def step() -> float:
        loss = theirs(tokens_BT, positions_BT, attention_mask=None, labels=targets_BT).mean()
        loss.backward()
        for main, parameter in zip(mains, parameters, strict=True):
            main.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        factor = min(1.0, OPTIM.clip / (norm_over_ranks(mains) + 1e-6))
        torch._foreach_mul_([main.grad for main in mains], factor)
        optimizer.step(OPTIM.lr)
        if dtype != torch.float32:
            with torch.no_grad():
                torch._foreach_copy_(parameters, mains)
        return float(loss.detach())

    return step
