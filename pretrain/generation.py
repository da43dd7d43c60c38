"""Continues a prompt with a trained model. Not part of generate.py, the command, because it needs torch."""

import codecs
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
from .config.generation import GenerateConfig
from .mesh import ranks_or_alone
from .models.language_model import LanguageModel
from .vocab.sampling import sample


def print_text(settings: GenerateConfig) -> None:
    """Prints prompt and continuation, token by token, on the first rank."""
    with ranks_or_alone() as device:
        for text in generate(settings, device):
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(text, end="", flush=True)


def generate(settings: GenerateConfig, device: torch.device) -> Iterator[str]:
    """Yields the prompt, then the text of each token. Collective: all ranks of the process group call it."""
    run = Path(settings.run)
    folder = checkpoint_of(run, settings.step)
    check_weights(folder, read_manifest(folder), settings.weights)
    tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
    special = SpecialTokens.of_run(run)
    stops = special.stops(tokenizer.spec)
    model, context = load_model(folder, device, settings.weights)
    ids = [special.begin(tokenizer.spec), *tokenizer.encode(settings.prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield settings.prompt
    for draw in range(settings.tokens):
        seen = torch.tensor([ids[-context:]], device=device)
        with torch.no_grad():
            hidden_BTD = model.body(model.vocab.lookup(seen, max_tokens_per_rank=seen.numel()))
            (drawn,) = sample(
                hidden_BTD[:, -1],
                model.vocab.output_weight,
                shard=model.vocab.shard,
                group=model.vocab.group,
                seed=settings.seed,
                draw=draw,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                softcap=model.vocab.config.softcap,
            ).tolist()
        if drawn in stops:
            break
        ids.append(drawn)
        try:
            yield decoder.decode(tokenizer.decode_bytes([drawn]))
        except DataError:  # an id beyond the tokenizer's: vocab.size may be larger
            yield "\ufffd"
    yield decoder.decode(b"", final=True) + "\n"


def load_model(folder: Path, device: torch.device, weights: str = "last") -> tuple[LanguageModel, int]:
    """Loads the model in fp32, the matrix split over the ranks. Returns it and its context length.

    weights: a key of WEIGHTS; call `check_weights` first.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    config = build_config(OmegaConf.create(manifest["config"]))
    with torch.device("meta"):
        body = config.model.body()
    rows, width, saved = manifest["vocab_size"], config.model.width, manifest["tensors"]
    model, tensors = model_for_reading(body, config.vocab, rows, width, device, saved=saved)
    tensors = {WEIGHTS[weights] + name: tensor for name, tensor in tensors.items()}
    read_tensors(folder, tensors, alone=model.vocab.group is None)
    return model, config.model.context
