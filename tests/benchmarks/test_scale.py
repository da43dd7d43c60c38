"""Tests of scale_model.py: its bytes are those that real ranks pass to collectives, and its times behave."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pretrain.config.engine import FSDP2Config
from pretrain.engine.footprint import Shapes
from pretrain.engine.fsdp2_footprint import FSDP2Footprint
from pretrain.families.gpt2 import GPT2Config
from pretrain.mesh import Mesh
from pretrain.optim.adamw import AdamW
from pretrain.placement import Transfer, Workload
from tests.benchmarks import scale
from tests.benchmarks.scale_model import BF16, FP32, Fabric, Point, fastest, gathered_matrices, tensor_parallel
from tests.benchmarks.step_rivals import megatron
from tests.in_process import in_process
from tests.launch.simulate import Collectives
from tests.ranks import run_ranks

MODEL = GPT2Config(layers=2, width=64, heads=2, context=16)
ROWS, SEQUENCES = 302, 2
WORK = Workload(ROWS, MODEL.width, 2, SEQUENCES * MODEL.context, 1, BF16, 8)


class Untied(nn.Module):
    """An untied model: embedding, body and head in one module."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(ROWS, MODEL.width), MODEL.body()
        self.head = nn.Linear(MODEL.width, ROWS, bias=False)

    def forward(self, ids_BT):
        return F.cross_entropy(self.head(self.body(self.embedding(ids_BT))).float().flatten(0, 1), ids_BT.flatten())


def counted(mesh, step):
    """Calls and bytes of the second step, by kind."""
    step()
    with Collectives(mesh) as seen:
        step()
    calls, given = Counter(), Counter()
    for (_, kind), count in seen.calls.items():
        calls[kind] += count
    for (_, kind), count in seen.given.items():
        given[kind] += count
    return calls, given


def told(transfers):
    calls, given = Counter(), Counter()
    for one in transfers:
        if one.ranks > 1:
            calls[one.kind] += one.calls
            given[one.kind] += one.given
    return calls, given


def fsdp2_traffic(rank, world, ranks):
    mesh, hsdp = Mesh.of(ranks, torch.device("cpu")), ranks < world
    model = Untied()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (model.embedding, *model.body.blocks, model.head, model):
        fully_shard(
            module,
            mesh=mesh.body(replicated=hsdp)[0],
            mp_policy=policy,
            reshard_after_forward=module is not model.head,
        )
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    ids_BT = torch.arange(SEQUENCES * MODEL.context).view(SEQUENCES, -1)
    return counted(mesh, lambda: model(ids_BT).backward())


@pytest.mark.parametrize("world,ranks", [(2, 2), (4, 2)])
def test_fsdp2_passes_the_bytes_of_the_model_to_collectives(world, ranks):
    shapes = Shapes.of(MODEL.body(), AdamW)
    body = FSDP2Footprint(FSDP2Config(hsdp=ranks < world), shapes, WORK, ranks, world)
    units = gathered_matrices(WORK, ranks, world // ranks)
    moved = [*body.transfers(), *units["embedding"], *units["head"]]
    expected = told(one for one in moved if one.purpose != "count, norms and loss")  # of the trainer
    assert run_ranks(world, fsdp2_traffic, ranks, timeout=120) == [expected] * world


def megatron_traffic(rank, world):
    return counted(Mesh.of(1, torch.device("cpu")), megatron(MODEL, ROWS, SEQUENCES // world, torch.float32))


def test_megatron_passes_the_bytes_of_the_model_to_collectives():
    """Besides, our clip sums one float64 over the ranks."""
    calls, given = told(tensor_parallel(WORK, MODEL.layers, 2, micro_batches=1, itemsize=FP32).values())
    calls["all-reduce"] += 1
    given["all-reduce"] += 8
    assert run_ranks(2, megatron_traffic, timeout=120) == [(calls, given)] * 2


def test_a_transfer_takes_the_time_of_its_slowest_link():
    fabric = Fabric(near=100.0, far=10.0, base=1.0, ring=(0.1, 0.5), tree=(0.2, 0.6))

    def seconds(kind, ranks, given, stride=1):
        return fabric.seconds(Transfer("", kind, "", ranks, 2, given, ""), stride)

    assert seconds("all-gather", 1, 1000) == 0
    assert seconds("all-gather", 8, 100) == pytest.approx(700 / 100 + 2 * (1 + 7 * 0.1))
    # 16 ranks in 2 nodes: an eighth of 15 · 100 bytes leaves the node
    assert seconds("all-gather", 16, 100) == pytest.approx(1500 / 8 / 10 + 2 * (1 + 14 * 0.1 + 2 * 0.5))
    assert seconds("all-reduce", 2, 100, stride=8) == pytest.approx(100 / 10 + 2 * (1 + 2 * 0.6))
    assert seconds("all-to-all", 16, 150) == pytest.approx(80 / 10 + 2 * (1 + 0.5))
    times = [seconds("reduce-scatter", 2**k, 1000) for k in range(13)]
    assert times == sorted(times)


@pytest.mark.parametrize("name", scale.SYSTEMS)
def test_simulated_points_keep_to_the_limits(name):
    """No layout beats the matmuls alone, and on more ranks the smallest layout is not larger."""
    trainings = [scale.training_of(131_072, world) for world in (8, 64)]
    matmuls = trainings[0].step(1, hsdp=False).flops + 6 * trainings[0].work.tokens * 131_072 * 4096
    points = [scale.SYSTEMS[name](training) for training in trainings]
    assert all(0 < point.rate < 8192 / (matmuls / 790e12) for some in points for point in some)
    assert min(point.memory for point in points[1]) <= min(point.memory for point in points[0])
    assert all(point.head > 0 for some in points for point in some)


def test_on_one_rank_nothing_is_sent():
    for points_of in scale.SYSTEMS.values():
        (point,) = points_of(scale.training_of(32_768, 1))
        assert point.head == 0


def test_the_memory_of_one_rank_is_a_hand_count():
    """llama_8b on one rank: 12 bytes per parameter while no gradient exists, or 18 in Megatron, which keeps room for
    them; then logits and activations.
    """
    training = scale.training_of(131_072, 1)
    weights = 8_053_329_920  # 6,979,588,096 of the body, two matrices of 131,072 × 4,096
    for name, per_weight, per_logit in (("FSDP2", 12, 12), ("FSDP2, chunked loss", 12, 1.5), ("Megatron-Core", 18, 8)):
        (point,) = scale.SYSTEMS[name](training)
        rest = point.memory - per_weight * weights - per_logit * 8192 * 131_072
        assert 0 < rest < 0.3 * point.memory, name


def test_the_fastest_layout_fits_and_is_the_smallest_of_equals():
    slow, quick, large = (Point(name, s, m, 0, 1) for name, s, m in (("a", 2, 1), ("b", 1, 2), ("c", 0.1, 1e12)))
    assert fastest([slow, large, quick]) == quick and fastest([large]) is None
    assert fastest([quick, smaller := replace(quick, seconds=1.005, memory=1), slow]) == smaller


def test_the_command_prints_a_line_per_system():
    done = in_process(scale.main, "--rows", "32768", "--ranks", "8", "16")
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert done.returncode == 0 and [line[1] for line in lines] == [*scale.SYSTEMS, *scale.SYSTEMS]
    refused = in_process(scale.main, "--ranks", "12")
    assert refused.returncode == 2 and "must be powers of two" in refused.stderr
