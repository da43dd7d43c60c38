"""The lens gives what a dense float64 computation gives, without hooks, shards or chunks."""

import gc
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pretrain.families.gpt2 import GPT2Config
from pretrain.families.llama import LlamaConfig
from pretrain.lens.lens import LensResult, run_lens
from pretrain.lens.method import Method
from pretrain.vocab import VocabConfig, VocabParallelEmbedding, VocabShard
from pretrain.vocab.readout import Readout
from tests.pretrain.helpers import padded_rows
from tests.pretrain.lens.memory import BUDGET_MIB
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]
VOCAB, WIDTH, LAYERS, LENGTH, K = 37, 24, 3, 11, 3
WINDOW = slice(2, 10)
BODIES = {
    "gpt2": GPT2Config(layers=LAYERS, width=WIDTH, heads=3, context=16),
    "llama": LlamaConfig(layers=LAYERS, width=WIDTH, heads=4, kv_heads=2, inner=32, context=16),
}
ALL_POINTS = ("attention", "mlp", "block")
METHODS = [
    Method(ALL_POINTS, input, norm, decoder)
    for input, norm, decoder in product(("positions", "embedding"), ("full", "plain", "none"), ("none", "mlp", "block"))
]
NEAR = {"rtol": 1e-9, "atol": 1e-9}


def problem(family: str):
    """A body and a matrix with random float64 weights, none at its initial 0 or 1; tokens and targets [B, T]."""
    torch.manual_seed(5)
    body = BODIES[family].body().double()
    for parameter in body.parameters():
        parameter.data = torch.randn_like(parameter) / (2 if parameter.dim() == 1 else WIDTH**0.5)
        parameter.requires_grad_(False)
    tokens = torch.randint(VOCAB, (2, LENGTH + 1))
    targets = tokens[:, 1:].clone()
    targets[0, 4] = -100
    return body, torch.randn(VOCAB, WIDTH, dtype=torch.float64), tokens[:, :-1], targets


def states(family: str, body, hidden: Tensor) -> dict[str, Tensor]:
    """The residual stream at every point, by the family's own formulas."""
    found, extra = {"embedding": hidden}, None
    if family == "gpt2":
        hidden = hidden + body.positions[:LENGTH]
    else:
        extra = body.tables(hidden, None)
    found["positions"] = hidden
    for i, block in enumerate(body.blocks):
        hidden = hidden + block.attention(block.norm1(hidden), extra)
        found[f"block {i} attention"] = hidden
        hidden = hidden + block.mlp(block.norm2(hidden))
        found[f"block {i} mlp"] = found[f"block {i}"] = hidden
    return found


def decode(family: str, body, hidden: Tensor, method: Method) -> Tensor:
    last, extra = body.blocks[-1], body.tables(hidden, None) if family == "llama" else None
    if method.decoder == "block":
        hidden = hidden + last.attention(last.norm1(hidden), extra)
    if method.decoder != "none":
        hidden = hidden + last.mlp(last.norm2(hidden))
    if method.norm == "full":
        return body.norm(hidden)
    if method.norm == "none":
        return hidden
    eps = 1e-5
    centred = hidden - hidden.mean(-1, keepdim=True) if family == "gpt2" else hidden
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def dense(family: str, method: Method, softcap: float | None, embed_scale: float) -> dict[str, Tensor]:
    """All views [R, N], from all logits [R, N, V], and the names of the rows."""
    body, weight, tokens, targets = problem(family)
    found = states(family, body, embed_scale * F.embedding(tokens, weight))
    last = LAYERS - 1
    skipped = {
        "none": [f"block {last}"] if method.norm == "full" else [],
        "mlp": [f"block {last}", f"block {last} mlp"],
        "block": [f"block {last} {point}" for point in ("attention", "mlp")] + [f"block {last}"],
    }[method.decoder]
    names = [method.input] + [name for name in found if name.startswith("block") and name not in skipped]
    rows = [decode(family, body, found[name], method) for name in names]
    rows.append(body.norm(found[f"block {last}"]))
    logits = torch.stack(rows)[:, :, WINDOW].flatten(1, 2) @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    tokens, targets = tokens[:, WINDOW].flatten(), targets[:, WINDOW].flatten()
    p = logits.log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    places = order.argsort(-1) + 1

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    def of(values: Tensor, ids: Tensor) -> Tensor:
        return values.gather(-1, ids.clamp(min=0).expand(len(values), -1)[..., None])[..., 0]

    top = order[..., 0]
    agrees = (top == top[-1]).tolist()
    commitment = [
        min(r for r in range(len(rows) + 1) if all(agrees[q][n] for q in range(r, len(rows))))
        for n in range(len(tokens))
    ]
    return {
        "names": [*names, "output"],
        "top": order[..., :K],
        "probabilities": p.gather(-1, order[..., :K]).exp(),
        "rank of final": of(places, top[-1]),
        "rank of token": of(places, tokens),
        "kl from final": kl(p[-1:], p),
        "kl to final": kl(p, p[-1:]),
        "kl from input": kl(p[:1], p),
        "kl to input": kl(p, p[:1]),
        "entropy": -(p.exp() * p).sum(-1),
        "losses": torch.where(targets >= 0, -of(p, targets), math.nan),
        "right": top[-1] == targets,
        "commitment": torch.tensor(commitment),
    }


def measured(found: LensResult) -> dict:
    reading = found.reading
    return {
        "names": found.rows,
        "top": reading.top_ids,
        "probabilities": found.probabilities,
        "rank of final": reading.ranks[..., 0],
        "rank of token": reading.ranks[..., 1],
        "kl from final": reading.kl_from[..., 0],
        "kl to final": reading.kl_to[..., 0],
        "kl from input": reading.kl_from[..., 1],
        "kl to input": reading.kl_to[..., 1],
        "entropy": reading.entropy,
        "losses": found.losses,
        "right": found.right,
        "commitment": found.commitment,
    }


def owner(
    rank: int, world: int, weight: Tensor, softcap: float | None = None, embed_scale: float = 1.0
) -> VocabParallelEmbedding:
    shard = VocabShard.of(rank, world, VOCAB, 4)
    config, group = VocabConfig(softcap=softcap, embed_scale=embed_scale), dist.group.WORLD if world > 1 else None
    double = {"dtype": torch.float64, "compute_dtype": torch.float64}
    vocab = VocabParallelEmbedding(config, shard, WIDTH, seed=0, group=group, **double)
    vocab.weight.data = padded_rows(weight, shard)
    return vocab


def lens_on_rank(rank, world, softcap, embed_scale):
    results = {}
    for family in BODIES:
        body, weight, tokens, targets = problem(family)
        vocab = owner(rank, world, weight, softcap, embed_scale)
        for method in METHODS:
            found = run_lens(vocab, body, body, tokens, targets, method, window=WINDOW, k=K, memory_mib=0.02)
            results[family, method] = measured(found)
    return results


@pytest.mark.parametrize("world,softcap,embed_scale", [(1, None, 1.0), (2, 2.5, 1.7), (4, None, 1.0)])
def test_views_match_the_dense_truth(world, softcap, embed_scale):
    """Compares every family, input, norm and decoder, at every point."""
    results = run_ranks(world, lens_on_rank, softcap, embed_scale, timeout=120)
    for family, method in results[0]:
        truth = dense(family, method, softcap, embed_scale)
        for rank in range(world):
            for name, value in truth.items():
                found = results[rank][family, method][name]
                if name == "names":
                    assert found == value
                else:
                    note = {"msg": lambda text, at=(rank, family, method, name): f"{at}: {text}"}
                    assert_close(found, value, **NEAR, equal_nan=True, **note)


def test_decoding_with_the_last_part_gives_the_output():
    body, weight, tokens, targets = problem("gpt2")
    for method, row in (
        (Method(decoder="block"), f"block {LAYERS - 2}"),
        (Method(("attention",), decoder="mlp"), f"block {LAYERS - 1} attention"),
    ):
        found = run_lens(owner(0, 1, weight), body, body, tokens, targets, method)
        assert found.reading.kl_from[found.rows.index(row), :, 0].max() < 1e-12


def test_hooks_are_removed():
    body, weight, tokens, targets = problem("gpt2")
    run_lens(owner(0, 1, weight), body, body, tokens, targets, Method(ALL_POINTS, decoder="mlp"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in body.modules())


def test_states_are_held_once_during_the_read(monkeypatch):
    body, weight, tokens, targets = problem("gpt2")
    held, read = [], Readout.read

    def counted(self, hidden_RND, **settings):
        held.append(
            sum(o.nbytes for o in gc.get_objects() if type(o) is Tensor and o.shape[1:] == hidden_RND.shape[1:])
        )
        held[-1] += sum(o.nbytes for o in gc.get_objects() if type(o) is Tensor and o.shape == (*tokens.shape, WIDTH))
        return read(self, hidden_RND, **settings)

    monkeypatch.setattr(Readout, "read", counted)
    found = run_lens(owner(0, 1, weight), body, body, tokens, targets, Method(ALL_POINTS))
    states = len(found.rows) * tokens.numel() * WIDTH * weight.itemsize
    assert len(held) == 2 and states <= held[-1] < 1.6 * states


def test_stride_keeps_the_output():
    assert Method(stride=2).rows(5) == ["positions", "block 0", "block 2", "output"]
    assert Method(stride=2, norm="none").rows(5) == ["positions", "block 0", "block 2", "block 4", "output"]


def test_output_agrees_with_itself_if_logits_differ_by_an_ulp():
    """One pass finds the guess and another ranks it: which of two near logits is larger depends on the chunks."""
    torch.manual_seed(0)
    body, shard = GPT2Config(layers=3, width=256, heads=4, context=512).body(), VocabShard.of(0, 1, 4096)
    for parameter in body.parameters():
        parameter.data.normal_(0, 0.1)
    vocab = VocabParallelEmbedding(VocabConfig(), shard, 256, seed=0)
    vocab.weight.data[2048:] = vocab.weight.data[:2048] * (1 + 1e-7 * torch.randint(-2, 3, (2048, 256)))
    tokens = torch.randint(4096, (1, 513))
    found = run_lens(vocab, body, body, tokens[:, :-1], tokens[:, 1:], Method(), memory_mib=0.5, k=1)
    assert found.commitment.max() <= len(found.rows) - 1 and (found.reading.ranks[-1, :, 0] == 1).all()


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"points": ("middle",)}, "points=middle must be one of attention, mlp, block"),
        ({"points": ()}, "points= must be one of"),
        ({"input": "text"}, "input=text must be one of positions, embedding"),
        ({"norm": "half"}, "norm=half must be one of full, plain, none"),
        ({"decoder": "all"}, "decoder=all must be one of none, mlp, block"),
        ({"stride": 0}, "stride=0 must be at least 1"),
    ],
)
def test_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Method(**settings)


def test_memory_is_bounded_at_a_large_vocabulary():
    """128 positions × 4 rows × 128,000 ids would be 262 MB of logits, and several times that with temporaries.

    Runs the command of docs/lens.md.
    """
    command = [sys.executable, "-m", "tests.pretrain.lens.memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5 * BUDGET_MIB
