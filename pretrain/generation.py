"""Continues prompts with a trained model. Not part of generate.py, the command, because it needs torch."""

import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data_prep.errors import DataError
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from .checkpoint import check_files, check_weights, checkpoint_of, read_manifest
from .checkpoint.manager import read_tensors
from .checkpoint.reading import model_for_reading
from .compose import build_config
from .config.ema import WEIGHTS
from .config.generation import GenerateConfig, read_prompts
from .config.job import JobConfig
from .decoding import Batch
from .mesh import ranks_or_alone
from .models.language_model import LanguageModel


def print_text(settings: GenerateConfig) -> None:
    """Prints prompt and continuation, token by token, on the first rank; with `prompts` a JSON line per prompt.

    If texts end at the model's context, a line on stderr says so.
    """
    with ranks_or_alone() as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        source = _Source(settings, device)
        for text in source.lines() if settings.prompts else source.pieces():
            if first:
                print(text, end="", flush=True)
        if first and source.full:
            texts = f"{source.full} of {len(source.prompts)} texts end" if settings.prompts else "the text ends"
            print(f"{texts} at model.context={source.context} tokens", file=sys.stderr)


def generate(settings: GenerateConfig, device: torch.device) -> Iterator[str]:
    """Yields the prompt, then the text of each token. Collective: all ranks of the process group call it."""
    return _Source(settings, device).pieces()


class _Source:
    """Model, tokenizer and prompts. Raises ValueError if a prompt is too long, before the model is loaded."""

    def __init__(self, settings: GenerateConfig, device: torch.device) -> None:
        run, folder = Path(settings.run), checkpoint_of(Path(settings.run), settings.step)
        check_weights(folder, read_manifest(folder), settings.weights)
        self.settings = settings
        self.tokenizer, self.special = Tokenizer.load(run / TOKENIZER_FOLDER), SpecialTokens.of_run(run)
        self.context = config_of(folder).model.context
        self.prompts = read_prompts(Path(settings.prompts)) if settings.prompts else [settings.prompt]
        begin = self.special.begin(self.tokenizer.spec)
        self.ids = [[begin, *self.tokenizer.encode(prompt).tolist()] for prompt in self.prompts]
        for number, ids in enumerate(self.ids, 1):
            if len(ids) > self.context:
                which = f"prompt {number} of prompts={settings.prompts}" if settings.prompts else "prompt"
                raise ValueError(
                    f"{which} must have at most model.context={self.context} tokens, and has {len(ids)} with the"
                    " one that begins a text; shorten it"
                )
        self.model, _ = load_model(folder, device, settings.weights)
        self.full = 0  # texts that the context has ended

    def pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield self.settings.prompt
        for _, drawn in self.drawn(self.ids):
            yield self.text_of(drawn, decoder)
        yield decoder.decode(b"", final=True) + "\n"

    def lines(self) -> Iterator[str]:
        """Yields a JSON line per prompt, in the order of the file: `prompt` and `text`, the continuation."""
        for start in range(0, len(self.prompts), self.settings.batch):
            prompts = self.prompts[start : start + self.settings.batch]
            decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
            texts = [""] * len(prompts)
            for index, drawn in self.drawn(self.ids[start : start + len(prompts)]):
                texts[index] += self.text_of(drawn, decoders[index])
            for prompt, text, decoder in zip(prompts, texts, decoders, strict=True):
                whole = text + decoder.decode(b"", final=True)
                yield json.dumps({"prompt": prompt, "text": whole}, ensure_ascii=False) + "\n"

    def drawn(self, prompts: list[list[int]]) -> Iterator[tuple[int, int]]:
        """Yields each drawn id with the index of its prompt, without the ids that end a text."""
        stops, tokens = self.special.stops(self.tokenizer.spec), self.settings.tokens
        batch = Batch(self.model, prompts, context=self.context, tokens=tokens, sampling=self.settings)
        while batch.live:
            pairs = batch.step()
            yield from (pair for pair in pairs if pair[1] not in stops)
            ended = {index for index, drawn in pairs if drawn in stops}
            self.full += sum(batch.is_full(index) for index, _ in pairs if index not in ended and batch.draw < tokens)
            batch.end(ended)

    def text_of(self, drawn: int, decoder: codecs.IncrementalDecoder) -> str:
        try:
            return decoder.decode(self.tokenizer.decode_bytes([drawn]))
        except DataError:  # an id beyond the tokenizer's: vocab.size may be larger
            return "\ufffd"


def config_of(folder: Path) -> JobConfig:
    """Returns the settings that a checkpoint was trained with."""
    return build_config(OmegaConf.create(read_manifest(folder)["config"]))


def load_model(folder: Path, device: torch.device, weights: str = "last") -> tuple[LanguageModel, int]:
    """Loads the model in fp32, the matrix split over the ranks. Returns it and its context length.

    weights: a key of WEIGHTS; call `check_weights` first.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    config = config_of(folder)
    with torch.device("meta"):
        body = config.model.body()
    rows, width, saved = manifest["vocab_size"], config.model.width, manifest["tensors"]
    model, tensors = model_for_reading(body, config.vocab, rows, width, device, saved=saved)
    tensors = {WEIGHTS[weights] + name: tensor for name, tensor in tensors.items()}
    read_tensors(folder, tensors, alone=model.vocab.group is None)
    return model, config.model.context
