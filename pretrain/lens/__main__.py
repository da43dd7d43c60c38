"""What would each layer guess? `python -m pretrain.lens --help`.

Alone, one process holds the whole matrix. Under torchrun its rows are split over the ranks, and read on the shards.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_prep.command import arguments_or, one_line
from data_prep.durable import check_folder
from data_prep.errors import DataError
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from .. import interop
from ..arguments import defaults, settings_of
from ..checkpoint import CheckpointError, checkpoint_of
from ..data import IGNORED
from ..generate import load_model
from ..mesh import ranks_or_alone
from ..models.language_model import LanguageModel
from ..rendezvous import NotMet
from .examples import EXAMPLES
from .lens import DECODERS, FINAL, FROM_INPUT, FROM_OUTPUT, INPUTS, NORMS, POINTS, LensResult, Method, run_lens
from .plot import MOST_COLUMNS, write_pictures
from .views import LensTable, sheet, visible

MOST_GUESSES = 100  # a page has them all
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


@dataclass
class LensConfig:
    """run: its folder; step: of the checkpoint, the newest if null; or hf: a Hugging Face model's folder. text, file or
    example: what to read, after an <|endoftext|>, or bos of a model of Hugging Face. window: positions to show,
    START:STOP. only: of these, those of tokens with this text.

    points, input, norm, decoder, stride: see `Method`. guesses: kept of each cell. memory_mib: of logits at a time.
    """

    run: str = ""
    step: int | None = None
    hf: str = ""
    text: str = ""
    file: str = ""
    example: str = ""
    out: str = "lens"
    window: str | None = None
    only: str = ""
    points: list[str] = field(default_factory=lambda: ["block"])
    input: str = "positions"
    norm: str = "full"
    decoder: str = "none"
    stride: int = 1
    guesses: int = 5
    memory_mib: int = 256

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.hf):
            raise ValueError("give one of run=, the folder of a run, and hf=, the folder of a Hugging Face model")
        if self.hf and self.step is not None:
            raise ValueError(f"step={self.step} must be null with hf={self.hf}, which has no steps")
        if sum(map(bool, (self.text, self.file, self.example))) != 1:
            raise ValueError("give one of text=, file= and example=: what to read")
        if self.example and self.example not in EXAMPLES:
            raise ValueError(f"example={self.example} must be one of {', '.join(EXAMPLES)}")
        if not 1 <= self.guesses <= MOST_GUESSES:
            raise ValueError(f"guesses={self.guesses} must be in [1, {MOST_GUESSES}]")
        if not self.out or (Path(self.out).exists() and not Path(self.out).is_dir()):
            raise ValueError(f"out={self.out} must be a folder, there or to be made")
        if self.memory_mib < 1:
            raise ValueError(f"memory_mib={self.memory_mib} must be at least 1")
        self.method()

    def method(self) -> Method:
        return Method(tuple(self.points), self.input, self.norm, self.decoder, self.stride)


@dataclass(frozen=True)
class Source:
    """A model to look into, and what it is called. context: the most positions it can see. name: an id's text."""

    title: str
    model: LanguageModel
    body: nn.Module
    context: int
    encode: Callable[[str], list[int]]  # a text's ids, the document's beginning included
    name: Callable[[int], str]


def main() -> None:
    """Exits 0, or 2 with one line on a wrong setting."""
    examples = "".join(f"\n  {name:<12}{example.about}" for name, example in EXAMPLES.items())
    choices = {"points": POINTS, "inputs": INPUTS, "norms": NORMS, "decoders": DECODERS}
    listed = {name: " | ".join(known) for name, known in choices.items()}
    with one_line(CheckpointError, NotMet):
        arguments = arguments_or(HELP.format(examples=examples, **listed) + defaults(LensConfig))
        settings = settings_of(LensConfig, arguments)
        check_folder(f"out={settings.out}", Path(settings.out))
        with ranks_or_alone() as device:
            shown, found = see(settings, device)
            if not dist.is_initialized() or dist.get_rank() == 0:
                paths = write_pictures(shown, Path(settings.out))
                print(summary(found))
                print(f"written: {paths[-1]} and {len(paths) - 1} pictures beside it")


def see(settings: LensConfig, device: torch.device) -> tuple[LensTable, LensResult]:
    """Measures. All ranks of the process group take part, and get the same."""
    source = open_source(settings, device)
    example = EXAMPLES.get(settings.example)
    ids = source.encode(example.text if example else _text(settings))
    window = _window(settings.window, len(ids))
    if window.stop > source.context:
        raise ValueError(
            f"the text has {window.stop:,} tokens up to the end of the window, but model.context={source.context}:"
            f" give a shorter one, or window=START:STOP with a STOP of at most {source.context}"
        )
    only = settings.only or (example.only if example else "")
    columns = [n for n, id in enumerate(ids[window]) if not only or source.name(id).strip("·") == only]
    if not columns:
        raise ValueError(f"only={only} must be the text of a token in the window: none is")
    if len(columns) > MOST_COLUMNS:
        raise ValueError(
            f"window={window.start}:{window.stop} shows {len(columns)} positions: at most {MOST_COLUMNS} fit a picture"
        )
    vocab = source.model.vocab
    found = run_lens(
        vocab,
        source.model.body,
        source.body,
        torch.tensor([ids[: window.stop]], device=device),
        torch.tensor([[*ids[1:], IGNORED][: window.stop]], device=device),
        settings.method(),
        window=window,
        k=min(settings.guesses, vocab.shard.vocab_size),
        memory_mib=settings.memory_mib,
    )
    method = f"norm {settings.norm}" + ("" if settings.decoder == "none" else f", through the last {settings.decoder}")
    title = f"{source.title}, {method}"
    return sheet(found, title, columns, window.start, source.name, vocab.shard.vocab_size), found


def open_source(settings: LensConfig, device: torch.device) -> Source:
    """Where the model comes from: the one place that knows."""
    if settings.hf:
        found = interop.HFModel(Path(settings.hf))
        spec, special, why = interop.tokenizer_of(found)
        if spec is None:
            raise ValueError(f"hf={settings.hf}: the text cannot be encoded: {why}")
        model, context = interop.load_model(found, device), found.model.context
        return _source(found.folder.name, model, context, Tokenizer(spec), special)
    run = Path(settings.run)
    folder = checkpoint_of(run, settings.step)
    tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
    return _source(f"{run.name} {folder.name}", *load_model(folder, device), tokenizer, SpecialTokens.of_run(run))


def _source(title: str, model: LanguageModel, context: int, tokenizer: Tokenizer, special: SpecialTokens) -> Source:
    assert isinstance(model.body, nn.Module)

    def encode(text: str) -> list[int]:
        return [special.begin(tokenizer.spec), *tokenizer.encode(text).tolist()]

    def name(id: int) -> str:
        try:
            return visible(tokenizer.decode_bytes([id]))
        except DataError:  # a row beyond the tokenizer's: vocab.size may be larger
            return f"#{id}"

    return Source(title, model, model.body, context, encode, name)


def _text(settings: LensConfig) -> str:
    """ValueError where it is not UTF-8."""
    try:
        settings.text.encode()
        return settings.text or Path(settings.file).read_text(encoding="utf-8")
    except UnicodeError as error:
        key = "text" if settings.text else f"file={settings.file}"
        raise ValueError(f"{key} must be UTF-8 text: {error.reason if hasattr(error, 'reason') else error}") from error


def _window(given: str | None, length: int) -> slice:
    if given is None:
        return slice(0, length)
    start, colon, stop = given.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= length):
        raise ValueError(f"window={given} must be START:STOP, of the text's {length} positions")
    return slice(int(start), int(stop))


def summary(found: LensResult) -> str:
    """A line a row, of the means over the window."""
    reading, lines = (
        found.reading,
        [f"{'row':<20} {'KL(final‖row)':>14} {'KL(input‖row)':>14} {'entropy':>8} {'as final':>9}"],
    )
    for r, name in enumerate(found.rows):
        kl = reading.kl_from[r].mean(0).tolist()
        same = (reading.ranks[r, :, FINAL] == 1).double().mean().item()
        entropy = reading.entropy[r].mean().item()
        lines.append(f"{name:<20} {kl[FROM_OUTPUT]:>14.3f} {kl[FROM_INPUT]:>14.3f} {entropy:>8.3f} {same:>9.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
