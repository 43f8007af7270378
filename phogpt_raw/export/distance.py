"""Compare the predictions of a merged checkpoint with those of the adapter on its base.

The predictions differ, because the adapter was trained over weights that are rounded to 4 bits, but
is merged into the unrounded weights. The sum is then rounded to 16 bits. Here both models read the
same texts. Their blocks are computed one at a time, so host memory holds the weights of only one
block.

B texts, L length, T tokens, D hidden, H heads, V vocabulary.
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
ROWS = 2**15  # rows of the head's matrix that are multiplied at once


@dataclass(frozen=True)
class Distance:
    """The difference over `tokens` predictions.

    same: fraction of the predictions in which both models have the same most likely token.
    divergence: mean Kullback-Leibler divergence in nats. largest: largest difference of a logit.
    """

    tokens: int
    same: float
    divergence: float
    largest: float


@torch.no_grad()
def distance(merger: Merger, merged: dict[str, torch.Tensor], texts: list[list[int]],
             device: torch.device, nf4: bool = True, progress=lambda blocks: blocks) -> Distance:
    """Compare the adapter on its base with a checkpoint.

    merged: {name: tensor} of the checkpoint. texts: token ids of each text. nf4: quantise the
    base's linears to NF4; otherwise they are used as stored.
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
    """The tensor `name` with the adapter merged. A linear's weight is first rounded to NF4."""
    weight = merger.tensors[name]
    if not (name.endswith(".weight") and weight.dim() == 2 and ".blocks." in name):
        return merger.merged(name)
    rounded = nf4_linear(weight.to(device), torch.float32, device).weight
    return merger.merged(name, dequantise(rounded).cpu())


def final_states(config: ModelConfig, tensor_of, ids_BL: torch.Tensor, device,
                 progress=lambda blocks: blocks) -> torch.Tensor:
    """The hidden states [B, L, D] after the last norm, in fp32.

    tensor_of(name) returns the model's tensor of that name.
    """
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
    """The logits [T, V] of two models. Each model has its own head and hidden states.

    ROWS rows of a head's matrix are multiplied at a time.
    """
    parts = [[hidden_TD @ head_VD[start : start + ROWS].to(hidden_TD).T
              for start in range(0, len(head_VD), ROWS)]
             for hidden_TD, head_VD in zip(both_2TD, (one_VD, other_VD), strict=True)]
    one, other = (torch.cat(logits, dim=1) for logits in parts)
    return one, other
