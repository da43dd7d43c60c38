"""`python -m pretrain.evaluate`: runs pretrain/commands/evaluate.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.evaluate", run_name="__main__", alter_sys=True)
