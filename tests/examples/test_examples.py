"""Tests each example on two ranks, started as its docstring says, against the same training in one float64 process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.vocab import VocabParallelEmbedding
from tests.warm import torchrun

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
VOCAB, WIDTH, BATCH, LENGTH, STEPS = 1000, 64, 8, 32, 20


def run_example(name: str, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, and the weights that the example saves."""
    words = [EXAMPLES / name, folder / "model.pt"]
    done = torchrun(2, *words, cwd=folder) if name != "plain_torch.py" else _by_torchrun_itself(words, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", done.stdout)]
    return losses, torch.load(folder / "model.pt")


def _by_torchrun_itself(words: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def dense(body: nn.Module, run, weight_decay: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and final weights of one process with the whole matrix and torch's clip."""
    initial = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=0).full_state_dict()["embedding.weight"]
    matrix = initial.double().requires_grad_()
    weights = [matrix, *body.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(40, (STEPS, BATCH, LENGTH + 1), generator=generator).cumsum(2) % VOCAB
    losses = []
    for batch in tokens:
        hidden = run(F.embedding(batch[:, :-1], matrix))
        loss = F.cross_entropy((hidden @ matrix.T).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        assert nn.utils.clip_grad_norm_(weights, 0.25) > 0.25, "the clip does nothing"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {"embedding.weight": matrix.detach(), **body.state_dict()}


def dense_transformer():
    torch.manual_seed(0)
    body = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True).double()
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH).double()
    return dense(body, lambda hidden: body(hidden, src_mask=mask, is_causal=True), weight_decay=0.01)


def dense_llama():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    body = LlamaModel(LlamaConfig(vocab_size=1, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1))
    body.set_input_embeddings(None)
    body.double()
    return dense(body, lambda hidden: body(inputs_embeds=hidden, use_cache=False).last_hidden_state, weight_decay=0.0)


@pytest.mark.parametrize(
    "name,truth,digits",
    [
        ("plain_torch.py", dense_transformer, 1e-5),
        ("lightning_trainer.py", dense_transformer, 1e-5),
        ("hf_trainer.py", dense_llama, 1e-4),  # the Trainer's log rounds
    ],
)
def test_two_ranks_match_one_process(name, truth, digits, tmp_path):
    losses, weights = run_example(name, tmp_path)
    dense_losses, dense_weights = truth()
    assert losses == pytest.approx(dense_losses, abs=digits)
    assert weights.keys() == dense_weights.keys()
    for key, expected in dense_weights.items():
        difference = (weights[key].double() - expected).norm() / expected.norm()
        assert difference < 1e-4, f"{key}: {difference}"
