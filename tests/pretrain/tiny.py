"""A tiny run: token files, configuration, and the function of one rank."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import HuggingFaceStorageReader

from data_prep.token_file import TokenFileWriter
from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.manager import read_tensors
from pretrain.compose import build_config
from pretrain.config.job import JobConfig
from pretrain.stops import StopRequests
from pretrain.train import train

VOCAB = 307  # not divisible by any number of ranks; its 312 padded rows not by all


def write_tokens(prefix: Path, vocab_size: int = VOCAB, documents: int = 40, seed: int = 0) -> Path:
    """Writes PREFIX.bin and PREFIX.idx with learnable documents: noisy arithmetic sequences."""
    random = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TokenFileWriter(prefix, vocab_size) as file:
        for _ in range(documents):
            ids = (
                random.integers(vocab_size) + random.integers(1, 4) * np.arange(random.integers(20, 90))
            ) % vocab_size
            file.add(np.append(ids, vocab_size - 1))
    return prefix


def tiny_config(data: Path, run: Path, **changes: object) -> JobConfig:
    """Configuration of two blocks of width 24 in fp32. changes: keys with __ for the dot, such as train__steps=40."""
    steps = changes.get("train__steps", 20)
    settings: dict = {
        "seed": 7,
        "model": {"family": "gpt2", "layers": 2, "width": 24, "heads": 3, "context": 16},
        "vocab": {"size": VOCAB, "multiple": 8},
        "data": {"path": str(data)},
        "optim": {"lr": 1e-2, "warmup_steps": min(5, steps - 1) if isinstance(steps, int) else 5, "clip": 0.5},
        "engine": {"name": "fsdp2"},
        "train": {"steps": 20, "global_batch": 12, "micro_batch": 3, "precision": "fp32"},
        "eval": {},
        "checkpoint": {"every": 0, "keep": 0},
        "log": {"every": 1, "tensorboard": False},
        "run": {"dir": str(run)},
    }
    cfg = OmegaConf.create(settings)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return build_config(cfg)


def train_rank(rank: int, world: int, config: JobConfig) -> None:
    """Trains one rank, for `run_ranks`. Freezes the configuration, as a launcher does."""
    with StopRequests() as requests:
        train(config, torch.device("cpu"), requests)


def saved_tensors(run: Path, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint, by default the newest, by name: parameters and both moments."""
    folder = folder or checkpoints(run)[-1]
    dtypes = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    shapes = read_manifest(folder)["tensors"]
    tensors = {name: torch.empty(shape, dtype=dtypes[name].properties.dtype) for name, shape in shapes.items()}
    read_tensors(folder, tensors, alone=True)
    return tensors
