"""The page of a tied and an untied run shows the numbers of the runs, and draws all of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.families.gpt2 import GPT2Config
from pretrain.tie_report.page import page
from pretrain.tie_report.report import Chart, facts, sections, warnings
from pretrain.tie_report.run import ReportRun
from tests.browser import CONTRAST, DARK, NARROW, SIDEWAYS, evaluated
from tests.pretrain.tiny import VOCAB, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

STEPS, LOOKS = 9, 3
LATER = (
    "The last validation losses are of different steps (step 9 of the tied run, step 6 of the untied run): compare the"
    " curves, not these values."
)
BODY = sum(p.numel() for p in GPT2Config(layers=2, width=24, heads=3, context=16).body().parameters())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs: tied, untied, split after some steps, and a tied one with another seed and without the monitor."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_tokens(folder / "tokens")
    kinds = {
        "tied": {},
        "untied": {"vocab__tie": "untied"},
        "split": {"vocab__untie_at": 4},
        "plain": {"seed": 8, "monitor__embedding_every": 0, "train__hang_timeout": 600.0},
    }
    for kind, changes in kinds.items():
        settings = {"train__steps": STEPS, "monitor__embedding_every": LOOKS, "train__micro_batch": 6} | changes
        run_ranks(2, train_rank, tiny_config(data, folder / kind, **settings))
    return {kind: folder / kind for kind in kinds}


def pair(runs: dict[str, Path], tied: str = "tied", untied: str = "untied") -> tuple[ReportRun, ReportRun]:
    return ReportRun("tied", runs[tied]), ReportRun("untied", runs[untied])


def charts_of(tied: ReportRun, untied: ReportRun) -> dict[str, Chart]:
    return {chart.title: chart for section in sections(tied, untied) for chart in section.charts}


def test_facts_match_the_runs(runs):
    found = {name: cells for name, *cells in facts(*pair(runs))}
    matrix = VOCAB * 24
    one, other = BODY + matrix, BODY + 2 * matrix
    assert found["parameters"] == [f"{one:,}", f"{other:,}", f"+{matrix:,} (+{matrix / one:.1%})"]
    assert found["parameters in matrices"][:2] == [f"{matrix:,}", f"{2 * matrix:,}"]
    assert found["steps"] == [str(STEPS), str(STEPS), "+0"]
    for kind, value in zip(("tied", "untied"), found["training loss, last tenth of the log"], strict=False):
        last = json.loads((runs[kind] / "metrics.jsonl").read_text().splitlines()[-1])
        assert value == f"{last['loss']:.4f}"


def test_curves_match_the_runs(runs):
    charts = charts_of(*pair(runs))
    lines = [json.loads(line) for line in (runs["untied"] / "metrics.jsonl").read_text().splitlines()]
    by_name = {line.name: line.points for line in charts["Training loss"].lines}
    assert by_name["untied"] == [(line["tokens"], line["loss"]) for line in lines]
    assert {line.name for line in charts["Effective rank"].lines} == {"tied", "untied, input", "untied, output"}
    assert [len(line.points) for line in charts["Cosine"].lines] == [STEPS // LOOKS] * 2
    assert "Drift since the split" not in charts and not list(warnings(*pair(runs)))
    for chart in charts.values():
        assert all(np.isfinite([y for _, y in line.points]).all() for line in chart.lines), chart.title


def test_split_run_shows_its_drift(runs):
    split = pair(runs, untied="split")
    (drift,) = charts_of(*split)["Drift since the split"].lines
    assert drift.name == "untied" and len(drift.points) == STEPS - 4
    assert "The untied run was tied up to step 4: until then its curves are of one matrix." in warnings(*split)


def test_other_differences_are_warnings(runs):
    """Warns about settings that can change a loss, not about `monitor` or `train.hang_timeout`."""
    assert list(warnings(*pair(runs, tied="plain"))) == [
        "Another setting differs: seed is 8 in the tied run, 7 in the untied run.",
        "The tied run has no measures of gradients and rows: monitor.embedding_every was 0.",
    ]
    assert "Input's share" in charts_of(*pair(runs, tied="plain")), "the untied run has them"


@pytest.mark.parametrize("last,expected", [(9, []), (6, [LATER]), (0, [])])
def test_last_losses_of_different_steps_are_warned_of(runs, tmp_path, last, expected):
    """The tied run is evaluated at its end, the untied one at step `last`; 0: never."""
    evaluated = {kind: tmp_path / kind for kind in ("tied", "untied")}
    for (kind, folder), end in zip(evaluated.items(), (STEPS, last), strict=True):
        shutil.copytree(runs[kind], folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        text = "".join(
            json.dumps(line | ({"val_loss": 5.0} if line["step"] in range(3, end + 1, 3) else {})) + "\n"
            for line in lines
        )
        (folder / "metrics.jsonl").write_text(text)
    assert list(warnings(*pair(evaluated))) == expected


def test_page_draws_every_curve(browser, runs, tmp_path):
    """A narrow dark screen: nothing scrolls sideways, text is legible, keys read the values."""
    out = tmp_path / "tie.html"
    command = [sys.executable, "-m", "pretrain.tie_report", f"tied={runs['tied']}", f"untied={runs['split']}"]
    done = subprocess.run([*command, f"out={out}"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and f"page: {out}" in done.stdout, done.stderr
    code = f"""const contrast = {CONTRAST}, svg = document.querySelector(".chart svg");
    const lines = [...document.querySelectorAll(".chart path")].map((one) => [one.dataset.name, one.getAttribute("d")]);
    svg.dispatchEvent(new KeyboardEvent("keydown", {{ key: "ArrowRight" }}));
    return {{ lines, beyond: {SIDEWAYS}, contrast: contrast("p, dt, dd, th, td, h1, h2, h3, button, .legend span"),
             read: document.querySelector(".chart .legend").textContent, text: document.body.innerText }};"""
    text = out.read_text()
    found = evaluated(browser, text, code, tmp_path, NARROW, DARK)
    charts = charts_of(*pair(runs, untied="split"))
    drawn = {name: d.count("L") + d.count("M") for name, d in found["lines"]}
    assert drawn == {f"{c.title}: {line.name}": len(line.points) for c in charts.values() for line in c.lines}
    assert len(charts) > 12 and "NaN" not in "".join(d for _, d in found["lines"])
    assert found["beyond"] == 0 and found["contrast"] >= 4.5
    first = charts["Training loss"].lines[0].points[0]
    assert f"tied {float(f'{first[1]:.3g}')}" in found["read"] and f"at {first[0]}" in found["read"]
    assert f"{BODY + VOCAB * 24:,}" in found["text"] and f"{runs['split']}, step {STEPS}" in found["text"]


def test_token_is_not_markup(runs, monkeypatch):
    monkeypatch.setattr(ReportRun, "text", lambda self, row: "</table><script>")
    assert page(*pair(runs)).count("<script") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["tied={tied}"], "untied is missing: name the folder of a run, such as untied=runs/untied"),
        (["tied={untied}", "untied={untied}"], "has 2 matrices in its newest checkpoint, step 9: it is not tied"),
        (["tied={tied}", "untied={tied}"], "has 1 matrix in its newest checkpoint, step 9: it is not untied"),
        (["tied={empty}", "untied={untied}"], "has no checkpoint: is it a run?"),
        (["tied={quiet}", "untied={untied}"], "has logged nothing in metrics.jsonl"),
        (["tied={tied}", "untied={untied}", "out={empty}"], "is a folder: name a file"),
        (["tied={tied}", "untied={untied}", "out={empty}/no/a.html"], "must be in a folder that exists"),
        (["tied={damaged}", "untied={untied}"], "metrics.jsonl, line 1 is damaged: "),
        (["both={tied}"], "must be tied=, untied= or out=; see --help"),
    ],
)
def test_wrong_command_is_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    from pretrain.commands import tie_report as command

    quiet, empty = tmp_path / "quiet", tmp_path / "empty"
    shutil.copytree(runs["tied"] / "checkpoints", quiet / "checkpoints")
    empty.mkdir()
    shutil.copytree(quiet, tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    names = {**runs, "quiet": quiet, "empty": empty, "damaged": tmp_path / "damaged"}
    monkeypatch.setattr(sys, "argv", ["tie_report", *(argument.format(**names) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
