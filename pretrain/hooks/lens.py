"""The lens while a model trains: every n steps, on validation windows that stay the same."""

import json
import math
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_prep.token_file import TokenFile

from ..config.job import JobConfig
from ..corpora import validation_windows
from ..data import IGNORED, Windows
from ..data.loader import MicroBatch, read
from ..lens.lens import FINAL, FROM_INPUT, FROM_OUTPUT, TOKEN, LensResult, run_lens
from ..lens.method import Method, layer_name
from ..monitor import BINS as BINS_OF_ROWS
from ..monitor import EDGES, MetricsLog
from ..monitor.scalars import map_tag
from ..vocab.collectives import on_host
from .base import Hook, Run, StepReport, TrainerView

ROWS = ("kl_final", "kl_input", "entropy", "rank_final", "rank_input", "loss")  # measured of each row
BY_FREQUENCY = ("kl_input", "rank_input")  # of these also by the input token's bin
HEAT_MAPS = {
    "kl_final": "KL(output ‖ layer), nats",
    "kl_input": "KL(input ‖ layer), nats",
    "loss": "loss of each layer, nats/token",
}
PRESERVED_TOP = 10  # an input is preserved in a row if its token is among the top 10 there
COUNTED, AT_ONCE = 2**22, 2**16  # training tokens from which frequencies are counted, and tokens read in one piece
MEMORY_MIB = 64
BINS = ("uncounted", *BINS_OF_ROWS[1:])  # a sample cannot show that a token never occurs


def fixed_windows(
    of_corpora: list[Windows], most: int, rank: int, world: int, vocab_size: int
) -> tuple[MicroBatch, int]:
    """Returns this rank's part of `most` windows, taken from the corpora in turn, and their number, on the host.

    Every rank gets the same number: copies of the first window, without targets, fill up.
    """
    in_turn = ((windows, i) for i in range(max(map(len, of_corpora))) for windows in of_corpora if i < len(windows))
    places = list(islice(in_turn, most))
    mine, each = places[rank::world], -(-len(places) // world)
    batch = read(mine + places[:1] * (each - len(mine)), vocab_size)
    batch.targets_BT[len(mine) :] = IGNORED
    return batch, len(mine)


def frequency_bins(files: list[TokenFile], ids_BT: Tensor, vocab_size: int) -> Tensor:
    """Returns the bin of each id, [B, T], by its share of an even sample of up to `COUNTED` training tokens.

    See `BINS`. Its first bin has the ids that are not in the sample.
    """
    sizes = [file.size for file in files]
    counts = np.zeros(vocab_size, np.int64)
    for file, size in zip(files, sizes, strict=True):
        wanted = min(size, -(-COUNTED * size // sum(sizes)))
        pieces = -(-wanted // AT_ONCE)
        for start in np.linspace(0, size - wanted // max(1, pieces), pieces).astype(np.int64):
            counts += np.bincount(file.read(start, start + wanted // pieces), minlength=vocab_size)[:vocab_size]
    of_ids = torch.from_numpy(counts)[ids_BT].double()
    share = of_ids / max(1, int(counts.sum())) * 1e6
    return torch.where(of_ids > 0, 1 + torch.bucketize(share, torch.tensor(EDGES, dtype=torch.float64), right=True), 0)


class LensMonitor(Hook):
    """Adds means over all positions of all windows to the log. They are the same on any number of ranks.

    `pretrain/monitor/scalars.py` describes each scalar `lens_…`. Those with /LAYER are logged for each layer; KL and
    rank of the input, commitment and preserved also by the frequency of the input token.

    If the run must stop, the measurement is abandoned. Collectives: for each of a rank's windows, one after the other,
    the decision to stop, a forward of the model, and `Readout.read` in the vocab group; then one all-reduce of sums.
    """

    def __init__(self, every: int, batch: MicroBatch, bins_BT: Tensor, run: Run) -> None:
        """bins_BT: the bin of each token; -1 in a window that only fills up."""
        self.every, self.batch, self.bins_BT, self.run = every, batch, bins_BT, run
        self.maps: HeatMaps | None = None

    def before_training(self, trainer: TrainerView) -> None:
        """Reads earlier measurements for the heat maps, if TensorBoard is on."""
        log = self.run.log
        self.maps = HeatMaps(log) if log is not None and log.has_board else None

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if report.step % self.every:
            return
        start = time.monotonic()
        scalars = self.measure(trainer)
        if scalars is None:
            return
        if self.maps is not None:
            self.maps.add(report.step, scalars)
        report.scalars.update(scalars, lens_seconds=time.monotonic() - start)

    def measure(self, trainer: TrainerView) -> dict[str, float] | None:
        """Sums over all windows and ranks, then divides. Returns None if the run must stop: the save comes first."""
        model = trainer.model
        of_windows = []
        for b, bins_T in enumerate(self.bins_BT):
            if trainer.must_stop():
                return None
            window = self.batch.moved(lambda part, b=b: part[b : b + 1])  # type: ignore[misc]
            found = run_lens(
                model.vocab,
                model.body,
                trainer.engine.body,
                window.tokens_BT,
                window.targets_BT,
                Method(),
                starts_BT=window.starts_BT,
                k=0,
                tokens="distinct",
                memory_mib=MEMORY_MIB,
            )
            of_windows.append(_sums(found, bins_T))
        parts = [torch.stack(of_all).sum(0) for of_all in zip(*of_windows, strict=True)]
        packed = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(packed)
        packed = on_host(packed)
        sums_Rmb, sums_wb, (count_b, known_b) = (
            flat.view_as(part) for flat, part in zip(packed.split([p.numel() for p in parts]), parts, strict=True)
        )
        return dict(_named(found.rows, sums_Rmb, sums_wb, count_b.tolist(), known_b.tolist()))


def _sums(found: LensResult, bins_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all positions, then by bin, b sums in all: per row [R, m, b], of columns [w, b], counts [2, b]."""
    values_RNm, whole_Nw = _measured(found)
    known_N = found.targets >= 0
    bins_Nb = F.one_hot(bins_N + 1, 1 + len(BINS)).double()
    bins_Nb[:, 0] = 1 - bins_Nb[:, 0]  # all positions, except in windows that only fill up
    sums_Rmb = torch.einsum("rnm,nb->rmb", values_RNm, bins_Nb)
    return sums_Rmb, whole_Nw.T @ bins_Nb, torch.stack([bins_Nb.sum(0), (bins_Nb * known_N.unsqueeze(1)).sum(0)])


def _measured(found: LensResult) -> tuple[Tensor, Tensor]:
    """Values per row in the order of `ROWS`, [R, N, m], 0 if there is none; commitment and preserved, [N, 2]."""
    reading, R = found.reading, len(found.rows)
    ranks_RNJ = reading.ranks
    of_row = {
        "kl_final": reading.kl_from[..., FROM_OUTPUT],
        "kl_input": reading.kl_from[..., FROM_INPUT],
        "entropy": reading.entropy,
        "rank_final": ranks_RNJ[..., FINAL].double().log(),
        "rank_input": ranks_RNJ[..., TOKEN].double().log(),
        "loss": found.losses.where(found.targets >= 0, 0.0),
    }
    between_RN = (ranks_RNJ[1:-1, :, TOKEN] <= PRESERVED_TOP).double()
    preserved_N = between_RN.mean(0) if R > 2 else between_RN.sum(0)
    whole = torch.stack([found.commitment.double() / (R - 1), preserved_N], 1)
    return torch.stack([of_row[name].double() for name in ROWS], -1), whole


def _named(
    rows: list[str], sums_Rmb: Tensor, sums_wb: Tensor, count_b: list[float], known_b: list[float]
) -> Iterable[tuple[str, float]]:
    for m, name in enumerate(ROWS):
        n_b = known_b if name == "loss" else count_b
        geometric = name.startswith("rank")
        for r, row in enumerate(rows):
            for b, total in enumerate(sums_Rmb[r, m].tolist()):
                if n_b[b] and (b == 0 or name in BY_FREQUENCY):
                    mean = total / n_b[b]
                    where = _tag(row) if b == 0 else f"{BINS[b - 1]}/{_tag(row)}"
                    key = f"lens_{name}" if b == 0 else f"lens_{name}_by_frequency"
                    yield f"{key}/{where}", math.exp(mean) if geometric else mean
    for name, sums_b in zip(("commitment", "preserved"), sums_wb.tolist(), strict=True):
        for b, total in enumerate(sums_b):
            if count_b[b]:
                yield f"lens_{name}" + (f"/{BINS[b - 1]}" if b else ""), total / count_b[b]


def _tag(row: str) -> str:
    return layer_name(row).replace(" ", "_")


def older(key: str) -> str:
    """Today's key of one that an earlier version may have written: it named the input by its kind."""
    return re.sub(r"^(lens_.*)/positions$", r"\1/input", key)


class HeatMaps:
    """Pictures of row × step for TensorBoard. A resumed run takes the earlier columns from metrics.jsonl."""

    def __init__(self, log: MetricsLog) -> None:
        self.log = log
        self.measured: dict[int, dict[str, float]] = {}
        with suppress(OSError, ValueError):  # a log that cannot be read costs only columns
            for line in log.path.read_bytes().splitlines():
                if b'"lens_kl_final/' in line:
                    scalars = {older(key): value for key, value in json.loads(line).items()}
                    self.measured[scalars["step"]] = scalars

    def add(self, step: int, scalars: dict[str, float]) -> None:
        self.measured = {at: values for at, values in self.measured.items() if at < step}  # others: rolled back
        self.measured[step] = scalars
        for name, title in HEAT_MAPS.items():
            begin = f"lens_{name}/"
            rows = [key for key in scalars if key.startswith(begin)]
            table = [[values.get(key, math.nan) for values in self.measured.values()] for key in rows]
            labels = [key.removeprefix(begin) for key in rows]
            self.log.image(map_tag(name), heat_map(np.array(table), labels, list(self.measured), title), step)


def heat_map(values: np.ndarray, rows: list[str], steps: list[int], title: str) -> np.ndarray:
    """Draws a picture [height, width, 3] of bytes: the input row below, a column for the steps up to each measurement,
    colours from the smallest to the largest value. TensorBoard shrinks it to about 300 pixels: large lettering.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 3.0), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.19, 0.19, 0.65, 0.69))
    begin = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    image = axes.pcolormesh([begin, *steps], np.arange(len(rows) + 1) - 0.5, values, cmap="viridis", rasterized=True)
    shown = sorted({round(r) for r in np.linspace(0, len(rows) - 1, min(len(rows), 7))})
    axes.set_yticks(shown, [rows[r].replace("_", " ") for r in shown])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlim(begin, steps[-1])
    axes.set_xlabel(f"step (the last: {steps[-1]:,})", fontsize=11)
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=10)
    bar = figure.colorbar(image, cax=figure.add_axes((0.86, 0.19, 0.03, 0.69)))
    bar.ax.tick_params(labelsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def build(config: JobConfig, run: Run) -> LensMonitor | None:
    """The hook, if monitor.lens_every is not 0. The frequency of the windows' tokens is counted in the corpora."""
    if not config.monitor.lens_every:
        return None
    mesh, vocab_size = run.parts.mesh, run.parts.model.vocab.shard.vocab_size
    windows = list(validation_windows(config, run.data).values())
    files = [file for corpus in run.data.corpora.values() for file in corpus.train]
    batch, mine = fixed_windows(windows, config.monitor.lens_windows, mesh.data_rank, mesh.data_world, vocab_size)
    bins_BT = frequency_bins(files, batch.tokens_BT, vocab_size)
    bins_BT[mine:] = -1
    on_device = batch.moved(lambda tensor: tensor.to(mesh.device))
    return LensMonitor(config.monitor.lens_every, on_device, bins_BT.to(mesh.device), run)
