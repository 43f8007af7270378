"""One token through all blocks on a CPU, from weights dequantised once for a whole answer.

No kernel there reads the 4 bits, so the model's own forward dequantises every weight for every
token, which is most of its time; the rest is Python's. Here each weight and its adapter are summed
once, W + scaling * B A in fp32, the same function to rounding, and `one_token` is the few
operations that a token needs. The 4 bits themselves stay as they are.

B rows, D hidden, H heads, K head width, S positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from phogpt_raw.decode.prefill import Block, blocks_of, read_prompt
from phogpt_raw.model.adapters import base_and_adapter
from phogpt_raw.model.attention import OneTokenBias
from phogpt_raw.model.cache import Cache, Piece
from phogpt_raw.model.lora import dense
from phogpt_raw.model.phogpt import PhoGPT

MOST = 2**30  # bytes of all copies; a larger model keeps its 4 bits


@dataclass(frozen=True)
class Copy:
    """W of a linear and its adapter, transposed, which is how a CPU multiplies a row fastest."""

    weight_DO: torch.Tensor
    bias_O: torch.Tensor

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias_O, x_ND, self.weight_DO)


class DenseStep:
    """`one_token` over copies of a model's weights."""

    def __init__(self, model: PhoGPT, cache: Cache, blocks: list[Block]):
        self.model, self.cache, self.blocks = model, cache, blocks
        self.head_DV = model.head.t().contiguous()

    def __call__(self, ids_B: torch.Tensor, positions: int) -> torch.Tensor:
        """Hidden states [B, D] after the last norm, of the next token of the first B rows, none of
        which holds `positions` tokens."""
        x_BD = self.model.transformer.wte(ids_B)
        place_B = self.cache.place_B[: len(ids_B)]
        bias = OneTokenBias(self.model.slopes_H, place_B, positions, x_BD.dtype).last_1HLS
        x_BD = one_token(x_BD, self.blocks, self.cache, place_B, bias,
                         self.model.config.softmax_scale)
        return self.model.transformer.norm_f(x_BD)

    def read(self, ids_BL: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Hidden states [B, L, D] after the last norm, of a piece of prompts."""
        return read_prompt(self.model, ids_BL, piece, self.blocks, lambda x, copy: copy(
            x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return hidden_BD @ self.head_DV


def one_token(x_BD, blocks: list[Block], cache: Cache, place_B, bias_BH1S,
              scale: float | None) -> torch.Tensor:
    """x [B, D] through the blocks; each row's keys and values go to its place in the cache."""
    rows, positions = len(x_BD), bias_BH1S.shape[3]
    row_B = torch.arange(rows)
    for block, kv in zip(blocks, cache.kv, strict=True):
        qkv_B3HK = block.Wqkv(block.norm_1(x_BD)).view(rows, 3, kv.shape[2], kv.shape[4])
        kv[:, row_B, :, place_B] = qkv_B3HK[:, 1:]
        k_BHSK, v_BHSK = kv[:, :rows, :, :positions]
        out_BH1K = F.scaled_dot_product_attention(
            qkv_B3HK[:, 0, :, None], k_BHSK, v_BHSK, attn_mask=bias_BH1S, scale=scale)
        x_BD = x_BD + block.out_proj(out_BH1K.flatten(1))
        x_BD = x_BD + block.down_proj(F.gelu(block.up_proj(block.norm_2(x_BD))))
    return x_BD


def dense_step(model: PhoGPT, cache: Cache) -> DenseStep | None:
    """A DenseStep where it can serve this model, as it is now: on a CPU in fp32 (in 16 bits the sum
    would round the adapter away), small, with adapters that are LoRA and nothing more."""
    config, head = model.config, model.head
    size = (config.linear_weights + head.numel()) * head.element_size()
    if (head.device.type != "cpu" or head.dtype != torch.float32 or size > MOST
            or config.clip_qkv is not None or config.no_bias):
        return None
    blocks = blocks_of(model, copy_of)
    return None if blocks is None else DenseStep(model, cache, blocks)


@torch.no_grad()
def copy_of(layer: nn.Module) -> Copy | None:
    """The sum of a linear and its adapter; None where the adapter is more than LoRA."""
    found = base_and_adapter(layer)
    if found is None:
        return None
    base, adapter = found
    weight = dense(base.weight)
    if adapter is not None:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = weight + layer.scaling[adapter] * (B @ A)
    return Copy(weight.t().contiguous(), base.bias)
