"""`python -m pretrain.data`: runs pretrain/commands/data.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.data", run_name="__main__", alter_sys=True)
