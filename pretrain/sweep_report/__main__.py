"""`python -m pretrain.sweep_report`: runs pretrain/commands/sweep_report.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.sweep_report", run_name="__main__", alter_sys=True)
