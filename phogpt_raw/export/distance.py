"""The difference between a merged checkpoint's predictions and those of the adapter on its base.

The adapter was trained over weights rounded to 4 bits, and is merged into the weights before that
rounding; then the sum is rounded to 16 bits. Both models read the same text here, block by block,
so that host memory holds the weights of one block.

T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from phogpt_raw.export.merge import Merger
from phogpt_raw.model.attention import Bias, alibi_slopes
from phogpt_raw.model.nf4 import dequantise, nf4_linear
from phogpt_raw.model.phogpt import Block, ModelConfig

TOKENS = 32  # tokens of each text that are compared
ROWS = 2**15  # rows of the head that are multiplied at once


@dataclass(frozen=True)
class Distance:
    """Over `tokens` predictions: the share with the same most likely token, the mean
    Kullback-Leibler divergence in nats, and the largest difference of a logit."""

    tokens: int
    same: float
    divergence: float
    largest: float


@torch.no_grad()
def distance(merger: Merger, merged: dict[str, torch.Tensor], texts: list[list[int]],
             device: torch.device, nf4: bool = True, progress=lambda blocks: blocks) -> Distance:
    """The difference between the adapter on the base and the tensors `merged` of a checkpoint, on
    token ids.

    nf4: the base's linears in NF4, or as they are stored.
    """
    config, texts = merger.config, [text[:TOKENS] for text in texts]
    longest = max(map(len, texts))
    ids_BL = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    real_BL = torch.tensor([[n < len(text) for n in range(longest)] for text in texts])
    over_base = partial(over_nf4, merger, device) if nf4 else merger.merged
    on_base = final_states(config, over_base, ids_BL, device, progress)
    in_16 = final_states(config, lambda name: merged[name], ids_BL, device)
    both_2TD = torch.stack([on_base[real_BL], in_16[real_BL]])
    one_TV, other_TV = both_heads(merger.tensors["transformer.wte.weight"],
                                  merged["transformer.wte.weight"], both_2TD)
    divergence = F.kl_div(other_TV.log_softmax(1), one_TV.log_softmax(1), reduction="batchmean",
                          log_target=True)
    return Distance(len(one_TV), float((one_TV.argmax(1) == other_TV.argmax(1)).float().mean()),
                    float(divergence), float((one_TV - other_TV).abs().max()))


def over_nf4(merger: Merger, device: torch.device, name: str) -> torch.Tensor:
    """The tensor `name`, a linear's weight rounded to NF4 before the adapter is merged."""
    weight = merger.tensors[name]
    if not (name.endswith(".weight") and weight.dim() == 2 and ".blocks." in name):
        return merger.merged(name)
    rounded = nf4_linear(weight.to(device), torch.float32, device).weight
    return merger.merged(name, dequantise(rounded).cpu())


def final_states(config: ModelConfig, tensor_of, ids_BL: torch.Tensor, device,
                 progress=lambda blocks: blocks) -> torch.Tensor:
    """Hidden states [B, L, D] after the last norm in fp32; tensor_of(name): a weight."""
    def weights(path: str, module: nn.Module) -> dict[str, torch.Tensor]:
        return {name: tensor_of(f"{path}.{name}").to(device, torch.float32)
                for name, _ in module.named_parameters()}

    x_BLD = tensor_of("transformer.wte.weight")[ids_BL].to(device, torch.float32)
    with torch.device("meta"):
        block = Block(config).eval()
        norm = nn.LayerNorm(config.d_model, config.layer_norm_epsilon, bias=not config.no_bias)
    slopes_H = alibi_slopes(config.n_heads, config.alibi_bias_max).to(device)
    length = ids_BL.shape[1]
    seen = Bias(slopes_H, length, length, x_BLD.dtype, None)
    for n in progress(range(config.n_layers)):
        x_BLD = functional_call(block, weights(f"transformer.blocks.{n}", block), (x_BLD, seen))
    return functional_call(norm, weights("transformer.norm_f", norm), (x_BLD,))


def both_heads(one_VD, other_VD, both_2TD) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] of two hidden states through two heads, a part of the heads at a time."""
    parts = [[hidden_TD @ head_VD[start : start + ROWS].to(hidden_TD).T
              for start in range(0, len(head_VD), ROWS)]
             for hidden_TD, head_VD in zip(both_2TD, (one_VD, other_VD), strict=True)]
    one, other = (torch.cat(logits, dim=1) for logits in parts)
    return one, other
