"""The page of a sweep shows the numbers of the runs; the scaling law finds the constants that made the losses."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.checkpoint.folder import FORMAT_VERSION, write_manifest
from pretrain.commands import sweep_report as command
from pretrain.sweep_report import report, scaling
from pretrain.sweep_report.runs import read_runs
from pretrain.sweep_report.scaling import Law, Point
from tests.browser import CONTRAST, DARK, SIDEWAYS, evaluated
from tests.in_process import in_process

LAW = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # of Hoffmann et al. 2022
ROWS, BATCH = 50_000, 500_000  # of the vocabulary; tokens per step
MEDIUM = "--window-size=600,900"  # pixels


def write_run(
    folder: Path,
    loss: Callable[[float, float], float] = LAW.loss,
    width: int = 256,
    steps: int = 1000,
    step: int | None = None,
    val: bool = True,
    **others: object,
) -> int:
    """Writes what a run leaves, apart from tensors: settings, metrics up to `step` (None: the end), a manifest.

    loss: of parameters and tokens. others: settings with __ for the dot. Returns the number of parameters.
    """
    settings: dict = {
        "seed": 0,
        "model": {"family": "gpt2", "width": width, "heads": width // 64},
        "optim": {"lr": 1e-3, "warmup_steps": min(100, steps // 10), "schedule": "cosine"},
        "train": {"steps": steps, "stop_after": None},
        "log": {"every": 10},
        "run": {"dir": str(folder)},
    }
    for key, value in others.items():
        group, _, name = key.rpartition("__")
        (settings[group] if group else settings)[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    body = 12 * width**2 * 8
    count, last = body + ROWS * width, steps if step is None else step
    with open(folder / "metrics.jsonl", "w") as file:
        for at in range(10, last + 1, 10):
            now = {"step": at, "tokens": at * BATCH, "loss": loss(count, at * BATCH) + 0.01, "tokens_per_s": 1000.0}
            if val and (at == last or at % 100 == 0):
                now |= {"val_loss": loss(count, at * BATCH), "val_bits_per_byte": 1.0}
            file.write(json.dumps(now) + "\n")
    checkpoint = folder / "checkpoints" / f"step-{last:08d}"
    checkpoint.mkdir(parents=True)
    tensors = {"embedding.weight": [ROWS + 48, width], "body.weight": [body], "optim.body.weight.exp_avg": [body]}
    empty = {key: {} for key in ("samples", "rng", "files")}
    known = {"format_version": FORMAT_VERSION, "step": last, "tokens": 0, "vocab_size": ROWS}
    write_manifest(checkpoint, known | {"tensors": tensors} | empty)
    return count


@pytest.fixture(scope="module")
def rates(tmp_path_factory) -> Path:
    """A sweep of learning rates at two widths, whose best rates are known, an unfinished run and an empty one."""
    base = tmp_path_factory.mktemp("rates")
    for width, best in ((256, 1e-3), (512, 2e-3)):
        for lr in (5e-4, 1e-3, 2e-3):
            bowl = 1 + 0.1 * math.log2(lr / best) ** 2
            write_run(base / f"{width}-{lr}", lambda n, d, bowl=bowl: bowl * LAW.loss(n, d), width, optim__lr=lr)
    write_run(base / "short", width=256, step=500, optim__lr=4e-3)
    write_run(base / "new", optim__lr=8e-3, step=0)
    return base


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Path:
    """A sweep of four widths and four lengths; of each pair a second run has a higher loss."""
    base = tmp_path_factory.mktemp("sizes")
    for width in (128, 256, 512, 1024):
        for steps in (200, 600, 2000, 6000):
            write_run(base / f"{width}-{steps}", width=width, steps=steps)
    write_run(base / "seed", lambda n, d: LAW.loss(n, d) + 0.5, seed=1, steps=600)
    return base


def grid(noise: float = 0.0, sizes: int = 4, lengths: int = 4) -> list[Point]:
    random = np.random.default_rng(3)
    pairs = [(n, d) for n in np.geomspace(1e7, 1e9, sizes) for d in np.geomspace(2e8, 2e10, lengths)]
    return [Point(n, d, LAW.loss(n, d) * math.exp(noise * random.normal())) for n, d in pairs]


def test_fit_finds_the_constants():
    found = scaling.fit(grid(), resamples=4)
    assert found.law == pytest.approx(LAW, rel=1e-3) and found.error < 1e-6 and not found.doubt
    assert found.law.optimum(1e21) == pytest.approx(LAW.optimum(1e21), rel=1e-3)


def test_intervals_of_noisy_losses_hold_the_constants():
    found = scaling.fit(grid(noise=0.002, sizes=5, lengths=5), resamples=25)
    assert not found.doubt and 0.001 < found.error < 0.004
    for name in ("E", "alpha", "beta"):
        low, high = found.interval([getattr(law, name) for law in found.resampled])
        assert low < high and high - low < 0.2
        assert low - 0.05 < getattr(LAW, name) < high + 0.05
    assert found.law.optimum(1e20)[0] == pytest.approx(LAW.optimum(1e20)[0], rel=0.2)


def test_one_wrong_loss_does_not_move_the_fit():
    """The Huber loss bounds the weight of a run that went wrong."""
    points = grid()
    points[5] = points[5]._replace(loss=1.3 * points[5].loss)
    assert scaling.fit(points, resamples=1).law == pytest.approx(LAW, rel=2e-2)


def test_optimum_has_the_lowest_loss_of_its_budget():
    parameters, tokens = LAW.optimum(1e20)
    assert 6 * parameters * tokens == pytest.approx(1e20)
    for factor in (0.9, 1.1):
        assert LAW.loss(factor * parameters, tokens / factor) > LAW.loss(parameters, tokens)


@pytest.mark.parametrize("points", [grid(sizes=4, lengths=2), grid(sizes=2, lengths=5), grid()[:8]])
def test_too_few_points_are_refused(points):
    assert "A fit needs at least 9 finished runs" in scaling.missing(points)
    with pytest.raises(ValueError, match=f"here are {len(points)}, with"):
        scaling.fit(points)


def test_losses_that_do_not_depend_on_size_give_no_best_size():
    random = np.random.default_rng(0)
    flat = [p._replace(loss=3 + 400 * p.tokens**-0.28 + 0.01 * random.normal()) for p in grid()]
    assert "the runs do not determine alpha" in scaling.fit(flat, resamples=6).doubt


def test_runs_are_sorted_and_compared_by_their_settings(rates):
    sweep = report.sweep_of(*read_runs(rates))
    assert [d.key for d in sweep.differences if not d.follows] == ["model.width", "optim.lr"]
    assert [d.follows for d in sweep.differences if d.key == "model.heads"] == ["model.width"]
    assert next(d for d in sweep.differences if d.key == "optim.lr").values == ["0.0005", "0.001", "0.002", "0.004"]
    head, *rows = report.table(sweep)
    losses = [float(row[head.index("val loss")]) for row in rows]
    assert losses == sorted(losses) and len(rows) == 7 and rows[0][-1] == "512-0.002"
    count = 12 * 512**2 * 8 + ROWS * 512
    assert rows[0][head.index("parameters")] == report.short(count) and rows[0][head.index("val loss")] == (
        f"{LAW.loss(count, 1000 * BATCH):.4f}"
    )
    assert list(report.notes(sweep)) == [
        "Unfinished, and left out of all but the learning curves: short.",
        "Nothing logged yet: new.",
    ]


def test_learning_rates_have_one_curve_per_other_settings(rates):
    curves = report.learning_rates(report.sweep_of(*read_runs(rates)))
    assert {name: [rate for rate, _ in curve] for name, curve in curves.items()} == {
        "width=512": [5e-4, 1e-3, 2e-3],
        "width=256": [5e-4, 1e-3, 2e-3],
    }
    _, wide, narrow = report.best_rates(curves)
    assert wide[1] == "0.002" and wide[3] == "edge: try larger"
    assert narrow[1] == "0.001" and narrow[3] == ""


def test_runs_without_validation_are_compared_by_training_loss(tmp_path):
    for lr in (1e-3, 2e-3):
        write_run(tmp_path / f"{lr}", lambda n, d, lr=lr: 3 + lr, val=False, optim__lr=lr)
    sweep = report.sweep_of(*read_runs(tmp_path))
    assert "No run has a validation loss" in next(report.notes(sweep))
    assert dict(report.learning_rates(sweep)["all runs"]) == pytest.approx({1e-3: 3.011, 2e-3: 3.012})


def test_law_takes_complete_runs_and_the_lowest_of_a_pair(sizes):
    points = report.points(report.sweep_of(*read_runs(sizes)))
    assert len(points) == 16
    assert all(point.loss == pytest.approx(LAW.loss(point.parameters, point.tokens)) for point in points)


def test_page_and_terminal_have_the_law(browser, sizes, tmp_path):
    """Nothing scrolls sideways on a medium dark screen, and text is legible."""
    out = tmp_path / "sweep.html"
    done = in_process(command.main, f"runs={sizes}", f"out={out}", "budget=1e20")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"page: {out}", done.stderr
    code = f"""const contrast = {CONTRAST};
    const lines = [...document.querySelectorAll(".chart path")].map((one) => [one.dataset.name, one.getAttribute("d")]);
    return {{ lines, beyond: {SIDEWAYS}, contrast: contrast("p, dt, dd, th, td, h1, h2, h3, button, .legend span"),
             text: document.body.innerText }};"""
    found = evaluated(browser, out.read_text(), code, tmp_path, MEDIUM, DARK)
    assert found["beyond"] == 0 and found["contrast"] >= 4.5
    assert not any("NaN" in d for _, d in found["lines"])
    assert len([name for name, _ in found["lines"] if name.startswith("Loss against tokens")]) == 8
    parameters, tokens = LAW.optimum(1e20)
    for text in ("0.34", "0.28", report.short(parameters), report.short(tokens), f"{LAW.loss(parameters, tokens):.4f}"):
        assert text in found["text"] and text in done.stdout


def test_too_few_runs_are_told(rates, tmp_path):
    done = in_process(command.main, f"runs={rates}", f"out={tmp_path}/a.html")
    assert done.returncode == 0, done.stderr
    said = "A fit needs at least 9 finished runs with different pairs of N and D, with 3 different N and 3 different D"
    assert f"No scaling law. {said}; here are 2, with 2 N and 1 D." in done.stdout
    assert said in (tmp_path / "a.html").read_text()


def test_name_is_not_markup(tmp_path):
    write_run(tmp_path / "<script>alert(1)<", val=False)
    assert in_process(command.main, f"runs={tmp_path}", f"out={tmp_path}/a.html").returncode == 0
    assert (tmp_path / "a.html").read_text().count("<script") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("out=a.html", "runs is missing: name a folder with runs in it, such as runs=runs/lr"),
        ("runs={tmp}/nune", "must be a folder with runs in it: {tmp}/nune does not exist; there is {tmp}/none"),
        ("runs={tmp}/none", "has no run with logged steps: no config.yaml is below it"),
        ("runs={tmp}/silent", "has no run with logged steps: the 1 below it have logged nothing yet"),
        ("runs={tmp}/broken", "broken/a/config.yaml is damaged: it must hold the settings of a run"),
        ("runs={tmp}/torn", "torn/a/metrics.jsonl, line 1 is damaged: "),
        ("runs={rates} out={tmp}", "is a folder: name a file"),
        ("runs={rates} out={tmp}/no/a.html", "must be in a folder that exists: {tmp}/no does not"),
        ("runs={rates} budget=much", "budget=much must be a positive number of FLOPs, such as 1e21"),
        ("runs={rates} budget=-1", "budget=-1 must be a positive number of FLOPs"),
        ("run={rates}", "must be runs=, out= or budget=; see --help"),
    ],
)
def test_wrong_command_is_one_line(rates, tmp_path, arguments, message):
    (tmp_path / "none").mkdir()
    write_run(tmp_path / "silent" / "a", step=0)
    for name, file, content in (
        ("broken", "config.yaml", "a: ["),
        ("torn", "metrics.jsonl", '{"step": 1\n{"step": 2}\n'),
    ):
        write_run(tmp_path / name / "a")
        (tmp_path / name / "a" / file).write_text(content)
    done = in_process(command.main, *arguments.format(tmp=tmp_path, rates=rates).split(), cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(tmp=tmp_path) in done.stderr
    assert not (tmp_path / "sweep_report.html").exists()
