"""Shows what each layer would guess: `python -m pretrain.lens --help`.

One process holds the whole matrix. Under torchrun the matrix is split over the ranks, and read on the shards.
"""

from pathlib import Path

from data_prep.arguments import defaults, settings_of
from data_prep.command import arguments_or, one_line
from data_prep.describe import columns
from data_prep.durable import check_folder

from ..checkpoint import CheckpointError, checkpoint_of
from ..exits import leave
from ..interop.folder import HFModel
from ..lens.command import LensConfig
from ..lens.examples import EXAMPLES

HELP = """Shows what each layer of a model would guess if it were the last one (the logit lens).

  python -m pretrain.lens run=runs/a text='def main(' out=lens
  python -m pretrain.lens run=runs/a example=rare_word norm=plain
  python -m pretrain.lens hf=DIR text='Once upon a time'                                a Hugging Face model
  torchrun --nproc-per-node 2 -m pretrain.lens run=runs/a file=a.txt window=100:150     the matrix split over two ranks

Writes one PNG per view, and lens.html: a page with all views and numbers, which needs no network.

Examples:
{examples}

Settings, and their defaults:
"""


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if a setting is wrong."""
    examples = columns((f"example={name}", example.about) for name, example in EXAMPLES.items())
    with one_line(CheckpointError):
        arguments = arguments_or(HELP.format(examples=examples) + defaults(LensConfig))
        settings = settings_of(LensConfig, arguments)
        check_folder(f"out={settings.out}", Path(settings.out))
        if settings.run:  # reports a wrong folder before the imports of torch
            checkpoint_of(Path(settings.run), settings.step)
        else:
            HFModel(Path(settings.hf))
        from ..rendezvous import NotMet
        from .lens_show import show
    with one_line(CheckpointError, NotMet):
        show(settings)


if __name__ == "__main__":
    leave(main)
