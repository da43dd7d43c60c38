"""Runs the lens on a text and draws what it found. Apart from lens.py, the command, because it needs torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import DataError
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from ..checkpoint import checkpoint_of
from ..data import IGNORED
from ..generation import load_model
from ..interop.folder import HFModel
from ..interop.initial import tokenizer_of
from ..interop.weights import load_model as load_hf_model
from ..lens.command import LensConfig
from ..lens.examples import EXAMPLES
from ..lens.lens import FINAL, FROM_INPUT, FROM_OUTPUT, LensResult, run_lens
from ..lens.plot import MOST_COLUMNS, write_pictures
from ..lens.views import LensTable, sheet, visible
from ..mesh import ranks_or_alone
from ..models.language_model import LanguageModel


@dataclass(frozen=True)
class Source:
    """A model to look into, and what it is called. context: the most positions it can see. name: an id's text."""

    title: str
    model: LanguageModel
    body: nn.Module
    context: int
    encode: Callable[[str], list[int]]  # a text's ids, the document's beginning included
    name: Callable[[int], str]


def show(settings: LensConfig) -> None:
    """Writes pictures and page, and prints a summary, on the first rank."""
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
    """Opens the source of the model: the one place that knows where it comes from."""
    if settings.hf:
        found = HFModel(Path(settings.hf))
        spec, special, why = tokenizer_of(found)
        if spec is None:
            raise ValueError(f"hf={settings.hf}: the text cannot be encoded: {why}")
        model, context = load_hf_model(found, device), found.model.context
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
    """Reads the text. Raises ValueError if it is not UTF-8."""
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
