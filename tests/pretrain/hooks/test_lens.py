"""`monitor.lens_every` logs what a dense float64 model of the same weights computes, and does not change training."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.token_file import Manifest, TokenFile, TokenFileWriter
from pretrain.checkpoint import checkpoints
from pretrain.checks import check_job
from pretrain.config.job import JobConfig
from pretrain.config.monitor import LogConfig
from pretrain.corpora import validation_windows, vocab_rows
from pretrain.data import IGNORED, Windows, open_data
from pretrain.data.loader import MicroBatch
from pretrain.hooks import Run, lens
from pretrain.hooks.lens import BINS, HEAT_MAPS, ROWS, HeatMaps, LensMonitor, fixed_windows, frequency_bins, heat_map
from pretrain.lens.lens import run_lens
from pretrain.monitor import MetricsLog
from pretrain.monitor.scalars import map_tag, tag_of
from tests.pretrain.helpers import make_corpus, write_tokens
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks

STEPS, EVERY, DOCUMENT = 6, 3, 7
RUNS: dict[str, dict] = {
    "fsdp2": {},
    "documents": {"data__documents": "masked"},
    "checkpointed": {"engine__activation_checkpointing": "block"},
    "zero 1": {"engine": {"name": "deepspeed", "zero_stage": 1}},
    "zero 3": {"engine": {"name": "deepspeed", "zero_stage": 3}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Random ids, in documents: three or four per window."""
    folder = make_corpus(tmp_path_factory.mktemp("corpus"))
    manifest = Manifest.load(folder)
    entries = []
    for entry in manifest.files:
        ids = np.array(TokenFile(folder / entry.name).tokens)
        with TokenFileWriter(folder / entry.name, manifest.vocab_size) as writer:
            for start in range(0, len(ids), DOCUMENT):
                writer.add(ids[start : start + DOCUMENT])
        entries.append(replace(entry, documents=writer.documents, sha256=writer.sha256))
    replace(manifest, files=tuple(entries)).save(folder)
    return folder


def config_of(data: Path, run: Path, **changes) -> JobConfig:
    settings = {
        "vocab__size": None,
        "vocab__softcap": 4.0,
        "train__steps": STEPS,
        "monitor__lens_every": EVERY,
        "monitor__lens_windows": 3,  # a number that 2 and 4 do not divide
        "model__layers": 3,
    }
    return tiny_config(data, run, **(settings | changes))


def logged(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def lens_of(line: dict) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("lens_") and key != "lens_seconds"}


def read_apart(batch: MicroBatch) -> list[torch.Tensor]:
    """The tokens of each document, or of each window if documents are not masked."""
    if batch.starts_BT is None:
        return list(batch.tokens_BT)
    lengths = [starts_T.unique_consecutive(return_counts=True)[1].tolist() for starts_T in batch.starts_BT]
    return [part for tokens_T, own in zip(batch.tokens_BT, lengths, strict=True) for part in tokens_T.split(own)]


def dense(config: JobConfig) -> dict[str, float]:
    """Measures of the newest checkpoint from whole float64 logits."""
    corpora = open_data(config.data)
    rows = vocab_rows(config, corpora)
    windows = list(validation_windows(config, corpora).values())
    batch, n = fixed_windows(windows, config.monitor.lens_windows, 0, 1, rows)
    assert n == len(batch.tokens_BT) == config.monitor.lens_windows
    tokens, targets = batch.tokens_BT, batch.targets_BT
    weights = {name: value.double() for name, value in saved_tensors(config.run_dir).items()}
    body = config.model.body().double()
    body.load_state_dict({name: value for name, value in weights.items() if name in dict(body.named_parameters())})
    matrix = weights["embedding.weight"][:rows]
    of_parts = []
    for part in read_apart(batch):
        states = [F.embedding(part[None], matrix) + body.positions[: len(part)]]
        for block in body.blocks:
            states.append(block(states[-1], None))
        of_parts.append(torch.cat(states))
    with torch.no_grad():
        logits = config.vocab.softcap * torch.tanh(body.norm(torch.cat(of_parts, 1)) @ matrix.T / config.vocab.softcap)
    p = logits.log_softmax(-1)
    tokens, targets = tokens.flatten(), targets.flatten()
    places = p.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1

    def of(values, ids):
        return values.gather(-1, ids.clamp(min=0).expand(len(values), -1)[..., None])[..., 0]

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    final, token = of(places, p[-1].argmax(-1)), of(places, tokens)
    measures = {
        "kl_final": kl(p[-1:], p),
        "kl_input": kl(p[:1], p),
        "entropy": -(p.exp() * p).sum(-1),
        "rank_final": final.double().log(),
        "rank_input": token.double().log(),
        "loss": -of(p, targets),
    }
    R, N = final.shape
    settled = torch.tensor([min(r for r in range(R) if (final[r:, n] == 1).all()) for n in range(N)])
    whole = {"commitment": settled / (R - 1), "preserved": (token[1:-1] <= 10).double().mean(0)}
    files = [file for corpus in corpora.corpora.values() for file in corpus.train]
    bins = frequency_bins(files, tokens[None], rows)[0]
    truth = {}
    groups = {"": torch.ones(N, dtype=torch.bool)} | {
        name: bins == b for b, name in enumerate(BINS) if (bins == b).any()
    }
    for where, chosen in groups.items():
        for name, values in whole.items():
            truth[f"lens_{name}" + (f"/{where}" if where else "")] = values[chosen].mean().item()
        for name, values in measures.items():
            if where and name not in ("kl_input", "rank_input"):
                continue
            for r, row in enumerate(["input", *(f"block_{i}" for i in range(R - 2)), "output"]):
                mean = values[r, chosen & (targets >= 0) if name == "loss" else chosen].mean().item()
                key = f"lens_{name}_by_frequency/{where}/{row}" if where else f"lens_{name}/{row}"
                truth[key] = math.exp(mean) if name.startswith("rank") else mean
    return truth


@pytest.mark.parametrize(
    "world,run,split",
    [
        (1, "fsdp2", 1),
        (2, "fsdp2", 2),
        (4, "fsdp2", 2),
        (2, "documents", 2),
        (2, "checkpointed", 2),
        (2, "zero 1", 2),
        (2, "zero 3", 1),
    ],
)
def test_the_lens_matches_dense(data, tmp_path, world, run, split):
    """Every measure of every row and bin, for both engines; of ranks that share the matrix and of replicas; of whole
    windows, and of documents that do not see each other.
    """
    config = config_of(data, tmp_path / "a", vocab__parallel=str(split), **RUNS[run])
    run_ranks(world, train_rank, config, timeout=120)
    lines = logged(tmp_path / "a")
    assert [step for step, line in lines.items() if lens_of(line)] == [EVERY, STEPS]
    assert lens_of(lines[STEPS]) == pytest.approx(dense(config), rel=2e-4, abs=2e-5)
    assert lines[STEPS]["lens_seconds"] > 0


def test_the_lens_changes_no_bit_of_the_training(data, tmp_path):
    for name, every in (("with", EVERY), ("without", 0)):
        run_ranks(2, train_rank, config_of(data, tmp_path / name, monitor__lens_every=every, vocab__parallel="2"))
    keys = ("loss", "grad_norm")
    with_it, without = (
        [[line[key] for key in keys] for line in logged(tmp_path / name).values()] for name in ("with", "without")
    )
    assert with_it == without and len(without) == STEPS
    ours, theirs = saved_tensors(tmp_path / "with"), saved_tensors(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stopped_at_the_first_window(rank: int, world: int, config: JobConfig) -> int:
    """Counts the windows that were measured."""
    results = []

    def signalled(*given, **settings):
        results.append(1)
        if rank == world - 1:
            signal.raise_signal(signal.SIGTERM)
        return run_lens(*given, **settings)

    lens.run_lens = signalled
    train_rank(rank, world, config)
    return len(results)


def test_a_measurement_is_abandoned_if_the_run_must_stop(data, tmp_path):
    config = config_of(data, tmp_path / "a")
    assert run_ranks(2, stopped_at_the_first_window, config) == [1, 1]  # of 2 each
    lines = logged(tmp_path / "a")
    assert max(lines) == EVERY and not lens_of(lines[EVERY])
    assert checkpoints(config.run_dir)[-1].name == f"step-{EVERY:08}"


def time_left_at_each_window(rank: int, world: int, config: JobConfig) -> list[float]:
    """Seconds left on the watchdog at each window. Every window takes half of them."""
    left = []

    def slow(*given, **settings):
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])
        signal.setitimer(signal.ITIMER_REAL, left[-1] / 2)
        return run_lens(*given, **settings)

    lens.run_lens = slow
    train_rank(rank, world, config)
    return left


def test_every_window_resets_the_watchdog(data, tmp_path):
    config = config_of(data, tmp_path / "a", train__hang_timeout=10_000.0, monitor__lens_windows=6)
    for left in run_ranks(2, time_left_at_each_window, config):
        assert len(left) == 2 * 3 and min(left) > 5_000  # at step 3 and 6


def test_tensorboard_has_curves_and_heat_maps_of_the_whole_run(data, tmp_path):
    """The picture of the last step has a column for each measured step, also after a resume."""
    config = config_of(data, tmp_path / "a", log__tensorboard=True, train__stop_after=4)
    run_ranks(1, train_rank, config)
    config.train.stop_after = None
    run_ranks(1, train_rank, config)
    events = EventAccumulator(str(tmp_path / "a"), size_guidance={"images": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    rows = ("input", "block_0", "block_1", "output")
    assert {tag_of(f"lens_{name}/{row}") for name in ROWS for row in rows} <= tags
    assert {tag_of(f"lens_{name}") for name in ("commitment", "preserved", "seconds")} <= tags
    for name in ("kl_final", "kl_input", "loss"):
        assert [event.step for event in events.Images(map_tag(name))] == [EVERY, STEPS]
    lines = logged(tmp_path / "a")
    assert [event.value for event in events.Scalars(tag_of("lens_kl_final/block_0"))] == [
        pytest.approx(lines[step]["lens_kl_final/block_0"]) for step in (EVERY, STEPS)
    ]


def test_heat_maps_read_the_input_of_an_earlier_version(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "lens_kl_final/positions": 1.5, "lens_kl_final/output": 0.0}\n'
    )
    log = MetricsLog(tmp_path, LogConfig(tensorboard=False), 5, 10)
    maps = HeatMaps(log)
    assert maps.measured == {5: {"step": 5, "lens_kl_final/input": 1.5, "lens_kl_final/output": 0.0}}
    for step in (10, 15, 10):  # the last after a rollback
        maps.add(step, {f"lens_{name}/input": 1.0 * step for name in HEAT_MAPS})
    log.close()
    assert list(maps.measured) == [5, 10]


def test_a_heat_map_ends_at_the_last_step_with_colours_of_its_data():
    values = np.array([[7.0, 7.0, 9.0], [9.0, 7.0, 7.0]])
    picture = heat_map(values, ["below", "above"], [10, 20, 30], "kl").astype(int)
    inside = picture[45:235, 95:400]  # the axes, without their lettering
    bright = inside[..., 0] > 200  # viridis ends in yellow, and begins in violet
    assert (inside[..., 0] < 100).mean() > 0.6 and (inside.min(-1) < 200).all(), "no white: every step has a column"
    height, width = bright.shape
    assert bright[: height // 2 - 2, : width // 3 - 2].all() and bright[height // 2 + 2 :, 2 - width // 3 :].all()
    assert bright.mean() < 0.4


def test_bins_are_shares_of_the_training_tokens(tmp_path):
    ids = np.repeat([0, 1, 2, 3], [1_000_000, 5_000, 50, 1])
    np.random.default_rng(0).shuffle(ids)
    write_tokens(tmp_path / "a", ids, 6)
    bins = frequency_bins([TokenFile(tmp_path / "a")], torch.tensor([[0, 1, 2, 3, 4]]), 6)
    assert [BINS[b] for b in bins[0]] == ["1000ppm-up", "1000ppm-up", "10-100ppm", "0-1ppm", "uncounted"]


def test_corpora_take_turns_and_ranks_get_equal_numbers_of_windows(tmp_path):
    windows = []
    for name, count in (("a", 65), ("b", 17), ("c", 33)):  # 4 windows, 1, 2
        write_tokens(tmp_path / name, np.full(count, len(windows)), 307)
        windows.append(Windows([TokenFile(tmp_path / name)], 16))
    whole, n = fixed_windows(windows, 6, 0, 1, 307)
    assert whole.tokens_BT[:, 0].tolist() == [0, 1, 2, 0, 2, 0] and n == 6
    parts = [fixed_windows(windows, 6, rank, 4, 307) for rank in range(4)]
    assert [n for _, n in parts] == [2, 2, 1, 1] and {len(batch.tokens_BT) for batch, _ in parts} == {2}
    for rank, (batch, n) in enumerate(parts):
        assert torch.equal(batch.tokens_BT[:n], whole.tokens_BT[rank::4])
        assert (batch.targets_BT[n:] == IGNORED).all() and (batch.targets_BT[:n] >= 0).all()


def test_no_heat_maps_without_a_board(tmp_path):
    for board in (True, False):
        (tmp_path / str(board)).mkdir()
        log = MetricsLog(tmp_path / str(board), LogConfig(tensorboard=board), 0, 1)
        of_board = LensMonitor(
            1, MicroBatch(torch.zeros(1, 1), torch.zeros(1, 1)), torch.zeros(1, 1), Run(None, None, None, log)
        )
        of_board.before_training(None)
        assert (of_board.maps is not None) == board
        log.close()


def test_an_unreadable_log_costs_only_columns(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    log = MetricsLog(tmp_path, LogConfig(), 0, 1)
    assert HeatMaps(log).measured == {}


def test_wrong_settings_are_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"monitor\.lens_every=-1 must not be negative"):
        config_of(data, tmp_path / "a", monitor__lens_every=-1)
    with pytest.raises(ValueError, match=r"monitor\.lens_windows=0 must be at least 1"):
        config_of(data, tmp_path / "a", monitor__lens_windows=0)
    config = tiny_config(write_tokens_pair(tmp_path), tmp_path / "b", monitor__lens_every=5)
    with pytest.raises(ValueError, match=r"monitor\.lens_every=5 must be 0: the data has no validation split"):
        check_job(config, 1, "cpu")


def write_tokens_pair(folder: Path) -> Path:
    write_tokens(folder / "pair", np.arange(300), 307)
    return folder / "pair"
