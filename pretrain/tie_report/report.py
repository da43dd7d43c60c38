"""The contents of the page on two runs: summary, facts, warnings, curves and rows that stand out."""

from collections.abc import Iterator
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from data_prep.renamed import RENAMED

from ..changes import NOT_COMPARED
from ..monitor import BINS
from .run import Point, ReportRun

EXPECTED_TO_DIFFER = ("vocab.tie", "vocab.untie_at", "run.dir")  # settings that are meant to differ
TOPS = (1, 2, 5, 10, 20, 50)  # percent of the spectrum, as it is logged
FREQUENCIES = tuple(name.replace("ppm", "") for name in BINS)
NOTES = [
    "This is one pair of runs: the result holds for this model, this data and this length. Another seed moves the"
    " curves, too. Repeat with several seeds before you trust a small difference.",
    "Tokens per second depend on the load of the machine: compare them only if nothing else ran on it.",
]
TIED, UNTIED, HEAD, DIFFERENCE = "blue", "orange", "green", "grey"  # names of colours in data_prep/page/page.css
COLOURS = {"tied": TIED, "untied": UNTIED}


class Line(NamedTuple):
    """One curve of a chart."""

    name: str
    colour: str
    points: list[Point]
    dashed: bool = False


class Chart(NamedTuple):
    """Curves over `x`: the tokens seen, the bins of frequency, or a part of the directions."""

    title: str
    note: str
    lines: list[Line]
    x: str = "tokens"
    log: bool = False


class Section(NamedTuple):
    """A heading, a note, charts, and the rows of a table."""

    title: str
    note: str
    charts: list[Chart]
    rows: list[list[str]]


def summary(*runs: ReportRun) -> list[tuple[str, str]]:
    """Names and texts for the head of the page: folders, newest checkpoints, settings of the tied run."""
    config = runs[0].manifest["config"]
    model, train = config.get("model", {}), config.get("train", {})
    shape = ", ".join(f"{key} {model[key]:,}" for key in ("layers", "width", "heads", "context") if key in model)
    batch = f"{train['global_batch']:,} × {train['seq_len']:,} tokens" if "seq_len" in train else ""
    found = [(f"{run.kind} run", f"{run.folder}, step {run.manifest['step']:,}") for run in runs]
    found += [("model", f"{model.get('family', '')}, {shape}"), ("vocabulary", f"{runs[0].manifest['vocab_size']:,}")]
    found += [("batch", batch), ("saved", runs[1].manifest.get("date", ""))]
    return [(name, text) for name, text in found if text]


def facts(tied: ReportRun, untied: ReportRun) -> list[list[str]]:
    """Rows of the table: a name, the value of the tied run, of the untied one, the difference."""
    both = (tied, untied)
    return [
        _fact("parameters", [run.parameters for run in both], "{:,}"),
        _fact("parameters in matrices", [run.in_matrices for run in both], "{:,}"),
        _fact("matrices", [run.matrices for run in both], "{}", relative=False),
        _fact("steps", [run.lines[-1]["step"] for run in both], "{:,}", relative=False),
        _fact("tokens", [run.last("tokens") for run in both], "{:,}", relative=False),
        _fact("training loss, last tenth of the log", [run.recent("loss") for run in both], "{:.4f}"),
        _fact("validation loss, last", [run.last("val_loss") for run in both], "{:.4f}"),
        _fact("validation bits per byte, last", [run.last("val_bits_per_byte") for run in both], "{:.4f}"),
        _fact(
            "validation bits per byte, lowest",
            [min(run.values("val_bits_per_byte"), default=None) for run in both],
            "{:.4f}",
        ),
        _fact("tokens per second, median", [_median(run.values("tokens_per_s")) for run in both], "{:,.0f}"),
    ]


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _lowest(values: list[float]) -> float | None:
    return min(values, default=None)


def _fact(name: str, values: list[float | None], form: str, relative: bool = True) -> list[str]:
    cells = ["–" if value is None else form.format(value) for value in values]
    tied, untied = values
    if tied is None or untied is None:
        return [name, *cells, "–"]
    difference = form.format(untied - tied)
    difference = difference if difference.startswith("-") else f"+{difference}"
    if relative and tied:
        difference += f" ({(untied - tied) / tied:+.1%})"
    return [name, *cells, difference.replace("-", "−")]


def warnings(tied: ReportRun, untied: ReportRun) -> Iterator[str]:
    """Yields each reason, besides the tie, why the two runs may differ."""
    split = untied.manifest["config"]["vocab"].get("untie_at")
    if split is not None:
        yield f"The untied run was tied up to step {split:,}: until then its curves are of one matrix."
    tied_config, untied_config = _flat(tied.manifest["config"]), _flat(untied.manifest["config"])
    for key in sorted(tied_config.keys() & untied_config.keys()):  # a newer version may have added a key
        if not key.startswith(EXPECTED_TO_DIFFER + NOT_COMPARED) and tied_config.get(key) != untied_config.get(key):
            values = f"{tied_config.get(key)} in the tied run, {untied_config.get(key)} in the untied run"
            yield f"Another setting differs: {key} is {values}."
    for key in ("vocab_size", "tokenizer_fingerprint"):
        if tied.manifest.get(key) != untied.manifest.get(key):
            yield f"The runs differ in {key.replace('_', ' ')}."
    if tied.last("tokens") != untied.last("tokens"):
        yield "The runs have seen different numbers of tokens: compare the curves, not the last values."
    ends = [line for run in (tied, untied) for line in run.measured("val_loss")[-1:]]
    if len({line["tokens"] for line in ends}) == 2:
        tied_at, untied_at = (f"step {line['step']:,}" for line in ends)
        yield (
            f"The last validation losses are of different steps ({tied_at} of the tied run, {untied_at} of the untied"
            " run): compare the curves, not these values."
        )
    for run in (tied, untied):
        if not run.last_measures:
            yield f"The {run.kind} run has no measures of gradients and rows: monitor.embedding_every was 0."


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = RENAMED.get(prefix + key, prefix + key)
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {name: value}
    return flat


def sections(tied: ReportRun, untied: ReportRun) -> list[Section]:
    """The sections to draw. Leaves out charts without a point and empty sections."""
    found = [_training(tied, untied), _gradients(tied, untied), _rows(tied, untied)]
    drawn = [section._replace(charts=list(filter(None, map(_with_points, section.charts)))) for section in found]
    return [section for section in drawn if section.charts or section.rows]


def _with_points(chart: Chart) -> Chart | None:
    lines = [line for line in chart.lines if line.points]
    return chart._replace(lines=lines) if lines else None


def _over_time(runs: list[ReportRun], scalar: str, use: str = "", dashed: bool = False) -> list[Line]:
    return [Line(run.kind + use, COLOURS[run.kind], run.points(scalar), dashed) for run in runs]


def _by_bin(run: ReportRun, scalar: str) -> list[Point]:
    keys = [(float(i), f"{scalar}/{name}") for i, name in enumerate(BINS)]
    return [(x, run.last_measures[key]) for x, key in keys if key in run.last_measures]


def _training(tied: ReportRun, untied: ReportRun) -> Section:
    runs, at = [tied, untied], dict(tied.points("val_bits_per_byte"))
    apart = [(x, y - at[x]) for x, y in untied.points("val_bits_per_byte") if x in at]
    charts = [
        Chart("Training loss", "nats per token", _over_time(runs, "loss")),
        Chart("Bits per byte", "on the validation text", _over_time(runs, "val_bits_per_byte")),
        Chart("Bits per byte, untied − tied", "below 0: untied is better", [Line("untied − tied", DIFFERENCE, apart)]),
        Chart("Norm of the gradient", "body and matrix, before clipping", _over_time(runs, "grad_norm")),
    ]
    return Section("Training", "", charts, [])


def _gradients(*runs: ReportRun) -> Section:
    measured = [run for run in runs if run.last_measures]
    norms = _over_time(measured, "grad_input", ", input") + _over_time(measured, "grad_output", ", output", dashed=True)
    norms = [line._replace(points=[point for point in line.points if point[1] > 0]) for line in norms]
    charts = [
        Chart("Norms", "all rows, before clipping", norms, log=True),
        Chart("Input's share", "input norm / (input norm + output norm)", _over_time(measured, "grad_input_share")),
        Chart("Cosine", "between the two gradients, all rows as one vector", _over_time(measured, "grad_cosine")),
    ]
    for title, scalar in (("Input's share", "grad_input_share"), ("Cosine", "grad_cosine")):
        lines = [Line(run.kind, COLOURS[run.kind], _by_bin(run, scalar)) for run in measured]
        charts.append(Chart(f"{title} by frequency", "at the last measurement", lines, x="bins"))
    note = (
        "A tied row gets the sum of two gradients: as input, from each use of its token, and as output, from every"
        " softmax. If the cosine is below 0, they pull in opposite directions. In the untied run each of the two has"
        " its own matrix."
    )
    return Section("Gradients of the two uses", note, charts, [])


def _rows(tied: ReportRun, untied: ReportRun) -> Section:
    matrices = [  # run, prefix of its scalars, name, colour
        (tied, "embedding", "tied", TIED),
        (untied, "embedding", "untied, input", UNTIED),
        (untied, "head", "untied, output", HEAD),
    ]
    runs = [run for run in (tied, untied) if run.last_measures]
    matrices = [matrix for matrix in matrices if matrix[0].last_measures]

    def each(scalar: str) -> list[Line]:
        return [Line(name, colour, run.points(f"{key}_{scalar}")) for run, key, name, colour in matrices]

    norms = [Line(name, colour, _by_bin(run, f"{key}_norm")) for run, key, name, colour in matrices]
    spectra = [Line(name, colour, _spectrum(run, key)) for run, key, name, colour in matrices]
    rows = [
        row
        for (run, key, name, _), kind in product(matrices, ("damaged", "small", "like_unseen"))
        for row in _odd(run, key, name, kind)
    ]
    for run in runs:
        never = [f"{run.last_measures[f'rows_never_{use}']:,.0f} never as {use}" for use in ("input", "target")]
        rows.append([f"{run.kind}: not used so far", "", ", ".join(never)])
    charts = [
        Chart("Mean norm of a row", "all rows", each("norm")),
        Chart("Norm by frequency", "mean norm of a row, at the last measurement", norms, x="bins"),
        Chart("Norm and log count", "correlation over the rows seen so far", each("norm_by_count")),
        Chart("Effective rank", "exp(entropy of the spectrum); at most the width", each("effective_rank")),
        Chart("Isotropy", "1: all directions are alike", each("isotropy")),
        Chart("Mean cosine of two rows", "over all pairs", each("mean_cosine")),
        Chart("Spectrum", "share of the variance in the largest directions", spectra, x="% of directions"),
        Chart("Drift since the split", "‖head − embedding‖ / ‖embedding‖", _over_time(runs, "tie_distance")),
        Chart("Cosine of the halves since the split", "mean over rows", _over_time(runs, "tie_cosine")),
    ]
    note = (
        "Damaged: has a number that is not finite, or is all zero. Small: the norm is below a tenth of the mean."
        " Like unseen: the token was seen, but its row is as close to the centre of the never-seen rows as they are;"
        " a candidate for a glitch token. Ignore it for the first few hundred steps: at initialisation, seen and"
        " unseen rows look the same."
    )
    return Section("The rows", note, charts, rows)


def _spectrum(run: ReportRun, key: str) -> list[Point]:
    shares = {top: run.last_measures.get(f"{key}_spectrum/top{top}pct") for top in TOPS}
    return [(float(top), share) for top, share in shares.items() if share is not None]


def _odd(run: ReportRun, key: str, name: str, kind: str) -> Iterator[list[str]]:
    """Yields a row of the table if the run has measured this kind: the count, and the first twenty with their text."""
    count = run.last_measures.get(f"{key}_{kind}")
    if count is not None:
        ids = run.last_measures.get("rows", {}).get(f"{key}_{kind}", [])
        listed = ", ".join(run.text(row) for row in ids[:20]) + (", …" if count > 20 else "")
        yield [f"{name}: {kind.replace('_', ' ')}", f"{count:,.0f}", listed]
