"""Measures of the matrix on its shards match a dense computation, in float64."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.config.monitor import MonitorConfig
from pretrain.config.optim import OptimConfig
from pretrain.hooks.embedding import EmbeddingHealth
from pretrain.mesh import Mesh
from pretrain.monitor.rows import BINS, EDGES, MAX_LISTED_ROWS, SMALL, Rows
from pretrain.monitor.spectrum import TOP
from pretrain.optim import VocabOptimizer
from pretrain.vocab import VocabConfig, VocabParallelEmbedding, VocabShard
from tests.pretrain.helpers import TIMES, padded_rows
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

ROWS, MULTIPLE, WIDTH = 203, 8, 6
LAYOUTS = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 2), (4, 4)]  # world, ranks to a copy


def counts(seed: int = 0) -> Tensor:
    """Counts [V, 2]: every bin has rows, some are never an input and some never a target."""
    generator = torch.Generator().manual_seed(seed)
    counts_V2 = (10 ** (7 * torch.rand(ROWS, 1, generator=generator, dtype=torch.float64))).floor()
    counts_V2 = (counts_V2 * torch.rand(ROWS, 2, generator=generator, dtype=torch.float64)).floor()
    counts_V2[3:9], counts_V2[20:23, 0], counts_V2[30, 1] = 0, 0, 0
    return counts_V2


def bins_of(counts_V2: Tensor) -> list[Tensor]:
    """Masks of the rows of each bin."""
    uses = counts_V2.sum(1)
    frequency = uses / uses.sum() * 1e6
    edges = [0.0, *EDGES, math.inf]
    return [uses == 0, *((uses > 0) & (frequency >= low) & (frequency < high) for low, high in pairwise(edges))]


def weights() -> Tensor:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    weight[3:9] *= 0.4  # as never moved
    weight[40] = weight[3:9].mean(0)  # seen, and as they are
    weight[[50, 200]] *= 1e-3
    weight[60, 2], weight[61, 0], weight[202] = math.nan, math.inf, 0
    return weight


def of_matrix(rank: int, world: int) -> tuple:
    shard = VocabShard.of(rank, world, ROWS, MULTIPLE)
    rows = Rows(shard, torch.distributed.group.WORLD if world > 1 else None, padded_rows(counts(), shard))
    return rows.of_matrix(padded_rows(weights(), shard)), rows.unseen()


def dense_of_matrix() -> tuple[dict[str, float], dict[str, list[int]]]:
    weight, counts_V2 = weights(), counts()
    norm, uses = weight.norm(dim=1), counts_V2.sum(1)
    good = torch.isfinite(weight).all(1) & (weight != 0).any(1)
    kept = weight[good]
    covariance = torch.cov(kept.T, correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    shares = values / values.sum()
    cosines = F.cosine_similarity(kept[:, None], kept[None], dim=2)
    n = len(kept)
    truth = {
        "norm": float(norm[good].mean()),
        "norm_by_count": float(np.corrcoef(uses[good & (uses > 0)].log(), norm[good & (uses > 0)])[0, 1]),
        "mean_share": float(n * kept.mean(0).square().sum() / kept.square().sum()),
        "mean_cosine": float((cosines.sum() - n) / (n * n - n)),
        "effective_rank": float(torch.exp(-(shares * shares.log()).sum())),
        "isotropy": float(values.sum() ** 2 / (WIDTH * values.square().sum())),
    }
    truth |= {f"spectrum/top{100 * top:g}pct": float(shares[: max(1, round(WIDTH * top))].sum()) for top in TOP}
    for name, mask in zip(BINS, bins_of(counts_V2), strict=True):
        assert mask.any(), f"no row is in {name}"
        truth[f"norm/{name}"] = float(norm[mask & good].mean())
    unseen = (uses == 0) & good
    distance = (weight - weight[unseen].mean(0)).norm(dim=1)
    ids = {
        "damaged": (~good).nonzero(),
        "small": (good & (norm < SMALL * norm[good].mean())).nonzero(),
        "like_unseen": (good & (uses > 0) & (distance <= distance[unseen].max())).nonzero(),
    }
    listed = {name: rows.squeeze(1).tolist() for name, rows in ids.items()}
    return truth | {name: len(rows) for name, rows in listed.items()}, {
        name: rows[:MAX_LISTED_ROWS] for name, rows in listed.items()
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_match_the_dense_matrix(world):
    truth, ids = dense_of_matrix()
    assert ids["damaged"] == [60, 61, 202] and {50, 200} <= set(ids["small"]) and 40 in ids["like_unseen"]
    never = (counts() == 0).sum(0).tolist()
    for (scalars, listed), unseen in run_ranks(world, of_matrix):
        assert scalars == pytest.approx(truth, rel=1e-10, abs=1e-12)
        assert listed == ids
        assert [unseen["rows_never_input"], unseen["rows_never_target"]] == never
        assert [unseen[f"rows_of_bin/{name}"] for name in BINS] == [int(mask.sum()) for mask in bins_of(counts())]


def problem(world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Builds weight [V, D], mixer [D, D], and tokens and targets [steps, micro-batches, world, B, T]."""
    generator = torch.Generator().manual_seed(world)
    weight, mixer = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (ROWS, WIDTH))
    tokens, targets = torch.randint(ROWS, (2, 2, 2, world, 2, 5), generator=generator)
    targets[:, :, :, 0, 2] = -100
    return weight, mixer, tokens, targets


def gradients(rank: int, world: int, parallel: int, tie: str) -> tuple[dict[str, float], bool]:
    """Scalars of the second of two steps, and whether the buffer is freed after it."""
    weight, mixer, tokens, targets = problem(world)
    mesh = Mesh.of(parallel, torch.device("cpu"))
    shard = VocabShard.of(mesh.vocab_rank, parallel, ROWS, MULTIPLE)
    vocab = VocabParallelEmbedding(
        VocabConfig(multiple=MULTIPLE, tie=tie, input_grad_scale=0.5),
        shard,
        WIDTH,
        seed=0,
        group=mesh.vocab_group if parallel > 1 else None,
        compute_dtype=torch.float64,
        dtype=torch.float64,
    )
    for rows in vocab.parameters():
        rows.data = padded_rows(weight, shard)
    vocab_optimizer = VocabOptimizer(vocab.parameters(), OptimConfig(lr=6e-4), mesh)
    health = EmbeddingHealth(2, vocab, vocab_optimizer, mesh)
    for step in range(2):
        health.before_step(SimpleNamespace(state=SimpleNamespace(step=step)))
        micro_batches = []
        for micro in range(2):
            ids, wanted = tokens[step, micro, rank], targets[step, micro, rank]
            hidden = vocab.lookup(ids)
            vocab.loss(hidden + torch.tanh(hidden @ mixer), wanted, scale=0.25).loss.backward()
            micro_batches.append(SimpleNamespace(tokens_BT=ids, targets_BT=wanted))
        assert (vocab.input_grad_vD is not None) == (step == 1 and tie == "tied")
        vocab_optimizer.reduce_gradients()
        report = SimpleNamespace(step=step + 1, scalars={}, rows={}, micro_batches=micro_batches)
        health.after_step(None, report)
        assert bool(report.scalars) == (step == 1)
        for rows in vocab.parameters():
            rows.grad = None
    return report.scalars, vocab.input_grad_vD is None


def dense_gradients(world: int) -> dict[str, float]:
    weight, mixer, tokens, targets = problem(world)
    enter, leave = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    hidden = F.embedding(tokens[1], enter)
    logits = (hidden + torch.tanh(hidden @ mixer)) @ leave.T
    (F.cross_entropy(logits.flatten(0, -2), targets[1].flatten(), reduction="sum") / 4).backward()
    one, other = 0.5 * enter.grad, leave.grad
    ids, wanted = tokens.flatten(), targets[targets >= 0]
    counts_V2 = torch.stack([torch.bincount(counted, minlength=ROWS) for counted in (ids, wanted)], dim=1).double()
    truth = {}
    for suffix, mask in [("", slice(None)), *((f"/{n}", m) for n, m in zip(BINS, bins_of(counts_V2), strict=True))]:
        a, b = float(one[mask].norm()), float(other[mask].norm())
        if a + b == 0:
            continue
        truth[f"grad_input{suffix}"], truth[f"grad_output{suffix}"], truth[f"grad_input_share{suffix}"] = (
            a,
            b,
            a / (a + b),
        )
        if a and b:
            truth[f"grad_cosine{suffix}"] = float((one[mask] * other[mask]).sum()) / a / b
    never = (counts_V2 == 0).sum(0).tolist()
    return truth | {"rows_never_input": never[0], "rows_never_target": never[1]}


@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("world,parallel", LAYOUTS)
def test_gradients_of_both_uses_match_dense(world, parallel, tie):
    truth = dense_gradients(world)
    assert truth["grad_input/never"] == 0 < truth["grad_output/never"] and "grad_cosine/never" not in truth
    for scalars, gone in run_ranks(world, gradients, parallel, tie):
        assert {key: scalars[key] for key in truth} == pytest.approx(truth, rel=1e-9)
        assert not any(key.startswith("grad_") and key not in truth for key in scalars) and gone
        assert any(key.startswith("head_") for key in scalars) == (tie == "untied")
        assert all(math.isfinite(value) for value in scalars.values())


SETTINGS = {"train__steps": 9, "monitor__embedding_every": 3, "checkpoint__every": 1, "checkpoint__keep": 0}


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("health") / "tokens")


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("watched") / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS, vocab__parallel=1))
    return run


def test_the_monitor_changes_no_bit_of_the_training(data, watched, tmp_path):
    """The loss and all tensors are bit-identical, with two replicas."""
    run_ranks(
        2,
        train_rank,
        tiny_config(data, tmp_path / "run", **SETTINGS | {"monitor__embedding_every": 0}, vocab__parallel=1),
    )
    lines = lines_of(watched)
    assert [line["loss"] for line in lines] == [line["loss"] for line in lines_of(tmp_path / "run")]
    assert [line["step"] for line in lines if "grad_cosine" in line] == [3, 6, 9]
    assert [line["step"] for line in lines if "rows" in line] == [3, 6, 9]
    ours, truth = saved_tensors(watched), saved_tensors(tmp_path / "run")
    assert ours.keys() - truth.keys() == {"monitor.seen"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("stop,world,parallel", [(4, 2, 1), (6, 3, 3), (5, 4, 2)])
def test_counts_continue_at_any_split(data, watched, tmp_path, stop, world, parallel):
    run = tmp_path / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS, vocab__parallel=1, train__stop_after=stop))
    changed = {"vocab__parallel": parallel, "train__micro_batch": 2 if world == 3 else 3}
    run_ranks(world, train_rank, tiny_config(data, run, **SETTINGS | changed))
    assert torch.equal(saved_tensors(run)["monitor.seen"], saved_tensors(watched)["monitor.seen"])
    exact = (world, parallel) == (2, 1)
    timed = {*TIMES, "lookup_saved", "lookup_balance"}
    for one, other in zip(lines_of(run), lines_of(watched), strict=True):
        keys = other.keys() - timed - {"rows"}
        assert {key: one[key] for key in keys} == pytest.approx(
            {key: other[key] for key in keys}, rel=0 if exact else 1e-4
        )
    (tokens,) = {line["tokens"] for line in lines_of(run) if line["step"] == 9}
    assert float(saved_tensors(run)["monitor.seen"][:, 1].sum()) == tokens


@pytest.mark.parametrize("first,second", [(0, 3), (3, 0)])
def test_the_monitor_can_be_turned_on_and_off(data, tmp_path, first, second):
    """Counts begin when the monitor is turned on, and are left out after it is turned off."""
    run = tmp_path / "run"
    run_ranks(
        2, train_rank, tiny_config(data, run, **SETTINGS | {"monitor__embedding_every": first}, train__stop_after=4)
    )
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS | {"monitor__embedding_every": second}))
    has = ["monitor.seen" in read_manifest(folder)["tensors"] for folder in checkpoints(run)]
    assert has == [bool(first)] * 4 + [bool(second)] * 5


def test_a_split_run_is_measured_before_and_after_the_split(data, tmp_path):
    """Samples the step of the split, and steps after it."""
    run = tmp_path / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS | {"vocab__untie_at": 5, "monitor__embedding_every": 2}))
    lines = {line["step"]: line for line in lines_of(run)}
    assert [step for step in (2, 4, 6, 8) if "head_norm" in lines[step]] == [6, 8]
    assert all("grad_cosine" in lines[step] for step in (2, 4, 6, 8))


def test_padding_rows_are_not_counted():
    shard = VocabShard.of(0, 1, VOCAB, 8)
    rows = Rows(shard, None, torch.zeros(shard.rows, 2, dtype=torch.float64))
    assert rows.unseen()["rows_of_bin/never"] == VOCAB < shard.rows
    assert rows.of_matrix(torch.zeros(shard.rows, 4))[0]["damaged"] == VOCAB


def test_a_negative_cadence_is_named():
    with pytest.raises(ValueError, match=r"monitor\.embedding_every=-1 must not be negative"):
        MonitorConfig(embedding_every=-1)
