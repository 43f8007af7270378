"""The oracle, a reference model for tests: transformers' MptForCausalLM with PhoGPT's biases.

transformers builds MPT without biases. It drops the biases of a checkpoint and only lists them as
UNEXPECTED. With the biases added, the model's logits equal the logits of VinAI's own code.

transformers also ignores two fields of the config: expansion_ratio is always 4, and alibi_bias_max
is always 8. test_phogpt.py has a slow reference for these two fields.
"""

import copy
import logging

import torch
from checkpoints import random_tensors, vinai_config
from torch import nn
from transformers import MptConfig, MptForCausalLM

from phogpt_raw.model.phogpt import ModelConfig, PhoGPT

torch.set_num_threads(1)  # models of this size run no faster with a second thread
logging.getLogger("transformers").setLevel(logging.ERROR)


class MptWithBiases(MptForCausalLM):
    """MptForCausalLM with biases in every norm and in every linear layer except the head.

    If config.no_bias is true, no layer has a bias.
    """

    def __init__(self, config):
        super().__init__(config)
        for name, module in self.named_modules():
            if config.no_bias or name == "lm_head":
                continue
            if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is None:
                zeros = module.weight.new_zeros(module.weight.shape[0])
                module.bias = nn.Parameter(zeros)


def oracle(config: dict, tensors: dict, dtype=torch.float32) -> MptWithBiases:
    """The oracle for VinAI's `config` with the weights `tensors`.

    The names of the tensors must be exactly the names of the oracle's parameters.
    """
    config = copy.deepcopy(config)
    assert config["attn_config"]["attn_pdrop"] == 0
    config["attn_config"]["attn_pdrop"] = 0  # an int: transformers refuses VinAI's 0.0
    config["use_cache"] = True
    model = MptWithBiases(MptConfig.from_dict(config))
    keys = model.load_state_dict(tensors, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert model.lm_head.weight is model.transformer.wte.weight
    names = {name for name, _ in model.named_parameters()}
    assert names == set(tensors)
    return model.to(dtype).eval()


def ours(config: dict, tensors: dict, dtype=torch.float32) -> PhoGPT:
    """PhoGPT for `config` with the weights `tensors`, whose names must be exactly PhoGPT's."""
    model = PhoGPT(ModelConfig.from_json(config))
    model.load_state_dict(tensors)
    return model.to(dtype).eval()


def small_config(heads=8, width=8, layers=2, **fields) -> dict:
    """VinAI's config.json for a small model: a vocabulary of 256, rows of up to 64 tokens."""
    shape = dict(d_model=heads * width, n_heads=heads, n_layers=layers, vocab_size=256,
                 max_seq_len=64)
    return vinai_config(**shape, **fields)


def lively_tensors(config: dict, seed=0, dtype=torch.float32) -> dict:
    """Random tensors with larger linear weights, so that attention clearly prefers some keys.

    The linear weights have a standard deviation of 0.1. In a newly initialised model it is 0.02.
    With 0.02 all attention scores would be near zero, and a test would not notice a mistake in the
    scores.
    """
    tensors = random_tensors(config, seed, torch.float32)
    return {name: (t * (5 if t.dim() == 2 and "wte" not in name else 1)).to(dtype)
            for name, t in tensors.items()}


def twins(config: dict, seed=0) -> tuple[PhoGPT, MptWithBiases]:
    """Our model and the oracle with the same random tensors, in fp32."""
    tensors = lively_tensors(config, seed)
    return ours(config, tensors), oracle(config, tensors)


def random_ids(config: dict, rows: int, length: int, seed=1) -> torch.Tensor:
    """Random token ids [B, L] without the ids of the four special tokens."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(4, config["vocab_size"], (rows, length), generator=dice)
