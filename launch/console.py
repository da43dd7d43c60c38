"""Console scripts of an installed package, such as `rowshard-train`.

They prepare output and Ctrl-C before the module of the command is imported, which takes seconds.
"""

from importlib import import_module

from data_prep import terminal


def _run(module: str) -> None:
    terminal.begin()
    import_module(module).main()


def tokenize() -> None:
    """Tokenises a corpus, as `python data_prep/tokenize.py` does."""
    from data_prep import fork_server  # only this command needs it

    terminal.begin()
    fork_server.start_early()
    _run("data_prep.app")


def train() -> None:
    """Trains on this machine, as `python launch/local.py` does."""
    _run("launch.local")


def slurm() -> None:
    """Submits to Slurm, as `python launch/slurm.py` does."""
    _run("launch.slurm")


def plan() -> None:
    """Plans a training, as `python launch/plan.py` does."""
    _run("launch.plan")


def generate() -> None:
    """Samples from a run, as `python -m pretrain.generate` does."""
    _run("pretrain.generate")


def evaluate() -> None:
    """Runs benchmarks on a run, as `python -m pretrain.evaluate` does."""
    _run("pretrain.commands.evaluate")


def lens() -> None:
    """Draws the logit lens, as `python -m pretrain.lens` does."""
    _run("pretrain.commands.lens")


def hf() -> None:
    """Imports and exports Hugging Face models, as `python -m pretrain.interop.hf` does."""
    _run("pretrain.commands.hf")
