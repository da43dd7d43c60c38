"""What the page shows of two runs, and the page."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..monitor import BINS
from ..page import filled
from .run import Point, ReportRun

TEMPLATE, PLACE = Path(__file__).with_name("page.html"), "/*REPORT*/null"
EXPECTED_TO_DIFFER = ("vocab.tie", "vocab.untie_at", "run.dir")  # settings that are to differ
NOT_COMPARED = (  # those of no account for a loss
    *("log.", "checkpoint.", "engine.", "monitor.", "data.prefetch"),
    *("train.stop_after", "train.time_limit", "train.hang_after"),
)
TOPS = (1, 2, 5, 10, 20, 50)  # of the spectrum, as it is logged
USES, NAMES = "uses of a row, of a million", tuple(name.replace("ppm", "") for name in BINS)
Series = tuple[str, str, list[Point]]  # name; colour, with a dash before it for a dashed line; points


def facts(tied: ReportRun, untied: ReportRun) -> list[list[str]]:
    """Rows of the table: what it is, of the one, of the other, the difference."""
    rows = []

    def add(name: str, of: Callable[[ReportRun], float | None], form: str, relative: bool = False) -> None:
        one, other = of(tied), of(untied)
        known = one is not None and other is not None
        cells = ["–" if value is None else form.format(value) for value in (one, other)]
        difference = "–"
        if known:
            assert one is not None and other is not None
            difference = form.format(other - one).replace("-", "−")
            difference = difference if difference.startswith("−") else f"+{difference}"
            if relative and one:
                difference += f" ({(other - one) / one:+.1%})".replace("-", "−")
        rows.append([name, *cells, difference])

    add("parameters", lambda run: run.parameters, "{:,}", relative=True)
    add("of them in matrices", lambda run: run.in_matrices, "{:,}", relative=True)
    add("matrices", lambda run: run.matrices, "{}")
    add("steps", lambda run: run.lines[-1]["step"], "{:,}")
    add("tokens", lambda run: run.last("tokens"), "{:,}")
    add("loss, last tenth of the log", lambda run: run.recent("loss"), "{:.4f}", relative=True)
    add("validation loss, last", lambda run: run.last("val_loss"), "{:.4f}", relative=True)
    add("bits per byte, last", lambda run: run.last("val_bits_per_byte"), "{:.4f}", relative=True)
    add("bits per byte, lowest", lambda run: _lowest(run.points("val_bits_per_byte")), "{:.4f}", relative=True)
    add("tokens a second, median", lambda run: _median(run.points("tokens_per_s")), "{:,.0f}", relative=True)
    return rows


def _lowest(points: list[Point]) -> float | None:
    return min((y for _, y in points), default=None)


def _median(points: list[Point]) -> float | None:
    return median(y for _, y in points) if points else None


def report(tied: ReportRun, untied: ReportRun) -> dict[str, Any]:
    """What the page shows. ValueError where there is nothing to compare."""
    watched = [run for run in (tied, untied) if run.looked]
    sections = [_training(tied, untied), _gradients(watched), _rows(tied, untied)]
    return {
        "title": f"Tied and untied: {tied.folder} and {untied.folder}",
        "facts": facts(tied, untied),
        "warnings": list(warnings(tied, untied)),
        "notes": [
            "One pair of runs: what it shows holds for this model, these data and this length. Another seed moves the"
            " curves, too; run several before you call a small difference one.",
            "Tokens a second are the machine's as it was: compare them only if nothing else ran on it.",
        ],
        "sections": [section for section in sections if section["charts"] or section["rows"]],
    }


def warnings(tied: ReportRun, untied: ReportRun) -> Iterator[str]:
    """Why the two may differ otherwise than by the tie from the first step on."""
    split = untied.manifest["config"]["vocab"].get("untie_at")
    if split is not None:
        yield f"The untied run was tied up to step {split:,}: its curves begin as one matrix."
    one, other = _flat(tied.manifest["config"]), _flat(untied.manifest["config"])
    for key in sorted(one.keys() | other.keys()):
        if not key.startswith(EXPECTED_TO_DIFFER + NOT_COMPARED) and one.get(key) != other.get(key):
            yield f"Another setting differs: {key} is {one.get(key)} when tied, and {other.get(key)} when not."
    for key in ("vocab_size", "tokenizer_fingerprint"):
        if tied.manifest.get(key) != untied.manifest.get(key):
            yield f"The runs differ in {key.replace('_', ' ')}."
    if tied.last("tokens") != untied.last("tokens"):
        yield "The runs have not seen as many tokens: compare the curves, not the last values."
    ends = [line for run in (tied, untied) for line in run.measured("val_loss")[-1:]]
    if len({line["tokens"] for line in ends}) == 2:
        one_at, other_at = (f"step {line['step']:,}" for line in ends)
        yield (
            f"The last validation losses are of {one_at} when tied, and of {other_at} when not: compare the curves, not"
            " these values."
        )
    for run in (tied, untied):
        if not run.looked:
            yield f"The {run.kind} run was not watched (monitor.embedding=0): no gradients, no health of rows."


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _chart(
    title: str, note: str, series: list[Series], x: str = "tokens", *, log: bool = False, bins: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """One, or none where there is nothing to draw."""
    lines = [
        {"name": name, "colour": colour.lstrip("-"), "dashed": colour.startswith("-"), "points": points}
        for name, colour, points in series
        if points
    ]
    if not lines:
        return []
    return [{"title": title, "note": note, "x": x, "series": lines, "log": log, "bins": list(bins)}]


def _training(tied: ReportRun, untied: ReportRun) -> dict[str, Any]:
    def both(key: str) -> list[Series]:
        return [("tied", "tied", tied.points(key)), ("untied", "untied", untied.points(key))]

    at = dict(tied.points("val_bits_per_byte"))
    apart = [(x, y - at[x]) for x, y in untied.points("val_bits_per_byte") if x in at]
    charts = [
        *_chart("Training loss", "nats a token", both("loss")),
        *_chart("Bits per byte", "of the validation text", both("val_bits_per_byte")),
        *_chart("Bits per byte, untied − tied", "below 0: untied is better", [("untied − tied", "none", apart)]),
        *_chart("Norm of the gradient", "body and matrix, before the clip", both("grad_norm")),
    ]
    return {"title": "Training", "notes": [], "charts": charts, "head": [], "rows": []}


def _of_runs(runs: list[ReportRun], key: str, suffix: str = "", dash: str = "") -> list[Series]:
    return [(run.kind + suffix, dash + run.kind, run.points(key)) for run in runs]


def _gradients(runs: list[ReportRun]) -> dict[str, Any]:
    def by_bin(key: str) -> list[Series]:
        return [(run.kind, run.kind, _of_bins(run, key)) for run in runs]

    norms = _of_runs(runs, "grad_input", ", input") + _of_runs(runs, "grad_output", ", output", "-")
    positive = [(name, colour, [point for point in points if point[1] > 0]) for name, colour, points in norms]
    charts = [
        *_chart("Norms", "all rows, before the clip", positive, log=True),
        *_chart("Input's share", "of the sum of both norms", _of_runs(runs, "grad_input_share")),
        *_chart("Cosine", "between the two, all rows as one vector", _of_runs(runs, "grad_cosine")),
        *_chart("Input's share by frequency", "at the last look", by_bin("grad_input_share"), USES, bins=NAMES),
        *_chart("Cosine by frequency", "at the last look", by_bin("grad_cosine"), USES, bins=NAMES),
    ]
    note = (
        "A tied row gets the sum of two gradients: as input, from the tokens it stands for, and as output, from every"
        " softmax. Where the cosine is below 0 they pull apart. In the untied run each has a matrix of its own."
    )
    return {"title": "Gradients of the two uses", "notes": [note], "charts": charts, "head": [], "rows": []}


class _Matrix(NamedTuple):
    """One of a run's. key: what its scalars begin with."""

    run: ReportRun
    key: str
    name: str
    colour: str

    def over_time(self, scalar: str) -> Series:
        return self.name, self.colour, self.run.points(f"{self.key}_{scalar}")

    def spectrum(self) -> Series:
        tops = {top: self.run.looked.get(f"{self.key}_spectrum/top{top}pct") for top in TOPS}
        return self.name, self.colour, [(float(top), share) for top, share in tops.items() if share is not None]

    def norms(self) -> Series:
        return self.name, self.colour, _of_bins(self.run, f"{self.key}_norm")

    def odd_rows(self) -> Iterator[list[str]]:
        for kind in ("damaged", "small", "like_unseen"):
            count = self.run.looked.get(f"{self.key}_{kind}")
            if count is not None:
                ids = self.run.looked.get("rows", {}).get(f"{self.key}_{kind}", [])
                listed = ", ".join(self.run.text(row) for row in ids[:20]) + (", …" if count > 20 else "")
                yield [f"{self.name}: {kind.replace('_', ' ')}", f"{count:,.0f}", listed]


def _rows(tied: ReportRun, untied: ReportRun) -> dict[str, Any]:
    matrices = [
        _Matrix(tied, "embedding", "tied", "tied"),
        _Matrix(untied, "embedding", "untied, input", "untied"),
        _Matrix(untied, "head", "untied, output", "head"),
    ]
    runs = [run for run in (tied, untied) if run.looked]
    matrices = [matrix for matrix in matrices if matrix.run.looked]

    def each(scalar: str) -> list[Series]:
        return [matrix.over_time(scalar) for matrix in matrices]

    rows = [row for matrix in matrices for row in matrix.odd_rows()]
    for run in runs:
        never = [f"{run.looked[f'rows_never_{use}']:,.0f} never {use}" for use in ("input", "target")]
        rows.append([f"{run.kind}: rows not used so far", "", ", ".join(never)])
    norms, spectra = [matrix.norms() for matrix in matrices], [matrix.spectrum() for matrix in matrices]
    charts = [
        *_chart("Mean norm of a row", "all rows", each("norm")),
        *_chart("Norm by frequency", "mean norm of a row, at the last look", norms, USES, bins=NAMES),
        *_chart("Norm and log count", "their correlation, of rows seen", each("norm_by_count")),
        *_chart("Effective rank", "e to the entropy of the spectrum", each("effective_rank")),
        *_chart("Isotropy", "1: all directions alike", each("isotropy")),
        *_chart("Mean cosine of two rows", "over all pairs", each("mean_cosine")),
        *_chart("Spectrum", "variance in the largest directions, at the last look", spectra, x="% of directions"),
        *_chart("Drift since the split", "‖head − embedding‖ / ‖embedding‖", _of_runs(runs, "tie_distance")),
        *_chart("Cosine of the halves since the split", "mean over rows", _of_runs(runs, "tie_cosine")),
    ]
    note = (
        "Damaged: a number that is not finite, or all zero. Small: below a tenth of the mean norm, near the padding"
        " rows, which are zero. Like unseen: seen, yet as near the centre of the rows never seen as these are"
        " themselves: glitch candidates."
    )
    head = ["at the last look", "rows", ""]
    return {"title": "The rows", "notes": [note], "charts": charts, "head": head, "rows": rows}


def _of_bins(run: ReportRun, key: str) -> list[Point]:
    return [(float(i), run.looked[f"{key}/{name}"]) for i, name in enumerate(BINS) if f"{key}/{name}" in run.looked]


def page(shown: dict[str, Any]) -> str:
    """The whole page."""
    return filled(TEMPLATE, PLACE, shown)
