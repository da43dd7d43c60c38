"""Compares a tied and an untied run: `python -m pretrain.tie_report --help`."""

from pathlib import Path

from data_prep.arguments import key_values
from data_prep.columns import aligned
from data_prep.command import arguments_or, one_line
from data_prep.durable import durable

from ..checkpoint import CheckpointError

HELP = """What does the tie cost? Compares a tied and an untied run on one page, which needs no network.

  python -m pretrain.tie_report tied=runs/tied untied=runs/untied out=tie.html

`untied` may be a run that began tied and was split (vocab.untie_at). If both runs had monitor.embedding_every=N, the
page also has the gradients of the two uses and the health of the rows. Default: out=tie_report.html
"""
KEYS = {
    "tied": "folder of the tied run",
    "untied": "folder of the untied run, or of one that was split on the way",
    "out": "HTML file to write; default: tie_report.html",
}


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if the command is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        given = key_values(arguments, KEYS, "tied=, untied= or out=")
        for key in ("tied", "untied"):
            if not given.get(key):
                raise ValueError(f"{key} is missing: name the folder of a run, such as {key}=runs/{key}")
        out = Path(given.get("out", "tie_report.html"))
        if out.is_dir():
            raise ValueError(f"out={out} is a folder: name a file, such as out={out / 'tie.html'}")
        if not out.parent.is_dir():
            raise ValueError(f"out={out} must be in a folder that exists: {out.parent} does not")
        from ..tie_report.page import page  # these need torch
        from ..tie_report.report import facts, warnings
        from ..tie_report.run import ReportRun

        tied, untied = ReportRun("tied", Path(given["tied"])), ReportRun("untied", Path(given["untied"]))
        with durable(out) as file:
            file.write(page(tied, untied).encode())
        for line in warnings(tied, untied):
            print(line)
        for line in aligned([["", "tied", "untied", "untied − tied"], *facts(tied, untied)]):
            print(line)
        print(f"page: {out}")


if __name__ == "__main__":
    main()
