"""`python -m pretrain.tie_report`: runs pretrain/commands/tie_report.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.tie_report", run_name="__main__", alter_sys=True)
