"""Reports what the tie costs: `python -m pretrain.tie_report --help`."""

from pathlib import Path

from data_prep.arguments import key_values
from data_prep.command import arguments_or, one_line
from data_prep.durable import durable

from ..checkpoint import CheckpointError

HELP = """What does the tie cost? Compares a tied and an untied run in one page that needs nothing from outside.

  python -m pretrain.tie_report tied=runs/tied untied=runs/untied out=tie.html

`untied` may be a run that was split on the way (vocab.untie_at). With monitor.embedding_every=N in both runs the
page also has the gradients of the two uses and the health of the rows. Default: out=tie_report.html
"""


def main() -> None:
    """Exits 0, or 2 with one line on a wrong command."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        given = key_values(arguments, ("tied", "untied", "out"), "tied=, untied= or out=")
        for key in ("tied", "untied"):
            if not given.get(key):
                raise ValueError(f"{key} is missing: name the folder of a run, such as {key}=runs/{key}")
        out = Path(given.get("out", "tie_report.html"))
        if out.is_dir():
            raise ValueError(f"out={out} is a folder: name a file, such as out={out / 'tie.html'}")
        if not out.parent.is_dir():
            raise ValueError(f"out={out} must be in a folder that exists: {out.parent} does not")
        from ..tie_report.page import page  # they need torch
        from ..tie_report.report import facts, warnings
        from ..tie_report.run import ReportRun

        tied, untied = ReportRun("tied", Path(given["tied"])), ReportRun("untied", Path(given["untied"]))
        with durable(out) as file:
            file.write(page(tied, untied).encode())
        for line in warnings(tied, untied):
            print(line)
        for name, *values in facts(tied, untied):
            print(f"{name:<28} {values[0]:>15} {values[1]:>15} {values[2]:>22}")
        print(f"page: {out}")


if __name__ == "__main__":
    main()
