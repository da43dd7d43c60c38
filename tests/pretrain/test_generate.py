"""Generated text does not depend on the number of ranks. Tied models are tested with the launcher."""

from pathlib import Path

import torch

from pretrain.compose import freeze
from pretrain.config.generation import GenerateConfig
from pretrain.data import open_data
from pretrain.generate import main
from pretrain.generation import generate
from tests.in_process import in_process
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import tiny_config, train_rank
from tests.ranks import run_ranks


def text_of(rank: int, world: int, run: Path) -> str:
    settings = GenerateConfig(run=str(run), tokens=25, seed=3, top_k=50, top_p=0.9, prompt="the")
    return "".join(generate(settings, torch.device("cpu")))


def test_untied_model_gives_same_text_on_two_ranks(tmp_path):
    data = make_corpus(tmp_path / "data")
    config = tiny_config(data, tmp_path / "run", vocab__size=None, vocab__tie="untied", train__steps=3)
    freeze(config, open_data(config.data))
    run_ranks(2, train_rank, config)
    alone = in_process(main, f"run={config.run_dir}", "tokens=25", "seed=3", "top_k=50", "top_p=0.9", "prompt=the")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("the") and len(alone.stdout) > 10
    assert run_ranks(2, text_of, config.run_dir) == [alone.stdout] * 2
