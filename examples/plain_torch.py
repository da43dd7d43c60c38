"""Trains a Transformer in plain torch: its matrix is split over all ranks, DDP replicates its body.

torchrun --nproc-per-node 2 examples/plain_torch.py model.pt
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from pretrain.vocab import VocabParallelEmbedding, clip_grad_norm_, summed

VOCAB, WIDTH, BATCH, LENGTH, STEPS = 1000, 64, 8, 32, 20

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=0)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
body = summed(nn.parallel.DistributedDataParallel(layer))
optimizer = torch.optim.AdamW([*vocab.parameters(), *layer.parameters()], lr=3e-3)
mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
tokens = torch.randint(40, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cumsum(2) % VOCAB
for step in range(STEPS):
    mine = tokens[step].chunk(world)[rank]
    hidden = body(vocab(mine[:, :-1]), src_mask=mask, is_causal=True)
    loss = vocab.loss(hidden, mine[:, 1:], scale=1 / (BATCH * LENGTH)).loss
    loss.backward()
    clip_grad_norm_(vocab, layer.parameters(), max_norm=0.25)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach_())  # each rank has the part of its own targets
    if rank == 0:
        print(f"step {step} loss {float(loss)}", flush=True)
whole = {**vocab.full_state_dict(), **layer.state_dict()}
if rank == 0:
    torch.save(whole, sys.argv[1])
dist.destroy_process_group()
