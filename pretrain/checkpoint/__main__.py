"""`python -m pretrain.checkpoint`: runs pretrain/commands/checkpoint.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.checkpoint", run_name="__main__", alter_sys=True)
