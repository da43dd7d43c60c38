"""`python -m pretrain.interop.hf`: runs pretrain/commands/hf.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.hf", run_name="__main__", alter_sys=True)
