"""`python -m pretrain.lens`: runs pretrain/commands/lens.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.lens", run_name="__main__", alter_sys=True)
