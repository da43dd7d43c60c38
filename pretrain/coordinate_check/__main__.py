"""`python -m pretrain.coordinate_check`: runs pretrain/commands/coordinate_check.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.coordinate_check", run_name="__main__", alter_sys=True)
