"""Writes the GPU's part of docs/benchmarks.md, between two comments, from the files that the phases have written."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import markdown
from tests.gpu_phases import head, step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu: python tests/gpu.py report DIR writes up to the next comment -->", "<!-- gpu: end -->"
NOT_MEASURED = "not measured"
Result = Mapping[str, Any]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests/gpu.py report", description=__doc__)
    parser.add_argument("folder", type=Path, help="its files PHASE.json, and those in its folders, are read")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = read(options.folder)
    if options.page.resolve() == PAGE and any(result["size"] != "full" for result in results.values()):
        parser.error(f"{options.folder} has figures of a rehearsal: name another page with --page")
    write(options.page, results)
    print(f"{options.page}: {len(results)} measured")


def read(folder: Path) -> dict[tuple[str, str], Result]:
    """The results by phase and part, without failed ones. Of several files with the same part the newest counts."""
    found: dict[tuple[str, str], Result] = {}
    for path in sorted(folder.rglob("*.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(path.read_text())
        for name, result in record["parts"].items():
            if "figures" in result:
                found[record["phase"], name] = result
    return found


def write(page: Path, results: Mapping[tuple[str, str], Result]) -> None:
    """Replaces the text between the comments."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page} must have the lines {BEGIN} and {END}"
    page.write_text(f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}")


def section(results: Mapping[tuple[str, str], Result]) -> str:
    parts = [summary_of_head(results), summary_of_steps(results), others(results)]
    parts += [table_of_head(result) for (phase, _), result in results.items() if phase == "head"]
    return "\n\n".join([introduction(results), *filter(None, parts)])


def introduction(results: Mapping[tuple[str, str], Result]) -> str:
    if not results:
        return "**On a GPU nothing has been measured yet.** `python tests/gpu.py` does that, and writes these tables."
    return "`python tests/gpu.py` has measured this on one device, and has written these tables."


def source(results: Mapping[tuple[str, str], Result], *phases: str) -> str:
    """The command of a table, and on what it was measured."""
    where = {
        f"{result['card']}, torch {result['torch']}, Triton {result['triton']}"
        for (phase, _), result in results.items()
        if phase in phases
    }
    return ": ".join([f"`python tests/gpu.py {' '.join(phases)}`", *filter(None, ["; ".join(sorted(where))])])


def summary_of_head(results: Mapping[tuple[str, str], Result]) -> str:
    """One line per size of the full measurement: our share of the bare rate. Rehearsals have other sizes."""
    rows = []
    measured = [name for phase, name in results if phase == "head" and name.startswith("M=")]
    for name in dict.fromkeys([*map(head.name_of, head.FULL), *measured]):
        figures = _figures(results, "head", name)
        if not figures:
            rows.append([name, NOT_MEASURED, *[""] * 3])
            continue
        own = figures["rivals"][head.OURS]
        numbers = [f"{own['of bare']:.0%}", f"{own['tflops']:,.0f}", f"{own['beyond dW MiB']:,.0f}"]
        rows.append([name, *numbers, _best_rival(figures["rivals"])])
    return f"{source(results, 'head')}\n\n" + markdown(
        ["the head, bf16", "share of a bare matmul's rate", "TFLOP/s", "MiB beyond dW", "best other"], rows
    )


def _best_rival(rivals: Mapping[str, Result]) -> str:
    ran = {
        name: own["of bare"] for name, own in rivals.items() if name not in (head.OURS, head.LIMIT) and "of bare" in own
    }
    best = max(ran, key=lambda name: ran[name], default=None)
    return f"{best}: {ran[best]:.0%}" if best else "none"


def summary_of_steps(results: Mapping[tuple[str, str], Result]) -> str:
    """One line per model, vocabulary and system; ours are listed before they are measured."""
    wanted = [f"{model} V={rows}, {step.OURS}" for model in step.MODELS for rows in step.VOCABULARIES]
    lines = []
    parts = dict.fromkeys([*wanted, *(name for phase, name in results if phase == "step")])
    sizes = list(dict.fromkeys(part.split(", ")[0] for part in parts))
    for part in sorted(parts, key=lambda part: sizes.index(part.split(", ")[0])):
        own = _figures(results, "step", part)
        size, name = part.split(", ", 1)
        rival = _figures(results, "step", f"{size}, {step.RIVAL}")
        if "reason" in own or not own:
            lines.append([size, name, own.get("reason", NOT_MEASURED), *[""] * 6])
            continue
        line = [size, name, _number(own, "tokens/s", "{:,.0f}"), _ratio(own, rival, "tokens/s")]
        line += [_number(own, "MFU", "{:.0%}"), _number(own, "peak MiB", "{:,.0f}"), _ratio(own, rival, "peak MiB")]
        lines.append([*line, _number(own, "planned tokens/s", "{:,.0f}"), _number(own, "planned MiB", "{:,.0f}")])
    header = [
        "the step",
        "system",
        "tokens/s",
        "× FSDP2",
        "MFU",
        "peak MiB",
        "× FSDP2",
        "planned tokens/s",
        "planned MiB",
    ]
    return f"{source(results, 'step')}; the plan is launch/plan.py's\n\n" + markdown(header, lines)


def others(results: Mapping[tuple[str, str], Result]) -> str:
    """One line per check or measurement of the other phases."""
    lines = []
    options = _figures(results, "correct", "options against float64")
    worst = {dtype: max(errors.values()) for dtype, errors in options["worst"].items()} if options else {}
    text = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in worst.items())
    lines.append(["all options against float64: largest error", text or NOT_MEASURED])
    kernels = _figures(results, "correct", "the kernels' tests")
    lines.append(["the kernels' tests", _sentence(kernels, "{passed} passed, {skipped} skipped")])
    bits = _figures(results, "correct", "the same bits")
    lines.append(["dX and dW at a size of use: the same bits", _sentence(bits, "in {turns} turns")])
    lookup = _figures(results, "correct", "the lookup's gradient")
    lines.append(
        ["the lookup's gradient, 1,024 to 4,096 tokens: the same bits", _sentence(lookup, "in {tries} turns each")]
    )
    demo = _figures(results, "demo", "make demo")
    lines.append(
        [
            "`make demo`",
            _sentence(
                demo, "{tokens_per_s:,.0f} tokens/s, {val_bits_per_byte:.3f} bits per byte, {seconds:.0f} s in all"
            ),
        ]
    )
    resumed = _figures(results, "demo", "resume")
    lines.append(
        [
            "a run resumed in the middle",
            _sentence(
                resumed, "{equal losses} of {of} losses equal; the largest difference is {largest difference:.1e}"
            ),
        ]
    )
    saved = _figures(results, "demo", "a save")
    own = saved["saves"]["asynchronous"] | saved if saved else {}
    lines.append(
        [
            "an asynchronous save",
            _sentence(own, "{state MiB:,.0f} MiB; training held for {held s:.3f} s, {whole cost s:.2f} s in all"),
        ]
    )
    trace = _figures(results, "trace", "five steps")
    lines.append(
        [
            "a profiled step of llama_1b, eager",
            _sentence(
                trace, "{seconds per step:.3f} s, device busy {busy:.0%}, {waits per step:.0f} waits of the host"
            ),
        ]
    )
    return f"{source(results, 'correct', 'demo', 'trace')}\n\n" + markdown(["also", "result"], lines)


def table_of_head(result: Result) -> str:
    """All rivals at one size, or the matmuls alone."""
    own = result["figures"]
    sizes = f"{own['tokens']:,} tokens, width {own['width']:,}, {own['rows']:,} rows"
    title = f"`{result['command']}`: {result['card']}, bf16, {sizes}\n\n"
    if "ms" in own:
        return title + markdown(["part of the matmuls", "ms"], [[name, f"{ms:.3f}"] for name, ms in own["ms"].items()])
    lines = [
        [name, rival["reason"], *[""] * 3]
        if "reason" in rival
        else [
            name,
            f"{1e3 * rival['seconds']:.2f}",
            f"{rival['tflops']:,.0f}",
            f"{rival['of bare']:.0%}",
            f"{rival['extra MiB']:,.0f}",
        ]
        for name, rival in own["rivals"].items()
    ]
    return title + markdown(["forward and backward", "ms", "TFLOP/s", "of the bare rate", "extra peak MiB"], lines)


def _figures(results: Mapping[tuple[str, str], Result], phase: str, name: str) -> dict[str, Any]:
    result = results.get((phase, name))
    return dict(result["figures"]) if result else {}


def _number(figures: Result, key: str, form: str) -> str:
    return form.format(figures[key]) if key in figures else NOT_MEASURED


def _ratio(own: Result, rival: Result, key: str) -> str:
    return f"{own[key] / rival[key]:.2f}" if key in own and key in rival else NOT_MEASURED


def _sentence(figures: Result, form: str) -> str:
    return form.format_map(figures) if figures else NOT_MEASURED
