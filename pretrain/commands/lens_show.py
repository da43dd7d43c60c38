"""Runs the lens on a text and draws the result. Separate from the command lens.py because it needs torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import DataError
from data_prep.progress import working
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from ..checkpoint import check_weights, checkpoint_of, read_manifest, step_of
from ..data import IGNORED
from ..generation import load_model
from ..interop.folder import HFModel
from ..interop.initial import tokenizer_of
from ..interop.weights import load_model as load_hf_model
from ..lens.command import LensConfig
from ..lens.examples import EXAMPLES
from ..lens.lens import FINAL, FROM_INPUT, FROM_OUTPUT, LensResult, run_lens
from ..lens.plot import MOST_COLUMNS, write_pictures
from ..lens.views import Facts, LensTable, layer_name, lens_table, visible
from ..mesh import ranks_or_alone
from ..models.language_model import LanguageModel

MOST_PROMPT = 4000  # letters of the prompt in the summary


@dataclass(frozen=True)
class Source:
    """The model that the lens reads, and its tokenizer."""

    name: str  # of the run, or of the Hugging Face model's folder
    step: int | None  # None for a Hugging Face model
    folder: Path  # of the checkpoint
    model: LanguageModel
    body: nn.Module
    context: int  # the most positions that the model takes
    encode: Callable[[str], list[int]]  # a text's ids, the document's beginning included
    text_of: Callable[[int], str]  # an id's text

    @property
    def size(self) -> str:
        vocab = self.model.vocab
        rows = vocab.shard.vocab_size
        matrices = (1 if vocab.head_weight is None else 2) * rows * vocab.weight.shape[1]
        count = matrices + sum(parameter.numel() for parameter in self.body.parameters())
        return f"{count / 1e6:,.1f}M parameters, vocabulary of {rows:,}"


def show(settings: LensConfig) -> None:
    """Writes the pictures and the page, and prints a summary, on the first rank."""
    with ranks_or_alone() as device:
        with working("read the model and measure"):
            shown, found = see(settings, device)
        if not dist.is_initialized() or dist.get_rank() == 0:
            paths = write_pictures(shown, Path(settings.out))
            print(summary(found))
            print(f"written: {paths[-1]} and {len(paths) - 1} pictures beside it")


def see(settings: LensConfig, device: torch.device) -> tuple[LensTable, LensResult]:
    """Runs the lens. All ranks of the process group must call it; all get the same result."""
    source = open_source(settings, device)
    example = EXAMPLES.get(settings.example)
    text = example.text if example else _text(settings)
    ids = source.encode(text)
    window = _window(settings.window, len(ids))
    if window.stop > source.context:
        raise ValueError(
            f"the text has {window.stop:,} tokens up to the end of the window, but model.context={source.context}:"
            f" give a shorter text, or window=START:STOP with STOP of at most {source.context}"
        )
    only = settings.only or (example.only if example else "")
    columns = [n for n, id in enumerate(ids[window]) if not only or source.text_of(id).strip("·") == only]
    if not columns:
        raise ValueError(f"only={only} must be the text of a token in the window; no token has it")
    if len(columns) > MOST_COLUMNS:
        raise ValueError(
            f"window={window.start}:{window.stop} must show at most {MOST_COLUMNS:,} positions, not {len(columns):,};"
            " give a shorter window"
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
    title, facts = _summary(settings, source, text, found, columns)
    return lens_table(found, title, facts, columns, window.start, source.text_of), found


def _summary(
    settings: LensConfig, source: Source, text: str, found: LensResult, columns: list[int]
) -> tuple[str, Facts]:
    """One line, and the same with the prompt and the results as names and texts."""
    method = f"norm {settings.norm}" + ("" if settings.decoder == "none" else f", through the last {settings.decoder}")
    step = [] if source.step is None else [f"step {source.step:,}"]
    known = [n for n in columns if found.targets[n] >= 0]
    right, loss = int(found.right[known].sum()), found.losses[-1][known].mean().item() if known else math.nan
    facts = [
        ("prompt", text if len(text) <= MOST_PROMPT else text[:MOST_PROMPT] + " …"),
        ("model", f"{source.name}, {source.size}"),
        *([] if source.step is None else [("step", f"{source.step:,}")]),
        ("checkpoint", str(source.folder)),
        ("method", method),
        ("shown", f"{len(columns):,} positions, {len(found.rows)} layers"),
        ("next token guessed right", f"{right:,} of {len(known):,}"),
        ("mean loss", f"{loss:.3f} nats"),
    ]
    return ", ".join([source.name, source.size, *step, method]), facts


def open_source(settings: LensConfig, device: torch.device) -> Source:
    """Opens a run's checkpoint or a Hugging Face model. Only this function knows the difference."""
    if settings.hf:
        found = HFModel(Path(settings.hf))
        spec, special, why = tokenizer_of(found)
        if spec is None:
            raise ValueError(f"hf={settings.hf}: the text cannot be encoded: {why}")
        model, context = load_hf_model(found, device), found.model.context
        return _source(found.folder.name, None, found.folder, (model, context), Tokenizer(spec), special)
    run = Path(settings.run)
    folder = checkpoint_of(run, settings.step)
    tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
    check_weights(folder, read_manifest(folder), settings.weights)
    loaded = load_model(folder, device, settings.weights)
    return _source(run.name, step_of(folder), folder, loaded, tokenizer, SpecialTokens.of_run(run))


def _source(
    name: str,
    step: int | None,
    folder: Path,
    loaded: tuple[LanguageModel, int],
    tokenizer: Tokenizer,
    special: SpecialTokens,
) -> Source:
    model, context = loaded
    assert isinstance(model.body, nn.Module)

    def encode(text: str) -> list[int]:
        return [special.begin(tokenizer.spec), *tokenizer.encode(text).tolist()]

    def text_of(id: int) -> str:
        try:
            return visible(tokenizer.decode_bytes([id]))
        except DataError:  # a row beyond the tokenizer's: vocab.size may be larger
            return f"#{id}"

    return Source(name, step, folder, model, model.body, context, encode, text_of)


def _text(settings: LensConfig) -> str:
    """Returns the prompt. Raises ValueError if it is not UTF-8."""
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
        raise ValueError(f"window={given} must be START:STOP within the text's {length} positions")
    return slice(int(start), int(stop))


def summary(found: LensResult) -> str:
    """A line per layer, of means over the window."""
    reading = found.reading
    lines = [f"{'layer':<20} {'KL(output‖layer)':>17} {'KL(input‖layer)':>16} {'entropy':>8} {'as output':>10}"]
    for r, name in enumerate(found.rows):
        kl = reading.kl_from[r].mean(0).tolist()
        same = (reading.ranks[r, :, FINAL] == 1).double().mean().item()
        entropy = reading.entropy[r].mean().item()
        lines.append(
            f"{layer_name(name):<20} {kl[FROM_OUTPUT]:>17.3f} {kl[FROM_INPUT]:>16.3f} {entropy:>8.3f} {same:>10.1%}"
        )
    return "\n".join(lines)
