"""The oracle: transformers' MptForCausalLM with PhoGPT's biases added.

transformers builds MPT without biases and only mentions a checkpoint's biases as UNEXPECTED. With
them its logits are those of VinAI's own code. It ignores expansion_ratio (always 4) and
alibi_bias_max (always 8); test_phogpt.py has a slow reference for those two.
"""

import copy
import logging

import torch
from checkpoints import random_tensors, vinai_config
from torch import nn
from transformers import MptConfig, MptForCausalLM

from phogpt_raw.model.phogpt import ModelConfig, PhoGPT

torch.set_num_threads(1)  # with models this small a second thread only waits
logging.getLogger("transformers").setLevel(logging.ERROR)


class MptWithBiases(MptForCausalLM):
    """MptForCausalLM whose linears (but the head) and norms have biases unless config.no_bias."""

    def __init__(self, config):
        super().__init__(config)
        for name, module in self.named_modules():
            if config.no_bias or name == "lm_head":
                continue
            if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is None:
                zeros = module.weight.new_zeros(module.weight.shape[0])
                module.bias = nn.Parameter(zeros)


def oracle(config: dict, tensors: dict, dtype=torch.float32) -> MptWithBiases:
    """The oracle of VinAI's `config` holding `tensors`, every key of both accounted for."""
    config = copy.deepcopy(config)
    assert config["attn_config"]["attn_pdrop"] == 0
    config["attn_config"]["attn_pdrop"] = 0  # VinAI's 0.0 is refused: the field is an int
    config["use_cache"] = True
    model = MptWithBiases(MptConfig.from_dict(config))
    keys = model.load_state_dict(tensors, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == ["lm_head.weight"]  # tied
    assert model.lm_head.weight is model.transformer.wte.weight
    names = {name for name, _ in model.named_parameters()}
    assert names == set(tensors)
    return model.to(dtype).eval()


def ours(config: dict, tensors: dict, dtype=torch.float32) -> PhoGPT:
    """PhoGPT of `config` holding `tensors`, strictly."""
    model = PhoGPT(ModelConfig.from_json(config))
    model.load_state_dict(tensors)
    return model.to(dtype).eval()


def small_config(heads=8, width=8, layers=2, **fields) -> dict:
    """VinAI's config.json, small enough for a test: 256 tokens, rows of up to 64."""
    shape = dict(d_model=heads * width, n_heads=heads, n_layers=layers, vocab_size=256,
                 max_seq_len=64)
    return vinai_config(**shape, **fields)


def lively_tensors(config: dict, seed=0, dtype=torch.float32) -> dict:
    """Random tensors with linear weights of deviation 0.1, so that attention prefers some keys.

    With the 0.02 of an initialised model all scores are near zero, so a mistake in them would not
    be noticed.
    """
    tensors = random_tensors(config, seed, torch.float32)
    return {name: (t * (5 if t.dim() == 2 and "wte" not in name else 1)).to(dtype)
            for name, t in tensors.items()}


def twins(config: dict, seed=0) -> tuple[PhoGPT, MptWithBiases]:
    """Ours and the oracle with the same random tensors, in fp32."""
    tensors = lively_tensors(config, seed)
    return ours(config, tensors), oracle(config, tensors)


def random_ids(config: dict, rows: int, length: int, seed=1) -> torch.Tensor:
    """Token ids [B, L] without the four special ones."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(4, config["vocab_size"], (rows, length), generator=dice)
