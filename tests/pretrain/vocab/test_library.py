"""`pretrain.vocab` in a user's own program: the dense result on any number of ranks, or an error."""

import io
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pretrain.vocab
from pretrain.vocab import VocabParallelEmbedding, clip_grad_norm_, summed
from tests.ranks import run_ranks

VOCAB, WIDTH = 300, 6
NEAR = {"rtol": 1e-10, "atol": 1e-10}
F64 = {"dtype": torch.float64, "std": 1.0}


def test_package_exports_seven_names():
    assert len(pretrain.vocab.__all__) == 7
    public = {name for name, value in vars(pretrain.vocab).items() if callable(value) and not name.startswith("_")}
    assert public == set(pretrain.vocab.__all__)


class Model(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, **settings)
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


def in_float64(**settings) -> Model:
    return Model(**F64, **settings)


def batch(world: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns tokens and targets of each rank [B, T], B = rank + 1; rank 1 has none."""
    generator = torch.Generator().manual_seed(world)
    sizes = [(0 if rank == 1 else rank + 1, 5) for rank in range(world)]
    tokens, targets = ([torch.randint(VOCAB, size, generator=generator) for size in sizes] for _ in range(2))
    targets[0][0, 2] = -100
    return tokens, targets


def dense_step(world: int, tie: str, max_norm: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Computes loss, norm and clipped gradients of all ranks' tokens in one process, by torch's own functions."""
    model = in_float64(tie=tie)
    matrices = {name: matrix.requires_grad_() for name, matrix in model.vocab.full_state_dict().items()}
    matrix, head = matrices["embedding.weight"], matrices.get("head.weight", matrices["embedding.weight"])
    tokens, targets = map(torch.cat, batch(world))
    embedded = F.embedding(tokens, matrix)
    logits = (embedded + model.body(embedded)) @ head.T
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 64
    loss.backward()
    parameters = {**matrices, **dict(model.body.named_parameters())}
    norm = nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    return loss.detach(), norm, {name: parameter.grad for name, parameter in parameters.items()}


def rank_step(rank, world, tie, wrapper, scaled, max_norm):
    """Computes the same on one of the ranks. The hidden states of the lookup have a use besides the body."""
    model = Model(tie=tie, **F64)
    if wrapper == "ddp":
        run = nn.parallel.DistributedDataParallel(model.body)
    else:
        from torch.distributed.fsdp import fully_shard

        run = fully_shard(model.body)
    tokens, targets = (part[rank] for part in batch(world))
    embedded = model.vocab(tokens)
    hidden = embedded + summed(run)(embedded)
    if scaled:
        loss = model.vocab.loss(hidden, targets, scale=1 / 64).loss
    else:
        loss = model.vocab.loss(hidden, targets).loss / 64
    loss.backward()
    norm = clip_grad_norm_(model.vocab, model.parameters(), max_norm)  # includes the rows, which count once
    rows = {name: rows.grad for name, rows in model.vocab.named_rows().items()}
    body = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.body.named_parameters()}
    return loss.detach(), norm, rows, body


@pytest.mark.parametrize(
    "world,tie,wrapper,scaled",
    [
        (1, "tied", "ddp", True),
        (2, "untied", "ddp", True),
        (2, "tied", "fully_shard", False),
        (3, "tied", "ddp", False),
        (3, "untied", "fully_shard", True),
        (4, "tied", "ddp", True),
    ],
)
def test_step_matches_dense_with_different_batches_per_rank(world, tie, wrapper, scaled):
    loss, norm, gradients = dense_step(world, tie, 0.01)
    assert norm > 0.01, "the clip does nothing"
    results = run_ranks(world, rank_step, tie, wrapper, scaled, 0.01)
    torch.testing.assert_close(sum(part for part, *_ in results), loss, **NEAR)
    assert len({float(norm) for _, norm, *_ in results}) == 1
    torch.testing.assert_close(results[0][1], norm, **NEAR)
    for name in results[0][2]:
        matrix = torch.cat([rows[name] for _, _, rows, _ in results])
        torch.testing.assert_close(matrix[:VOCAB], gradients[name], **NEAR)
        assert (matrix[VOCAB:] == 0).all()
    for *_, body in results:
        for name, gradient in body.items():
            torch.testing.assert_close(gradient, gradients[name], **NEAR)


def test_too_small_max_tokens_is_an_error():
    vocab = VocabParallelEmbedding.create(VOCAB, WIDTH)
    with pytest.raises(ValueError, match="max_tokens_per_rank=1 must be at least the 2 ids of this rank"):
        vocab.lookup(torch.tensor([1, 2]), max_tokens_per_rank=1)


def rank_clip(rank, world):
    vocab = VocabParallelEmbedding.create(VOCAB, WIDTH)
    vocab.weight.grad = torch.full_like(vocab.weight, float("inf") if rank == world - 1 else 1.0)
    body = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="the norm of the gradient is inf"):
        clip_grad_norm_(vocab, body.parameters(), 1.0, error_if_nonfinite=True)
    vocab.weight.grad = torch.full_like(vocab.weight, 1e-4)
    clip_grad_norm_(vocab, body.parameters(), 1.0)
    return bool((vocab.weight.grad == 1e-4).all())


def test_small_gradient_is_not_clipped_and_infinite_one_may_raise():
    assert run_ranks(2, rank_clip) == [True, True]


def rank_states(rank, world, tie):
    """Saves the state, changes the rows and loads it again, also as torch.distributed.checkpoint does."""
    vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=3, tie=tie)
    state = vocab.full_state_dict()
    views = {name: view.full_tensor()[:VOCAB] for name, view in vocab.dtensor_state_dict().items()}
    assert all(torch.equal(views[name], state[name]) for name in state)
    other = {name: matrix + 1 for name, matrix in state.items()}
    vocab.load_full_state_dict(other)
    again = vocab.full_state_dict(device="cpu")
    assert all(torch.equal(again[name], other[name]) for name in other)
    assert (vocab.weight.detach()[vocab.shard.valid_rows :] == 0).all()
    view = vocab.dtensor_state_dict()["embedding.weight"]
    view.to_local().fill_(7)
    assert (vocab.weight == 7).all() or vocab.weight.numel() == 0
    return state


@pytest.mark.parametrize("world,tie", [(1, "tied"), (2, "untied"), (3, "tied"), (4, "tied")])
def test_full_state_is_equal_on_every_rank_and_split(world, tie):
    expected = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=3, tie=tie).full_state_dict()
    for state in run_ranks(world, rank_states, tie):
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) and len(state[name]) == VOCAB for name in expected)


def test_mismatched_state_is_an_error():
    vocab = VocabParallelEmbedding.create(VOCAB, WIDTH)
    with pytest.raises(ValueError, match="the state has weight, but this vocabulary needs"):
        vocab.load_full_state_dict({"weight": torch.zeros(VOCAB, WIDTH)})
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(150, 6\), but the whole matrix has \(300, 6\)"):
        vocab.load_full_state_dict({"embedding.weight": torch.zeros(VOCAB // 2, WIDTH)})
    padded = torch.ones(vocab.shard.padded_size, WIDTH)
    vocab.load_full_state_dict({"embedding.weight": padded})
    assert (vocab.weight[:VOCAB] == 1).all() and (vocab.weight[VOCAB:] == 0).all()


def refused(act) -> str:
    """Returns the one line of the error that `act` raises."""
    try:
        act()
    except (RuntimeError, ValueError) as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def rank_wrappers(rank, world):
    """Returns what each wrapper says, and True if it left the rows unchanged."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    cpu = torch.device("cpu")
    rows = in_float64().vocab.weight.detach().clone()
    told, half_told = in_float64(tie="untied"), in_float64(tie="untied")
    told._ddp_params_and_buffers_to_ignore = ["vocab.weight", "vocab.head_weight"]
    half_told._ddp_params_and_buffers_to_ignore = ["vocab.weight"]
    sharded, flat = in_float64(), in_float64()
    answers = {
        "ddp": refused(lambda: DistributedDataParallel(in_float64())),
        "ddp of the vocabulary": refused(lambda: DistributedDataParallel(in_float64().vocab)),
        "ddp, half told": refused(lambda: DistributedDataParallel(half_told)),
        "ddp, told": refused(lambda: DistributedDataParallel(told)),
        "fully_shard": refused(lambda: fully_shard(in_float64())),
        "fully_shard of the vocabulary": refused(lambda: fully_shard(in_float64().vocab)),
        "fully_shard, told": refused(lambda: fully_shard(sharded, ignored_params=set(sharded.vocab.parameters()))),
        "fsdp": refused(lambda: FullyShardedDataParallel(in_float64(), device_id=cpu)),
        "fsdp, original": refused(lambda: FullyShardedDataParallel(in_float64(), device_id=cpu, use_orig_params=True)),
        "fsdp, told": refused(lambda: FullyShardedDataParallel(flat, device_id=cpu, ignored_states=[flat.vocab])),
        "state_dict": refused(lambda: in_float64().state_dict()),
        "half": refused(lambda: in_float64().half()),
        "double": refused(lambda: in_float64().double()),
    }
    assert all(torch.equal(model.vocab.weight, rows) for model in (told, half_told, sharded, flat))
    return answers


def test_wrapper_that_would_damage_rows_is_an_error():
    for answers in run_ranks(2, rank_wrappers):
        overwrite = "DistributedDataParallel would overwrite each rank's rows of {} with those of rank 0"
        for key, names in {
            "ddp": "vocab.weight",
            "ddp of the vocabulary": "weight",
            "ddp, half told": "vocab.weight, vocab.head_weight",
        }.items():
            assert answers.pop(key).startswith(overwrite.format(names))
        for key in ("fully_shard", "fully_shard of the vocabulary", "fsdp", "fsdp, original"):
            assert "cannot be sharded again" in answers.pop(key)
        assert re.match(r"state_dict\(\) of one rank would hold rows \[\d+, \d+\) of", answers.pop("state_dict"))
        assert answers.pop("half").startswith("the rows are main weights in torch.float64 and cannot become")
        assert set(answers.values()) == {""}, answers


def rank_overwritten(rank, world, multiple):
    untouched, overwritten = Model(multiple=multiple), Model(multiple=multiple)
    dist.broadcast(overwritten.vocab.weight.data, 0)
    token = torch.tensor([1])
    return refused(lambda: untouched.vocab(token)), refused(lambda: overwritten.vocab(token))


@pytest.mark.parametrize("multiple", [2, 128])
def test_overwritten_rows_are_an_error_at_the_first_call(multiple):
    """Rank 1 has padding, or none."""
    for untouched, overwritten in run_ranks(2, rank_overwritten, multiple):
        assert untouched == ""
        assert overwritten.startswith("ranks 0 and 1 own different rows of the vocabulary, but hold the same values")


def rank_created_too_early(rank, world, vocab_of):
    vocab = VocabParallelEmbedding(*vocab_of, WIDTH, seed=0)  # as if there had been no process group
    return refused(lambda: vocab(torch.tensor([1])))


def test_matrix_created_before_the_group_is_an_error():
    alone = VocabParallelEmbedding.create(VOCAB, WIDTH)
    for answer in run_ranks(2, rank_created_too_early, (alone.config, alone.shard)):
        assert answer.startswith("this VocabParallelEmbedding was created before the process group")


def test_one_process_behaves_like_any_module():
    model = in_float64()
    torch.save(model.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    other = in_float64(seed=9)
    other.load_state_dict(torch.load(saved))
    assert torch.equal(other.vocab(torch.tensor([[1, 2]])), model.vocab(torch.tensor([[1, 2]])))


def test_gradients_zeroed_before_backward_are_an_error():
    """Lightning does this; the rows' gradient of a loss with `scale` is there before backward."""
    model = in_float64()
    loss = model.vocab.loss(model.body(model.vocab(torch.tensor([[1, 2]]))), torch.tensor([[2, 3]]), scale=0.5).loss
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zeroed between loss and backward"):
        loss.backward()


@pytest.mark.parametrize("key", ["size", "parallel", "untie_at"])
def test_trainer_settings_are_refused(key):
    with pytest.raises(ValueError, match=f"vocab.{key} is a setting of the trainer"):
        VocabParallelEmbedding.create(VOCAB, WIDTH, **{key: 2})


def test_settings_reach_the_config():
    vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, tie="untied", z_loss=0.1, softcap=5.0, multiple=1)
    assert vocab.config.z_loss == 0.1 and vocab.config.softcap == 5.0 and vocab.head_weight is not None
    assert vocab.shard.padded_size == VOCAB and vocab.compute_dtype == torch.float32
    with pytest.raises(TypeError, match="zloss"):
        VocabParallelEmbedding.create(VOCAB, WIDTH, zloss=0.1)
