"""Prints what the steps of a trace spent their time on: `python -m pretrain.profile --help`."""

from pathlib import Path

from data_prep import terminal
from data_prep.arguments import count_of, key_values
from data_prep.columns import aligned
from data_prep.command import arguments_or, one_line

from ..profile import Row, TraceSummary, read_trace, traces

HELP = """Where does a step's time go? Prints the parts of a step, and the ten operations that take longest.

  python -m pretrain.profile run=runs/a             the newest trace of the run
  python -m pretrain.profile run=runs/a rank=1      the newest trace of rank 1
  python -m pretrain.profile run=runs/a top=30      thirty operations

A run writes traces with profile.steps=[10,12]. They are files in RUN/profile, for https://ui.perfetto.dev and for
TensorBoard's profiler plugin.
"""
KEYS = {
    "run": "folder of the run",
    "rank": "rank whose trace is read; default: the first that has the newest trace",
    "top": "number of operations; default: 10",
}
TOP = 10
LONGEST_NAME = 70  # letters of an operation's name; a GPU kernel's can be hundreds


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if there is no trace."""
    with one_line():
        given = key_values(arguments_or(HELP), KEYS, "run=, rank= or top=")
        if not given.get("run"):
            raise ValueError("run is missing; give the folder of a run, such as run=runs/a")
        top = count_of("top", given.get("top", str(TOP)))
        path = _newest(given["run"], given.get("rank"))
        found = read_trace(path)
        terminal.product()
        print(f"{path}\n")
        print("\n".join(page(found, top)))


def _newest(run: str, rank: str | None) -> Path:
    """Returns the newest trace. Raises ValueError if there is none."""
    if not Path(run).is_dir():
        raise ValueError(f"run={run} must be the folder of a run; it does not exist")
    found = traces(Path(run))
    if not found:
        raise ValueError(
            f"run={run} has no trace: train some steps with a trace, such as"
            f" python launch/local.py resume={run} profile.steps=[10,12], with steps that are still to be done"
        )
    if rank is None:
        steps = found[-1].name.partition(".")[0]
        return min(path for path in found if path.name.startswith(f"{steps}."))
    chosen = [path for path in found if f".rank-{count_of('rank', rank)}." in path.name]
    if not chosen:
        raise ValueError(f"rank={rank} has no trace in run={run}: there are {', '.join(path.name for path in found)}")
    return chosen[-1]


def page(found: TraceSummary, top: int) -> list[str]:
    """Formats the tables."""
    first, last = found.steps[0], found.steps[-1]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    lines = [f"{steps}: {found.milliseconds:,.2f} ms per step", ""]
    lines += aligned([["part", "ms/step", "share", "calls"], *([row.part, *_numbers(row)] for row in found.parts)])
    if found.on_gpu:
        share = found.exposed / found.milliseconds if found.milliseconds else 0.0
        lines += ["", f"communication exposed: {found.exposed:,.2f} ms/step, {share:.1%}"]
    heads = ["operation", "part", "ms/step", "share", "calls"]
    rows = [[_short(row.operation), row.part, *_numbers(row)] for row in found.operations[:top]]
    return [*lines, "", *aligned([heads, *rows], left=(0, 1))]


def _numbers(row: Row) -> list[str]:
    return [f"{row.milliseconds:,.2f}", f"{row.share:.1%}", f"{row.calls:,.5g}"]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 2]} …"


if __name__ == "__main__":
    main()
