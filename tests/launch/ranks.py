"""Measures the memory of a real rank on a CPU."""

from dataclasses import replace

import torch

from launch.rehearsal import text_like, trainer_of
from pretrain.build import build_model
from pretrain.data.loader import Batch, MicroBatch
from pretrain.mesh import Mesh
from pretrain.vocab.lookup import plan_lookup
from tests.benchmarks.measure import free_at_once, holding_peak_mib


def held_by_rank(rank, world, config, rows, parallel):
    """Returns the peak memory that a training adds to this process, in MiB."""
    free_at_once()
    small = replace(config, model=replace(config.model, layers=1, width=64, heads=1))
    training(small, world, 1024, parallel)()  # the code of all libraries is in memory
    return holding_peak_mib(lambda: training(config, world, rows, parallel))


def training(config, world, rows, parallel):
    """Runs a step of the trainer, each time on the same tokens."""
    mesh = Mesh.of(parallel, torch.device("cpu"))
    engine, model, vocab_optimizer = build_model(config, mesh, rows)
    trainer = trainer_of(model, engine, vocab_optimizer, mesh, config.train, config.optim)
    shard, ids_pBT = model.vocab.shard, text_like(parallel, config, rows)
    plan = plan_lookup([ids_BT.flatten() for ids_BT in ids_pBT], shard, model.vocab.compute_dtype)
    micro = MicroBatch(ids_pBT[shard.rank], ids_pBT[shard.rank], plan=plan)
    micro_batches = config.train.global_batch // (config.train.micro_batch * world)
    batch = Batch([micro] * micro_batches, micro_batches * micro.tokens_BT.numel())
    return lambda: trainer.train_step(batch, trainer.agree(batch.n_targets))
