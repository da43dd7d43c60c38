"""The owner of the matrix: its tied gradient is the sum of the gradients of both uses."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.vocab import VocabConfig, VocabParallelEmbedding, VocabShard, embedding
from pretrain.vocab.loss import compute_rows
from tests.pretrain.helpers import padded_rows
from tests.ranks import run_ranks

VOCAB, MULTIPLE, WIDTH, NEAR = 37, 8, 6, {"rtol": 1e-10, "atol": 1e-10}
OPTIONS = {"z_loss": 0.1, "softcap": 5.0}


def problem(world: int):
    """Returns weight [V, D], mixer [D, D] (a body), tokens and targets [world, B, T]."""
    generator = torch.Generator().manual_seed(world)
    weight, mixer = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for rows in (VOCAB, WIDTH))
    tokens, targets = torch.randint(VOCAB, (2, world, 2, 5), generator=generator)
    targets[:, 0, 2] = -100
    return weight, mixer, tokens, targets


def body(hidden: Tensor, mixer: Tensor) -> Tensor:
    return hidden + torch.tanh(hidden @ mixer)


def rank_gradients(rank, world, tie):
    weight, mixer, tokens, targets = problem(world)
    vocab = VocabParallelEmbedding(
        VocabConfig(multiple=MULTIPLE, tie=tie, **OPTIONS),
        VocabShard.of(rank, world, VOCAB, MULTIPLE),
        WIDTH,
        seed=0,
        group=dist.group.WORLD,
        compute_dtype=torch.float64,
        dtype=torch.float64,
    )
    for rows in vocab.parameters():
        rows.data = padded_rows(weight, vocab.shard)
    loss = vocab.loss(body(vocab.lookup(tokens[rank]), mixer), targets[rank]).loss
    loss.backward()
    return loss.detach(), {name: rows.grad for name, rows in vocab.named_rows().items()}


def dense_gradients(world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss, and the gradients of the matrix as input and as output, by autograd."""
    weight, mixer, tokens, targets = problem(world)
    enter, leave = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = OPTIONS["softcap"] * torch.tanh(body(F.embedding(tokens, enter), mixer) @ leave.T / OPTIONS["softcap"])
    loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="sum")
    loss = loss + OPTIONS["z_loss"] * (logits.logsumexp(-1).square() * (targets >= 0)).sum()
    loss.backward()
    return loss.detach(), enter.grad, leave.grad


@pytest.mark.parametrize("world", [1, 2, 3])
def test_tied_gradient_is_the_sum_of_both_uses(world):
    loss, enter, leave = dense_gradients(world)
    uses = {"untied": {"embedding.weight": enter, "head.weight": leave}, "tied": {"embedding.weight": enter + leave}}
    for tie, truth in uses.items():
        results = run_ranks(world, rank_gradients, tie)
        torch.testing.assert_close(sum(part for part, _ in results), loss, **NEAR)
        for name, expected in truth.items():
            gradient = torch.cat([gradients[name] for _, gradients in results])
            torch.testing.assert_close(gradient[:VOCAB], expected, **NEAR)
            assert (gradient[VOCAB:] == 0).all(), "padding rows got a gradient"


@pytest.mark.parametrize("embed_scale,input_grad_scale", [(2.0, 1.0), (1.0, 0.0), (3.0, 0.25)])
def test_input_scales_match_autograd(embed_scale, input_grad_scale):
    """embed_scale is part of the function; input_grad_scale belongs to the gradient only."""
    weight, mixer, tokens, targets = problem(1)
    mixer.requires_grad_()
    config = VocabConfig(multiple=1, embed_scale=embed_scale, input_grad_scale=input_grad_scale)
    vocab = VocabParallelEmbedding(
        config, VocabShard.of(0, 1, VOCAB, 1), WIDTH, seed=0, compute_dtype=torch.float64, dtype=torch.float64
    )
    vocab.weight.data = weight.clone()
    vocab.loss(body(vocab.lookup(tokens[0]), mixer), targets[0], scale=1.0).loss.backward()
    ours, mixer.grad = mixer.grad, None

    enter, leave = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = body(embed_scale * F.embedding(tokens[0], enter), mixer) @ leave.T
    F.cross_entropy(logits.flatten(0, 1), targets[0].flatten(), reduction="sum").backward()
    torch.testing.assert_close(vocab.weight.grad, input_grad_scale * enter.grad + leave.grad, **NEAR)
    torch.testing.assert_close(ours, mixer.grad, **NEAR)


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_scaled_loss_adds_to_the_lookups_gradient(tie):
    """Compares two micro-batches, as in training, with a loss that is divided by hand."""
    _, mixer, tokens, targets = problem(2)
    shard = VocabShard.of(0, 1, VOCAB, MULTIPLE)
    gradients = []
    for scaled in (True, False):
        vocab = VocabParallelEmbedding(
            VocabConfig(multiple=MULTIPLE, tie=tie, **OPTIONS),
            shard,
            WIDTH,
            seed=0,
            std=1.0,
            compute_dtype=torch.float64,
            dtype=torch.float64,
        )
        for i in range(2):
            hidden = body(vocab.lookup(tokens[i]), mixer)
            if scaled:
                loss = vocab.loss(hidden, targets[i], scale=0.125).loss
                assert vocab.output_weight.grad is not None, "complete before backward"
            else:
                loss = vocab.loss(hidden, targets[i]).loss / 8
            loss.backward()
        gradients.append({name: rows.grad for name, rows in vocab.named_rows().items()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], **NEAR)


def test_no_gradient_without_grad_mode():
    vocab = VocabParallelEmbedding(VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0)
    with torch.no_grad():
        out = vocab.loss(torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.long), scale=0.5, metrics=True)
    assert vocab.weight.grad is None and out.correct.shape == (6,)


def test_loss_uses_the_current_rows_in_bf16():
    """No copy of the rows is kept by itself: a fused AdamW changes them without raising autograd's version counter."""
    vocab = VocabParallelEmbedding(
        VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0, compute_dtype=torch.bfloat16
    )
    hidden, targets = torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.long)
    adamw = torch.optim.AdamW(vocab.parameters(), lr=0.1, fused=True)
    losses = []
    for _ in range(4):
        loss = vocab.loss(hidden.requires_grad_(), targets, scale=1.0).loss
        loss.backward()
        losses.append(float(loss.detach()))
        adamw.step()
        adamw.zero_grad()
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_rows_keep_every_bit(dtype):
    """Two steps of three micro-batches, with and without `rows_unchanged`; an evaluation between them."""
    results = []
    for shared in (True, False):
        vocab = VocabParallelEmbedding(
            VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0, std=1.0, compute_dtype=dtype
        )
        adamw = torch.optim.AdamW(vocab.parameters(), lr=0.1, fused=True)
        generator, seen = torch.Generator().manual_seed(0), []
        for _ in range(2):
            with vocab.rows_unchanged() if shared else nullcontext():
                for _ in range(3):
                    hidden = torch.randn(2, 3, WIDTH, generator=generator).requires_grad_()
                    loss = vocab.loss(hidden, torch.ones(2, 3, dtype=torch.long), scale=0.2).loss
                    loss.backward()
                    seen += [loss.detach(), hidden.grad]
            adamw.step()
            adamw.zero_grad()
            with vocab.rows_unchanged() if shared else nullcontext(), torch.no_grad():
                seen.append(vocab.loss(hidden, torch.ones(2, 3, dtype=torch.long)).loss)
        assert vocab._shared_rows_vD is None
        results.append([*seen, vocab.weight.detach()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_rows_are_copied_once_while_unchanged(monkeypatch):
    copies = []
    monkeypatch.setattr(embedding, "compute_rows", lambda *args: copies.append(1) or compute_rows(*args))
    vocab = VocabParallelEmbedding(
        VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0, compute_dtype=torch.bfloat16
    )
    hidden, targets = torch.randn(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.long)
    with vocab.rows_unchanged():
        for _ in range(3):
            vocab.loss(hidden, targets, scale=1.0)
    assert len(copies) == 1
    vocab.loss(hidden, targets, scale=1.0)
    assert len(copies) == 1, "outside, a call makes its own"


def test_failed_loss_leaves_no_gradient():
    vocab = VocabParallelEmbedding(VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0)
    with pytest.raises(ValueError, match="outside"):
        vocab.loss(torch.randn(1, 2, WIDTH), torch.full((1, 2), VOCAB), scale=1.0)
    assert vocab.weight.grad is None


def test_untied_matrices_are_two_different_parameters():
    def build(tie: str) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(VocabConfig(tie=tie), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0)

    tied, untied = build("tied"), build("untied")
    assert list(tied.named_rows()) == ["embedding.weight"] and tied.output_weight is tied.weight
    assert list(untied.named_rows()) == ["embedding.weight", "head.weight"]
    assert len(list(tied.parameters())) == 1 and len(list(untied.parameters())) == 2
    assert torch.equal(tied.weight, untied.weight) and not torch.equal(untied.weight, untied.head_weight)


def test_lookup_returns_compute_dtype():
    vocab = VocabParallelEmbedding(
        VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0, compute_dtype=torch.bfloat16
    )
    assert vocab.lookup(torch.zeros(2, 3, dtype=torch.long)).dtype == torch.bfloat16
    assert vocab.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"size": 0}, r"vocab.size=0 must be in \[1, 16777216\]"),
        ({"multiple": 0}, "vocab.multiple=0 must be at least 1"),
        ({"parallel": "0"}, "vocab.parallel=0 must be auto or a positive number of ranks"),
        ({"parallel": "²"}, "vocab.parallel=² must be auto or a positive number of ranks"),
        ({"parallel": "some"}, "vocab.parallel=some must be auto or a positive number of ranks"),
        ({"tie": "yes"}, "vocab.tie=yes must be tied or untied"),
        ({"untie_at": 0}, "vocab.untie_at=0 must be at least 1"),
        ({"untie_at": 9, "tie": "untied"}, "vocab.untie_at=9 needs vocab.tie=tied"),
        ({"embed_scale": 0.0}, "vocab.embed_scale=0.0 must be positive"),
        ({"input_grad_scale": -1.0}, "vocab.input_grad_scale=-1.0 must be a number of at least 0"),
        ({"z_loss": -1.0}, "vocab.z_loss=-1.0 must be a number of at least 0"),
        ({"label_smoothing": 1.0}, r"vocab.label_smoothing=1.0 must be in \[0, 1\)"),
        ({"head_memory_mib": 0}, "vocab.head_memory_mib=0 must be at least 1"),
        ({"softcap": 0.0}, "vocab.softcap=0.0 must be positive"),
    ],
)
def test_error_names_a_wrong_setting(setting, message):
    with pytest.raises(ValueError, match=message):
        VocabConfig(**setting)
