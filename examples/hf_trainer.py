"""Trains a small Llama with Hugging Face's Trainer: its matrix is split over all ranks, DDP replicates its layers.

torchrun --nproc-per-node 2 examples/hf_trainer.py model.pt
"""

import os
import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, Trainer, TrainerCallback, TrainingArguments

from pretrain.vocab import VocabParallelEmbedding, clip_grad_norm_, summed

VOCAB, WIDTH, BATCH, LENGTH, STEPS = 1000, 64, 8, 32, 20


class Model(nn.Module):
    accepts_loss_kwargs = True  # the Trainer counts the targets of a step over all ranks
    _ddp_params_and_buffers_to_ignore = ("vocab.weight",)  # each rank has other rows

    def __init__(self) -> None:
        super().__init__()
        self.vocab = VocabParallelEmbedding.create(VOCAB, WIDTH, seed=0)
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=1, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1)
        self.body = LlamaModel(config)
        self.body.set_input_embeddings(None)

    def forward(self, input_ids, labels, targets):
        body = summed(lambda hidden: self.body(inputs_embeds=hidden, use_cache=False).last_hidden_state)
        return self.vocab.loss(body(self.vocab(input_ids)), labels, scale=1 / int(targets)).loss


class SplitTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs, targets=num_items_in_batch)
        return loss + (self.args.world_size - 1) * loss.detach()  # the log averages over ranks; loss is one rank's part


class Clip(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        clip_grad_norm_(model.vocab, model.body.parameters(), max_norm=0.25)


arguments = TrainingArguments(
    sys.argv[1] + ".trainer",
    per_device_train_batch_size=BATCH // int(os.environ["WORLD_SIZE"]),
    max_steps=STEPS,
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,  # the Trainer would clip by one rank's norm: see Clip
    save_strategy="no",  # the Trainer would save one rank's rows and moments: see the end
    logging_steps=1,
    train_sampling_strategy="sequential",
    remove_unused_columns=False,
    disable_tqdm=True,
    report_to="none",
    use_cpu=True,
)
tokens = torch.randint(40, (STEPS * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cumsum(1) % VOCAB
data = [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]
model = Model()
trainer = SplitTrainer(model, arguments, train_dataset=data, callbacks=[Clip()])
trainer.train()
whole = {**model.vocab.full_state_dict(), **model.body.state_dict()}
if trainer.is_world_process_zero():
    for entry in trainer.state.log_history[:STEPS]:
        print(f"step {entry['step'] - 1} loss {entry['loss']}")
    torch.save(whole, sys.argv[1])
