"""Hugging Face's Trainer with dcompile: one line more.

    torchrun --nproc-per-node 2 examples/third_party/hf_trainer.py

Trainer wraps the model in DistributedDataParallel by itself; the compiled forward and backward run inside.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS, BATCH, CONTEXT, VOCAB = 6, 8, 16, 32


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from a random token, modulo the vocabulary."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = (torch.randint(VOCAB, (1,), generator=generator) + torch.arange(CONTEXT)) % VOCAB
        return {"input_ids": tokens, "labels": tokens}


def main(argv: list[str]) -> list[float]:
    """Trains; returns the loss of each step."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if "--eager" not in argv:
        model.compile(backend="dcompile")  # the line
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Counting())
        trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    main(sys.argv[1:])
