"""Shows what each layer would guess: `python -m pretrain.lens --help`.

Alone, one process holds the whole matrix. Under torchrun its rows are split over the ranks, and read on the shards.
"""

from pathlib import Path

from data_prep.arguments import defaults, settings_of
from data_prep.command import arguments_or, one_line
from data_prep.durable import check_folder

from ..checkpoint import CheckpointError, checkpoint_of
from ..exits import leave
from ..interop.folder import HFModel
from ..lens.command import LensConfig
from ..lens.examples import EXAMPLES
from ..lens.method import DECODERS, INPUTS, NORMS, POINTS

HELP = """What would each layer of a model guess, were it the last?

  python -m pretrain.lens run=runs/a text='def main(' out=lens
  python -m pretrain.lens run=runs/a example=rare_word norm=plain
  python -m pretrain.lens hf=DIR text='Once upon a time'                                a model of Hugging Face
  torchrun --nproc-per-node 2 -m pretrain.lens run=runs/a file=a.txt window=100:150     the matrix split over two ranks

Writes a PNG of each view and lens.html, a page with all of them and all numbers, which needs nothing from outside.
Examples: {examples}

points: {points}, several with commas; input: {inputs}; norm: {norms}; decoder: {decoders}; only: the text of a token.

Settings, and their defaults:
"""


def main() -> None:
    """Exits 0, or 2 with one line on a wrong setting."""
    examples = "".join(f"\n  {name:<12}{example.about}" for name, example in EXAMPLES.items())
    choices = {"points": POINTS, "inputs": INPUTS, "norms": NORMS, "decoders": DECODERS}
    listed = {name: " | ".join(known) for name, known in choices.items()}
    with one_line(CheckpointError):
        arguments = arguments_or(HELP.format(examples=examples, **listed) + defaults(LensConfig))
        settings = settings_of(LensConfig, arguments)
        check_folder(f"out={settings.out}", Path(settings.out))
        if settings.run:  # a wrong folder is named without waiting for torch
            checkpoint_of(Path(settings.run), settings.step)
        else:
            HFModel(Path(settings.hf))
        from ..rendezvous import NotMet
        from .lens_show import show
    with one_line(CheckpointError, NotMet):
        show(settings)


if __name__ == "__main__":
    leave(main)
