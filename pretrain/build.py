"""Builds the parts of a run from its settings. Besides config the only module that names the engines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .config.engine import DeepSpeedConfig, FSDP2Config
from .config.job import JobConfig
from .corpora import samples, vocab_rows
from .data import Data
from .data.loader import BatchLoader
from .engine import Engine
from .engine.deepspeed import DeepSpeedEngine
from .engine.footprint import BodyFootprint, Shapes
from .engine.fsdp2 import FSDP2Engine
from .mesh import Mesh
from .models.language_model import LanguageModel
from .optim import VOCAB_OPTIMIZER, VocabOptimizer, body_optimizer
from .placement import Machine, Parallel, Workload, choose_parallel
from .precision import compute_dtype
from .vocab import VocabParallelEmbedding, VocabShard

BOTH_WAYS = 6  # FLOPs for each weight and token: three matmuls, one forward and two backward
ENGINES: dict[type, Any] = {FSDP2Config: FSDP2Engine, DeepSpeedConfig: DeepSpeedEngine}


def vocab_parallel(
    config: JobConfig, rows: int, world: int, node: int, device_type: str, bf16: bool | None = None
) -> Parallel:
    """Chooses the size of the vocab axis for `world` ranks, `node` of them per node. Arguments as in `check_job`."""
    work = vocab_workload(config, rows, world, compute_dtype(config.train, device_type, bf16).itemsize)
    return choose_parallel(config.vocab.parallel, work, Machine.of(device_type, world, node))


def vocab_workload(config: JobConfig, rows: int, world: int, itemsize: int) -> Workload:
    """Computes the work of a rank's matrix in a step. itemsize: bytes per number of the compute dtype."""
    return Workload(
        rows=VocabShard.of(0, 1, rows, config.vocab.multiple).padded_size,
        width=config.model.width,
        matrices=config.vocab.matrices,
        tokens=config.train.micro_batch * config.seq_len,
        micro_batches=config.train.batches.largest // (config.train.micro_batch * world),
        itemsize=itemsize,
        state=VOCAB_OPTIMIZER.bytes_per_parameter(torch.Size((rows, config.model.width))),
        smoothing=config.vocab.label_smoothing > 0,
    )


def body_shapes(config: JobConfig) -> Shapes:
    """Returns the shapes of the body's parameters."""
    with torch.device("meta"):
        return Shapes.of(config.model.body(), body_optimizer(config.optim), config.optim.matrix_itemsize)


def body_footprint(config: JobConfig, work: Workload, p: int, world: int) -> BodyFootprint:
    """Computes memory and traffic of the body in a step, per rank of `world`, with p ranks on the vocab axis."""
    shapes = body_shapes(config)
    footprint: BodyFootprint = ENGINES[type(config.engine)].footprint(config.engine, shapes, work, p, world)
    return footprint


def flops_per_token(config: JobConfig, rows: int) -> float:
    """Computes the FLOPs of the model per token, forward and backward, as MFU counts them: without recomputation by
    checkpointing, and without padding rows.
    """
    shapes = body_shapes(config)
    return body_flops(config, shapes, BOTH_WAYS) + BOTH_WAYS * rows * config.model.width


def body_flops(config: JobConfig, shapes: Shapes, per_weight: int) -> float:
    """Computes the FLOPs of the body per token. Attention reads half of the positions on average."""
    attention = config.model.activations(config.engine.activation_checkpointing).attention
    return per_weight * (shapes.matmuls + len(shapes.blocks) * config.seq_len * attention)


def about(config: JobConfig, data: Data) -> dict[str, Any]:
    """Returns the description of the run for its checkpoints."""
    return {
        "config": asdict(config),
        "vocab_size": vocab_rows(config, data),
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
    }


def build_model(config: JobConfig, mesh: Mesh, rows: int) -> tuple[Engine, LanguageModel, VocabOptimizer]:
    """Builds engine, model and the matrix's optimizer. The initial weights depend only on the seed."""
    dtype = compute_dtype(config.train, mesh.device.type)
    vocab = VocabParallelEmbedding(
        config.vocab,
        VocabShard.of(mesh.vocab_rank, mesh.vocab_size, rows, config.vocab.multiple),
        config.model.width,
        seed=config.seed,
        group=mesh.vocab_group if mesh.vocab_size > 1 else None,
        compute_dtype=dtype,
        device=mesh.device,
    )
    with torch.device("meta"):
        body = config.model.body()
    engine = ENGINES[type(config.engine)](config.engine, config.optim, dtype, config.seed, config.ema.on)
    model = LanguageModel(vocab, engine.wrap(body, mesh))
    return engine, model, VocabOptimizer(vocab.parameters(), config.optim, mesh, config.ema.on)


def batch_loader(
    config: JobConfig, data: Data, mesh: Mesh, vocab: VocabParallelEmbedding, left_out: Sequence[list[int]] = ()
) -> BatchLoader:
    """Builds the loader of this rank's batches, at the first sample. left_out: samples that the guard left out."""
    drawn = samples(config, data).without(left_out)
    end = drawn.after_steps({}, config.train.steps, config.train.batches)
    return BatchLoader(
        drawn,
        batches=config.train.batches,
        micro_batch=config.train.micro_batch,
        rank=mesh.data_rank,
        world=mesh.data_world,
        shard=vocab.shard,
        dtype=vocab.compute_dtype,
        device=mesh.device,
        prefetch=config.data.prefetch,
        end=sum(end.values()),
    )
