"""Describes a training, in the lines that it begins with."""

from pathlib import Path

import torch

from .changes import Change, table
from .checkpoint.state import TrainState
from .config.job import JobConfig
from .data import Data, PackedWindows, Samples
from .mesh import Mesh
from .models.language_model import LanguageModel
from .placement import Parallel


def announce(
    config: JobConfig,
    data: Data,
    samples: Samples,
    model: LanguageModel,
    mesh: Mesh,
    parallel: Parallel,
    state: TrainState,
    resumed: Path | None,
    changes: list[Change],
) -> None:
    """Prints the first lines of a run. changes: settings changed since the checkpoint that is resumed."""
    vocab = model.vocab
    axes = " × ".join(f"{size} {axis}" for axis, size in mesh.sizes.items())
    print(
        f"model: {parameters(config, *counts(config, vocab.shard.vocab_size), vocab.shard.vocab_size)}\n"
        f"ranks: {mesh.world} on {mesh.device.type} = {axes},"
        f" {vocab.shard.rows_per_rank:,} rows each; {config.engine.title}, {str(vocab.compute_dtype)[6:]}\n"
        + (f"{parallel.why}\n" if parallel.why else "")
        + "".join(f"data: {line}\n" for line in _data_lines(data, samples, state))
        + "".join(f"validation: {line}\n" for line in not_validated(config, data))
        + f"length: {length(config)}\n"
        + _beginning(config, state, resumed)
        + (f"\nsettings changed since step {state.step}:" if changes else "")
        + "".join(f"\n  {line}" for line in (table(changes) if changes else [])),
        flush=True,
    )


def length(config: JobConfig) -> str:
    """Formats the length of the run in steps and tokens, its batch sizes, and the phases of its schedule."""
    steps, batches, optim = config.train.steps, config.train.batches, config.optim
    (_, first), *later = batches.sizes
    sizes = [f"{first:,}", *(f"{size:,} from step {batches.steps_for(begin) + 1:,} on" for begin, size in later)]
    decay = f", decay over the last {optim.decay(steps):,}" if optim.schedule == "wsd" else ""
    return (
        f"{steps:,} steps = {batches.samples_after(steps) * config.seq_len:,} tokens, in batches of {', '.join(sizes)}"
        f" × {config.seq_len:,}; {optim.schedule}: warm-up {optim.warmup(steps):,} steps{decay}"
    )


def _beginning(config: JobConfig, state: TrainState, resumed: Path | None) -> str:
    """Says where the weights come from. resumed: a checkpoint of this run, or the one that it decays from."""
    if resumed is None:
        return f"new run: {config.run.dir}" + (f", with the weights of {config.init_from}" if config.init_from else "")
    if config.decay_from is not None and resumed == Path(config.decay_from):
        return f"new run: {config.run.dir}, decays from {resumed}, step {state.step}"
    return f"resumed: {resumed}, step {state.step}"


def counts(config: JobConfig, rows: int) -> tuple[int, int]:
    """Counts the parameters of the body, and of one matrix with that many rows. Allocates nothing."""
    with torch.device("meta"):
        body = sum(p.numel() for p in config.model.body().parameters())  # an engine may hide the shapes
    return body, rows * config.model.width


def parameters(config: JobConfig, body: int, matrix: int, rows: int) -> str:
    """Formats the parameter counts, tied and untied."""
    tied = f"{(body + matrix) / 1e6:.1f}M parameters, {matrix / 1e6:.1f}M of them in 1 matrix of {rows:,} rows"
    untied = f"{(body + 2 * matrix) / 1e6:.1f}M parameters, {2 * matrix / 1e6:.1f}M of them in 2 matrices"
    if config.vocab.tie == "untied":
        return f"{untied} of {rows:,} rows (untied; tied: {(body + matrix) / 1e6:.1f}M, {matrix / 1e6:.1f}M in 1)"
    if config.vocab.untie_at is not None:
        return f"{tied} (tied) up to step {config.vocab.untie_at:,}, then {untied}"
    return f"{tied} (tied; untied: {(body + 2 * matrix) / 1e6:.1f}M, {2 * matrix / 1e6:.1f}M in 2)"


def not_validated(config: JobConfig, data: Data) -> list[str]:
    """Returns one line if evaluation is on and a corpus has no validation split."""
    without = [title for title, corpus in data.corpora.items() if sum(file.size for file in corpus.val) < 2]
    if not config.eval.every or not without:
        return []
    if len(without) == len(data.corpora):
        return [f"the data has no validation split, so eval.every={config.eval.every} has no effect"]
    return [f"no validation split in {', '.join(without)}: eval.every={config.eval.every} evaluates the other corpora"]


def _data_lines(data: Data, samples: Samples, state: TrainState) -> list[str]:
    """Formats the position in each corpus; with several corpora also their shares from here on."""
    known = sum(state.samples.values())
    shares = data.blend.shares(known)
    lines = []
    for (title, corpus), share in zip(data.corpora.items(), shares, strict=True):
        sample = state.samples.get(corpus.name, 0)
        new = " (new corpus: starts at sample 0)" if known and not sample else ""
        part = f"{100 * share:.3g}% of the samples, " if len(shares) > 1 else ""
        lines.append(f"{title}, {corpus.tokens:,} tokens, {part}from sample {sample:,}{new}")
        windows = samples.sources[title][0]
        if isinstance(windows, PackedWindows):
            lines[-1] += f"; {windows.summary}"
    return lines
