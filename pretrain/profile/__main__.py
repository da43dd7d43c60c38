"""`python -m pretrain.profile`: runs pretrain/commands/profile.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pretrain.commands.profile", run_name="__main__", alter_sys=True)
