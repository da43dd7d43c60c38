"""Continues a prompt with a trained model: `python -m pretrain.generate run=runs/a prompt='def '`.

A single process holds the whole matrix. Under torchrun the rows are split over the ranks, which draw the ids from their
shards. The text is the same. A file of prompts is continued in batches.
"""

from pathlib import Path

from data_prep import terminal
from data_prep.arguments import defaults, settings_of
from data_prep.command import arguments_or, one_line

from .checkpoint import CheckpointError, check_weights, checkpoint_of, read_manifest
from .config.generation import GenerateConfig, read_prompts
from .exits import leave

HELP = """Continue a prompt with a trained model.

  python -m pretrain.generate run=runs/a prompt='def ' tokens=200 temperature=0.8 top_k=50 top_p=0.95 seed=1
  torchrun --nproc-per-node 2 -m pretrain.generate run=runs/a prompt='def '      the matrix split over two ranks
  python -m pretrain.generate run=runs/a prompts=prompts.txt                     a JSON line per prompt of the file

Settings, and their defaults:
"""


def main() -> None:
    """Prints prompt and continuation, token by token. Exits with 2 and one line if a setting is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP + defaults(GenerateConfig))
        settings = settings_of(GenerateConfig, arguments)
        folder = checkpoint_of(Path(settings.run), settings.step)  # faults are reported before torch is imported
        check_weights(folder, read_manifest(folder), settings.weights)
        if settings.prompts:
            read_prompts(Path(settings.prompts))
        terminal.product()
        from .generation import print_text
        from .rendezvous import NotMet
    with one_line(CheckpointError, NotMet):
        print_text(settings)


if __name__ == "__main__":
    leave(main)
