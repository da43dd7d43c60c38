"""The sharded loss on one process against a dense float64 truth."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.chunks import Chunks, chunk_budget
from pretrain.vocab.collectives import LocalComm, Pending
from pretrain.vocab.head import Gradients, Head, RowGradient, compute_losses
from pretrain.vocab.kernels.torch import TorchKernels
from pretrain.vocab.objective import Objective
from tests.pretrain.vocab.oracle import OPTIONS, dense, problem
from tests.ranks import run_ranks


def alone(hidden, weight, targets, **options):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(0, 1, len(weight), 1)
    out = vocab_parallel_linear_cross_entropy(x, w, targets, shard=shard, **options)
    out.loss.sum().backward()
    return out, x.grad, w.grad


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    vocab_size=st.integers(1, 50),
    chunk=st.integers(1, 25),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    smoothing=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_random_problems_match_dense_on_one_process(tokens, vocab_size, chunk, scale, z_loss, smoothing, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, vocab_size, (tokens,), generator=generator)
    targets[targets < 0] = -100
    options = {"z_loss": z_loss, "label_smoothing": smoothing} | ({"softcap": softcap} if softcap else {})
    truth = dense(hidden, weight, targets, torch.ones(tokens, dtype=torch.float64), options)
    out, dhidden, dweight = alone(hidden, weight, targets, chunk_tokens=chunk, **options)
    near = {"rtol": 1e-9, "atol": 1e-9}
    assert_close(out.loss, truth["losses"].sum(), **near)
    assert_close(dhidden, truth["dhidden"], **near)
    assert_close(dweight, truth["dweight"], **near)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_match_dense(size):
    weight = torch.tensor([[size], [0.0], [-size]])
    out, dhidden, dweight = alone(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    truth = dense(torch.ones(3, 1).double(), weight.double(), torch.tensor([0, 1, 2]), torch.ones(3).double(), {})
    assert_close(out.loss.double(), truth["losses"].sum())
    assert_close(dhidden.double(), truth["dhidden"])
    assert_close(dweight.double(), truth["dweight"])


def confident() -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden, weight and targets in bf16, with p_y of about 0.996."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    targets = torch.randint(512, (256,), generator=generator)
    hidden = (0.18 * weight[targets].float() + 0.02 * torch.randn(256, 64, generator=generator)).bfloat16()
    return hidden, weight, targets


def rank_confident(rank, world):
    hidden, weight, targets = confident()
    shard = VocabShard.of(rank, world, 512)
    main = weight[shard.start : shard.stop].float().requires_grad_()
    mine = slice(rank * 256 // world, (rank + 1) * 256 // world)
    options = {"shard": shard, "group": dist.group.WORLD}
    vocab_parallel_linear_cross_entropy(hidden[mine], main, targets[mine], **options).loss.backward()
    return main.grad


@pytest.mark.parametrize("world", [1, 2])
def test_confident_targets_in_bf16_have_accurate_gradients(world):
    """The target's entry stays out of the bf16 matmuls: the error of dW is below 1e-3 if p_y is about 0.996."""
    hidden, weight, targets = confident()
    truth = dense(hidden.double(), weight.double(), targets, torch.ones(256).double(), {})
    assert 0.9 < truth["losses"].neg().exp().mean() < 0.9999
    dweight = torch.cat(run_ranks(world, rank_confident))
    assert dweight.dtype == torch.float32
    error = (dweight.double() - truth["dweight"]).norm() / truth["dweight"].norm()
    logits = hidden @ weight.T  # the textbook way: probabilities minus one, rounded to bf16
    probabilities = logits.float().softmax(-1)
    probabilities[torch.arange(256), targets] -= 1
    textbook = (probabilities.bfloat16().T @ hidden).double() - truth["dweight"]
    assert error < 1e-3 < textbook.norm() / truth["dweight"].norm()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_bf16_loss_is_never_negative(size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator).bfloat16()
    targets = torch.arange(50)
    out, dhidden, dweight = alone(size * weight, weight, targets, reduction="none")
    assert (out.loss >= 0).all() and dhidden.isfinite().all() and dweight.isfinite().all()


class Matmuls(TorchDispatchMode):
    """Counts the matmuls."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_takes_three_matmuls_or_one_without_gradients(options):
    hidden, weight, targets = problem([9], 37, "some")
    needs_lse_first = {
        "label_smoothing",
        "softcap",
    } <= options.keys()  # these options need the normaliser first, so the logits are computed twice
    with Matmuls() as matmuls:
        out, _, _ = alone(hidden, weight, targets, **options)
    assert matmuls.count == 3 + needs_lse_first
    with Matmuls() as matmuls, torch.no_grad():
        silent = vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, shard=VocabShard.of(0, 1, 37, 1), **options
        )
    assert matmuls.count == 1
    assert torch.equal(silent.loss, out.loss.detach())
    with Matmuls() as matmuls:
        alone(hidden, weight, targets, reduction="none", **options)
    assert matmuls.count == 4


def test_metrics_are_none_unless_asked_for():
    hidden, weight, targets = problem([9], 37, "some")
    out, dhidden, dweight = alone(hidden, weight, targets)
    lean, lean_dhidden, lean_dweight = alone(hidden, weight, targets, metrics=False)
    assert lean.entropy is None and lean.correct is None
    assert torch.equal(lean.loss, out.loss) and torch.equal(lean.lse, out.lse)
    assert torch.equal(lean_dhidden, dhidden) and torch.equal(lean_dweight, dweight)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_backward_recomputes_gradients(reduction):
    """The second backward computes the gradients again."""
    hidden, weight, targets = problem([9], 37, "some")
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(0, 1, 37, 1)
    loss = vocab_parallel_linear_cross_entropy(x, w, targets, shard=shard, reduction=reduction).loss.sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for again, once in zip(torch.autograd.grad(3 * loss, (x, w)), first, strict=True):
        assert_close(again, 3 * once, rtol=1e-12, atol=1e-12)


def with_main_grad(hidden, weight, targets, main_grad, **options):
    x = hidden.clone().requires_grad_()
    shard = VocabShard.of(0, 1, len(weight), 1)
    return vocab_parallel_linear_cross_entropy(x, weight, targets, shard=shard, main_grad_vD=main_grad, **options), x


def test_main_gradient_adds_up_over_micro_batches():
    hidden, weight, targets = problem([20], 37, "some")
    truth = dense(hidden, weight, targets, torch.full((20,), 0.05, dtype=torch.float64), {})
    main_grad = torch.zeros_like(weight)
    total = 0.0
    for part in (slice(0, 7), slice(7, 20)):
        out, x = with_main_grad(hidden[part], weight, targets[part], main_grad, scale=0.05)
        out.loss.backward()
        assert_close(x.grad, truth["dhidden"][part], rtol=1e-10, atol=1e-10)
        total += out.loss.detach()
    assert_close(total, 0.05 * truth["losses"].sum())
    assert_close(main_grad, truth["dweight"], rtol=1e-10, atol=1e-10)


def test_main_gradient_allows_one_backward_without_a_factor():
    hidden, weight, targets = problem([9], 37, "some")
    out, _ = with_main_grad(hidden, weight, targets, torch.zeros_like(weight))
    with pytest.raises(ValueError, match=r"not for 0\.5 times it: use scale"):
        (out.loss * 0.5).backward()
    out, _ = with_main_grad(hidden, weight, targets, torch.zeros_like(weight))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        out.loss.backward()
    with pytest.raises(ValueError, match='main_grad_vD needs reduction="sum"'):
        with_main_grad(hidden, weight, targets, torch.zeros_like(weight), reduction="none")
    with pytest.raises(ValueError, match=r"dtype torch.float32.*torch.float64"):
        with_main_grad(hidden, weight, targets, torch.zeros_like(weight).float())


def test_chunk_keeps_to_its_budget():
    """A chunk has as many tokens as fit, or one if none fits. Its factors need most of the memory."""
    shard = VocabShard.of(0, 4, 131_072)
    kernels = TorchKernels()
    tokens = chunk_budget(shard, 1024, torch.bfloat16, 64, kernels)
    assert 0.6 * 64 * 2**20 < tokens * shard.rows * 2 < 63 * 2**20
    assert tokens % 128 == 0
    large_slabs = TorchKernels(slab_bytes=2**40)
    assert chunk_budget(shard, 1024, torch.bfloat16, 64, large_slabs) >= tokens / 2 - 128  # never more than half of it
    assert chunk_budget(VocabShard.of(0, 1, 2**24), 1024, torch.float32, 1, kernels) == 1
    assert chunk_budget(shard, 1024, torch.bfloat16, None, kernels) == tokens  # a CPU's default is 64
    whole = VocabShard.of(0, 1, 524_288)  # a quarter of the rows' gradient is 512 MiB
    assert chunk_budget(whole, 1024, torch.bfloat16, None, kernels) == chunk_budget(
        whole, 1024, torch.bfloat16, 512, kernels
    )


class NewTensors(TorchDispatchMode):
    """Returns the largest tensor that any operation makes, without views of known ones."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_makes_no_tensor_as_large_as_rows_or_logits(options):
    tokens, vocab_size, width = 64, 1000, 48
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab_size, width)
    targets, main_grad = torch.randint(vocab_size, (tokens,)), torch.zeros(vocab_size, width)
    with NewTensors(hidden, weight, main_grad) as new:
        out, _ = with_main_grad(hidden, weight, targets, main_grad, chunk_tokens=8, **options)
        out.loss.backward()
    assert 8 * vocab_size <= new.largest < min(vocab_size * width, tokens * vocab_size) / 2


def test_transposed_inputs_match_contiguous_ones():
    """Weight and hidden states may be transposed; the main gradient must be contiguous."""
    hidden, weight, targets = problem([9], 37, "some")
    out, dhidden, dweight = alone(hidden, weight, targets)
    other = alone(hidden.T.contiguous().T, weight.T.contiguous().T, targets)
    assert torch.equal(other[0].loss, out.loss) and torch.equal(other[1], dhidden) and torch.equal(other[2], dweight)
    with pytest.raises(ValueError, match="main_grad_vD must be contiguous"):
        with_main_grad(hidden, weight, targets, torch.zeros(6, 37, dtype=torch.float64).T)


def recorded(events: list[str], *names: str):
    """Returns a class decorator: these methods record their name before they run."""

    def wrap(name, method):
        def record(self, *args, **kwargs):
            events.append(name)
            return method(self, *args, **kwargs)

        return record

    def decorate(cls):
        for name in names:
            setattr(cls, name, wrap(name, getattr(cls, name)))
        return cls

    return decorate


def test_collectives_run_behind_matmuls():
    """The next chunk's hidden states travel from the start; statistics behind factors · rows; dX behind dW."""
    events: list[str] = []

    class Noted(Pending):
        def __init__(self, name: str, result: Tensor) -> None:
            super().__init__(result)
            self.name = name

        def wait(self):
            events.append(f"has {self.name}")
            return super().wait()

    class TokenComm(LocalComm):
        def gather(self, mine_c):
            events.append("send hidden" if mine_c.dim() == 2 else "send targets")
            return Noted("hidden" if mine_c.dim() == 2 else "targets", mine_c.unsqueeze(0))

        def stack(self, statistics_km):
            events.append("send statistics")
            return Noted("statistics", statistics_km.unsqueeze(0))

        def sum(self, partial_mD):
            events.append("send dX")
            return Noted("dX", partial_mD)

    @recorded(events, "exponentials", "times_weight", "add_weight_gradient")
    class Kernels(TorchKernels):
        pass

    hidden, weight, targets = problem([9], 37, "none")
    head = Head(VocabShard.of(0, 1, 37, 1), TokenComm(), Kernels(), Objective(37))
    gradients = Gradients(head, weight, torch.empty_like(hidden), RowGradient(torch.zeros_like(weight), new=False))
    compute_losses(head, Chunks(head.traffic, hidden, 3, None), weight, targets, 1.0, gradients)
    of_a_chunk = ["exponentials", "send statistics", "times_weight", "has statistics"]
    assert events == [
        *("send targets", "has targets"),
        *("send hidden", "send hidden", "has hidden", *of_a_chunk, "send dX", "add_weight_gradient"),
        *("send hidden", "has hidden", *of_a_chunk, "has dX", "send dX", "add_weight_gradient"),
        *("has hidden", *of_a_chunk, "has dX", "send dX", "add_weight_gradient", "has dX"),
    ]


@pytest.mark.parametrize("bad", [37, -1, 1000])
def test_error_names_a_target_outside_the_vocabulary(bad):
    hidden, weight, targets = problem([9], 37, "none")
    targets[4] = bad
    with pytest.raises(ValueError, match=rf"target {bad} at position 4 .*vocab_size=37"):
        alone(hidden, weight, targets)


def test_error_names_a_weight_of_another_shard():
    hidden, weight, targets = problem([9], 37, "none")
    with pytest.raises(ValueError, match=r"weight has shape \(37, 6\).*\(40, 6\)"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, shard=VocabShard.of(0, 1, 37, 8))


@pytest.mark.parametrize("rows", [50, 312])
def test_uninitialised_memory_does_not_reach_bf16_gradients(rows):
    """A CPU with AMX reads the gaps between the rows of the factors in a matmul."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 21, generator=generator).bfloat16() for n in (64, rows))
    targets = torch.randint(rows, (64,), generator=generator)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        out, dhidden, dweight = alone(hidden, weight, targets, reduction="none")
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.loss.isfinite().all() and dhidden.isfinite().all() and dweight.isfinite().all()
