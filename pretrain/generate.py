"""Continue a prompt with a trained model: `python -m pretrain.generate run=runs/a prompt='def '`.

Alone, one process holds the whole matrix. Under torchrun its rows are split over the ranks and the ids are drawn
on the shards; the text is the same.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data_prep import terminal
from data_prep.command import arguments_or, one_line
from data_prep.errors import DataError
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from .arguments import defaults, settings_of
from .checkpoint import CheckpointError, check_files, checkpoint_of, model_for_reading, read_manifest, read_tensors
from .compose import build_config
from .mesh import ranks_or_alone
from .models.language_model import LanguageModel
from .rendezvous import NotMet
from .vocab.sampling import check_sampling, sample

HELP = """Continue a prompt with a trained model.

  python -m pretrain.generate run=runs/a prompt='def ' tokens=200 temperature=0.8 top_k=50 top_p=0.95 seed=1
  torchrun --nproc-per-node 2 -m pretrain.generate run=runs/a prompt='def '      the matrix split over two ranks

Settings, and their defaults:
"""


@dataclass
class GenerateConfig:
    """run: its folder; step: of the checkpoint, the newest if null. tokens: at most so many.

    temperature: 0 takes the likeliest token. top_k, top_p: draw from the k likeliest rows, and from the likeliest
    that together have probability p. seed: the same seed gives the same text.
    """

    run: str = ""
    prompt: str = ""
    step: int | None = None
    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is missing: name the folder of a run, such as run=runs/a")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2^63)")
        check_sampling(self.temperature, self.top_k, self.top_p)


def main() -> None:
    """Prints the prompt and its continuation as it comes. Exits 2 with one line on a wrong setting."""
    with one_line(CheckpointError, NotMet):
        arguments = arguments_or(HELP + defaults(GenerateConfig))
        settings = settings_of(GenerateConfig, arguments)
        terminal.product()
        with ranks_or_alone() as device:
            for text in generate(settings, device):
                if not dist.is_initialized() or dist.get_rank() == 0:
                    print(text, end="", flush=True)


def generate(settings: GenerateConfig, device: torch.device) -> Iterator[str]:
    """Yields the prompt, then the text of one token after the other. All ranks of the process group take part."""
    run = Path(settings.run)
    folder = checkpoint_of(run, settings.step)
    tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
    special = SpecialTokens.of_run(run)
    stops = special.stops(tokenizer.spec)
    model, context = load_model(folder, device)
    ids = [special.begin(tokenizer.spec), *tokenizer.encode(settings.prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield settings.prompt
    for draw in range(settings.tokens):
        with torch.no_grad():
            hidden_BTD = model.body(model.vocab.lookup(torch.tensor([ids[-context:]], device=device)))
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
        except DataError:  # a row beyond the tokenizer's: vocab.size may be larger
            yield "\ufffd"
    yield decoder.decode(b"", final=True) + "\n"


def load_model(folder: Path, device: torch.device) -> tuple[LanguageModel, int]:
    """The model in fp32, and the most positions it can see; the matrix split over the ranks, if there are any."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    config = build_config(OmegaConf.create(manifest["config"]))
    with torch.device("meta"):
        body = config.model.body()
    rows, width, saved = manifest["vocab_size"], config.model.width, manifest["tensors"]
    model, tensors = model_for_reading(body, config.vocab, rows, width, device, saved=saved)
    read_tensors(folder, tensors, alone=model.vocab.group is None)
    return model, config.model.context


if __name__ == "__main__":
    main()
