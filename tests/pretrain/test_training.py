"""Training on any number of ranks matches training in one dense process."""

import json

import numpy as np
import pytest
import torch

from pretrain.build import build_model
from pretrain.checkpoint import checkpoints, read_manifest, step_of
from pretrain.config.engine import FSDP2Config
from pretrain.config.job import JobConfig
from pretrain.data import Windows, open_corpus
from pretrain.engine.fsdp2 import FSDP2Engine
from pretrain.mesh import Mesh
from pretrain.models.language_model import LanguageModel
from pretrain.optim import VocabOptimizer, read_norm
from pretrain.vocab import VocabParallelEmbedding, VocabShard
from tests.pretrain.dense import DenseModel, dense_training, windows_of
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4)]  # world, vocab.parallel


def one_step_in_float64(rank: int, world: int, config: JobConfig):
    """Loss, gradients and norm of one global batch on this rank, computed as in training, in float64."""
    torch.set_default_dtype(torch.float64)
    mesh = Mesh.of(int(config.vocab.parallel), torch.device("cpu"))
    shard = VocabShard.of(mesh.vocab_rank, mesh.vocab_size, VOCAB, config.vocab.multiple)
    vocab = VocabParallelEmbedding(
        config.vocab,
        shard,
        config.model.width,
        seed=config.seed,
        group=mesh.vocab_group,
        compute_dtype=torch.float64,
        dtype=torch.float64,
    )
    with torch.device("meta"):
        body = config.model.body()
    engine = FSDP2Engine(FSDP2Config(), config.optim, torch.float64, config.seed)
    model = LanguageModel(vocab, engine.wrap(body, mesh))
    vocab_optimizer = VocabOptimizer(vocab.parameters(), config.optim, mesh)
    tokens, targets = (part.chunk(world)[rank] for part in windows_of(config, 0))
    n_targets = config.train.global_batch * config.seq_len
    total = 0.0
    for micro_tokens, micro_targets in zip(tokens.split(2), targets.split(2), strict=True):
        loss = model.loss(micro_tokens, micro_targets).loss / n_targets
        engine.backward(loss, last_micro_batch=False)
        total += float(loss.detach())
    vocab_optimizer.reduce_gradients()
    norm, _ = read_norm(engine.grad_norm(), vocab_optimizer.grad_norm(torch.zeros(())))
    return {
        "loss": total,
        "norm": norm,
        "body": {name: p.grad.full_tensor() for name, p in body.named_parameters()},
        "rows": {name: row.grad for name, row in vocab.named_rows().items()},
        "shard": shard,
    }


@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("world,vocab_parallel", LAYOUTS)
def test_one_step_matches_dense_in_float64(tmp_path, world, vocab_parallel, tie):
    data = write_tokens(tmp_path / "tokens")
    config = tiny_config(data, tmp_path / "run", vocab__parallel=vocab_parallel, vocab__tie=tie)
    dense = DenseModel(config, torch.float64)
    dense.loss(*windows_of(config, 0)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in dense.parameters() if p.grad is not None])
    loss = float(dense.loss(*windows_of(config, 0)).detach())

    results = run_ranks(world, one_step_in_float64, config)
    near = {"rtol": 1e-10, "atol": 1e-10}
    assert sum(result["loss"] for result in results) == pytest.approx(loss, rel=1e-10)
    for result in results:
        assert result["norm"] == pytest.approx(float(norm), rel=1e-10)
        for name, gradient in result["body"].items():
            torch.testing.assert_close(gradient, dense.body.get_parameter(name).grad, **near)
        matrices = {"embedding.weight": dense.weight, "head.weight": dense.head_weight}
        for name, gradient in result["rows"].items():
            shard = result["shard"]
            torch.testing.assert_close(gradient, matrices[name].grad[shard.start : shard.stop], **near)
            assert (gradient[shard.valid_rows :] == 0).all()


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_twenty_steps_match_dense(tmp_path, tie):
    data = write_tokens(tmp_path / "tokens")
    truth = dense_training(tiny_config(data, tmp_path / "dense", vocab__tie=tie)).losses
    assert truth[-1] < truth[0] - 0.5, "the model must learn, otherwise equal losses prove nothing"
    for world, vocab_parallel in ((1, 1), (2, 2), (3, 3), (4, 2)):  # other layouts: one step in float64, above
        run = tmp_path / f"{world}x{vocab_parallel}"
        micro_batch = 2 if world == 3 else 3  # several micro-batches per step, except on 4 ranks
        settings = {"vocab__parallel": vocab_parallel, "vocab__tie": tie, "train__micro_batch": micro_batch}
        run_ranks(world, train_rank, tiny_config(data, run, **settings))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 21))
        np.testing.assert_allclose([line["loss"] for line in lines], truth, rtol=1e-5)
        for name, tensor in saved_tensors(run).items():
            if name.endswith(("embedding.weight", "head.weight")):
                assert len(tensor) == 312 and (tensor[VOCAB:] == 0).all(), f"{name}: padding rows changed"
                assert tensor[:VOCAB].abs().sum(1).gt(0).all()


def initial_rows(rank: int, world: int, config: JobConfig):
    mesh = Mesh.of(int(config.vocab.parallel), torch.device("cpu"))
    _, model, _ = build_model(config, mesh, VOCAB)
    rows = {name: (model.vocab.shard.start, row.detach()) for name, row in model.vocab.named_rows().items()}
    return rows, {name: p.full_tensor().detach() for name, p in model.body.named_parameters()}


def test_initial_weights_are_equal_for_every_layout(tmp_path):
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run", vocab__tie="untied")
    dense = DenseModel(config, torch.float32)
    whole = {"embedding.weight": dense.weight, "head.weight": dense.head_weight}
    for world, vocab_parallel in LAYOUTS:
        config.vocab.parallel = str(vocab_parallel)
        for rows, body in run_ranks(world, initial_rows, config):
            for name, (start, row) in rows.items():
                assert torch.equal(row, whole[name][start : start + len(row)])
            for name, parameter in body.items():
                assert torch.equal(parameter, dense.body.get_parameter(name))


def test_ignored_targets_do_not_count(tmp_path):
    """The last window is short. All ranks divide the loss by the number of existing targets."""
    data = write_tokens(tmp_path / "tokens", documents=3)
    settings = {"train__steps": 3, "train__global_batch": 12}
    losses = []
    for world in (1, 4):
        config = tiny_config(data, tmp_path / f"run{world}", **settings)
        windows = Windows(open_corpus(data).train, config.seq_len)
        assert len(windows) < 12 and (windows.tokens - 1) % config.seq_len, "the batch must contain a short window"
        run_ranks(world, train_rank, config)
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        expected = sum(int((windows_of(config, step)[1] >= 0).sum()) for step in range(3))
        assert lines[-1]["tokens"] == expected < 3 * 12 * config.seq_len
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_non_finite_gradient_stops_run_before_save(tmp_path):
    data = write_tokens(tmp_path / "tokens")
    config = tiny_config(data, tmp_path / "run", optim__lr=1e20, optim__warmup_steps=0, checkpoint__every=1)
    with pytest.raises(AssertionError, match=r"FloatingPointError: the gradient's norm is (nan|inf) and the loss"):
        run_ranks(2, train_rank, config)
    assert saved_tensors(tmp_path / "run")


def test_best_checkpoint_by_validation_loss_is_kept(tmp_path):
    """Evaluates and saves at the same step. A far too high learning rate makes the first checkpoint the best."""
    rules = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_best": 1, "eval__every": 2}
    wild = {"optim__lr": 0.5, "optim__warmup_steps": 4, "optim__clip": 0.0}
    stops = {"train__steps": 8, "train__stop_after": 6}
    config = tiny_config(make_corpus(tmp_path / "data"), tmp_path / "run", **stops, **rules, **wild)
    run_ranks(2, train_rank, config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(losses, key=losses.__getitem__)
    kept = {step_of(folder): read_manifest(folder)["val_loss"] for folder in checkpoints(config.run_dir)}
    assert best < 6 and kept == {step: losses[step] for step in (best, 6)} and len(losses) == 3
