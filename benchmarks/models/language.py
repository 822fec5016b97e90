"""Language models from ``transformers`` configurations: random weights, nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]

VOCABULARY, BENCH_VOCABULARY = 128, 8192


class Loss(nn.Module):
    """The loss of a ``transformers`` model as a function of tensors by position."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).loss
        return found


def _sizes(small: bool, **both: tuple[int, int]) -> dict[str, int]:
    return {name: test if small else bench for name, (test, bench) in both.items()}


def _tokens(small: bool, batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY if small else BENCH_VOCABULARY, (2, 12) if small else (batch, length))


def gpt2(small: bool, dropout: float) -> Built:
    sizes = _sizes(small, vocab_size=(VOCABULARY, BENCH_VOCABULARY), n_positions=(16, 128), n_embd=(32, 384))
    sizes |= _sizes(small, n_layer=(2, 4), n_head=(4, 6))
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    tokens = _tokens(small, batch=4, length=128)
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its configuration does not name it, and Dynamo breaks the graph at the warning
    return Loss(model, "input_ids", "labels"), (tokens, tokens.clone())


def _llama_sizes(small: bool) -> dict[str, Any]:
    sizes = _sizes(small, vocab_size=(VOCABULARY, BENCH_VOCABULARY), hidden_size=(32, 384), num_hidden_layers=(2, 4))
    sizes |= _sizes(small, intermediate_size=(64, 1024), num_attention_heads=(4, 6), num_key_value_heads=(2, 2))
    return {**sizes, "max_position_embeddings": 128, "use_cache": False}


def llama(small: bool, dropout: float) -> Built:
    config = transformers.LlamaConfig(**_llama_sizes(small))
    tokens = _tokens(small, batch=4, length=128)
    return Loss(transformers.LlamaForCausalLM(config), "input_ids", "labels"), (tokens, tokens.clone())


def mixtral(small: bool, dropout: float) -> Built:
    sizes = _llama_sizes(small) | _sizes(small, num_hidden_layers=(2, 2), intermediate_size=(48, 512))
    sizes["hidden_size"] = 32 if small else 256
    sizes["num_attention_heads"] = 4
    config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    tokens = _tokens(small, batch=4, length=128)
    return Loss(transformers.MixtralForCausalLM(config), "input_ids", "labels"), (tokens, tokens.clone())


def bert(small: bool, dropout: float) -> Built:
    sizes = _sizes(small, vocab_size=(VOCABULARY, BENCH_VOCABULARY), hidden_size=(32, 384), num_hidden_layers=(2, 4))
    sizes |= _sizes(small, num_attention_heads=(4, 6), intermediate_size=(64, 1536))
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(**sizes, **drops, max_position_embeddings=128)
    tokens = _tokens(small, batch=4, length=128)
    mask = torch.ones_like(tokens)
    mask[:, tokens.shape[1] - 3 :] = 0
    model = transformers.BertForMaskedLM(config)
    return Loss(model, "input_ids", "attention_mask", "labels"), (tokens, mask, tokens.clone())


def t5(small: bool, dropout: float) -> Built:
    sizes = _sizes(small, vocab_size=(VOCABULARY, BENCH_VOCABULARY), d_model=(32, 256), num_layers=(2, 3))
    sizes |= _sizes(small, d_kv=(8, 64), d_ff=(64, 1024), num_heads=(4, 4))
    config = transformers.T5Config(**sizes, dropout_rate=dropout, decoder_start_token_id=0, use_cache=False)
    source, target = _tokens(small, batch=4, length=128), _tokens(small, batch=4, length=64)
    return Loss(transformers.T5ForConditionalGeneration(config), "input_ids", "labels"), (source, target)
