"""Trains a Transformer with Lightning: its matrix is split over all ranks, DDP replicates its body.

torchrun --nproc-per-node 2 examples/lightning_trainer.py model.pt
"""

import os
import sys

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from pretrain.vocab import VocabParallelEmbedding, clip_grad_norm_, summed

VOCAB, WIDTH, BATCH, LENGTH, STEPS = 1000, 64, 8, 32, 20


class Model(lightning.LightningModule):
    _ddp_params_and_buffers_to_ignore = ("vocab.weight",)  # each rank has other rows

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)

    def configure_model(self) -> None:  # the process group exists from here on
        self.vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def training_step(self, tokens, index):
        hidden = summed(self.body)(self.vocab(tokens[:, :-1]), src_mask=self.mask, is_causal=True)
        loss = self.vocab.loss(hidden, tokens[:, 1:]).loss / (
            BATCH * LENGTH
        )  # no scale= needed: gradients are zeroed each step
        whole = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum")  # each rank has a part of it
        self.print(f"step {index} loss {float(whole)}")
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm_(self.vocab, self.body.parameters(), gradient_clip_val)


rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
tokens = torch.randint(40, (STEPS * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cumsum(1) % VOCAB
model = Model()
trainer = lightning.Trainer(
    accelerator="cpu",
    strategy="ddp",
    devices=world,
    max_epochs=1,
    use_distributed_sampler=False,  # Lightning's sampler would shuffle
    gradient_clip_val=0.25,
    logger=False,
    enable_checkpointing=False,  # Lightning would save one rank's rows and moments: see the end
)
sampler = DistributedSampler(tokens, world, rank, shuffle=False)
trainer.fit(model, DataLoader(tokens, BATCH // world, sampler=sampler))
whole = {**model.vocab.full_state_dict(), **model.body.state_dict()}
if trainer.is_global_zero:
    torch.save(whole, sys.argv[1])
