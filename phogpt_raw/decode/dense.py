"""Decoding on a CPU: one token through all blocks, with weights that are dequantised only once.

A CPU has no kernel that multiplies directly by 4-bit weights. So the model's own forward
dequantises every weight for every token, which takes most of the time. Python's overhead takes most
of the remaining time. Here each weight and its adapter are added once: W + scaling * B A in fp32.
`one_token` then runs only the few operations that a token needs. Up to rounding, its result equals
the result of the model's own forward. The model's 4-bit weights do not change.

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

MOST = 2**30  # bytes; if the fp32 copies would take more, the model's own forward runs instead


@dataclass(frozen=True)
class Copy:
    """A linear layer's weight plus its adapter. The matrix is transposed, because a CPU then
    multiplies a single row fastest."""

    weight_DO: torch.Tensor
    bias_O: torch.Tensor

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias_O, x_ND, self.weight_DO)


class DenseStep:
    """`one_token` with dequantised copies of a model's weights."""

    def __init__(self, model: PhoGPT, cache: Cache, blocks: list[Block]):
        self.model, self.cache, self.blocks = model, cache, blocks
        self.head_DV = model.head.t().contiguous()

    def __call__(self, ids_B: torch.Tensor, positions: int) -> torch.Tensor:
        """Hidden states [B, D] after the last norm, for one more token in each of the first B rows.

        positions: the number of cache positions that attention reads. It must be greater than the
        length of each of these rows.
        """
        x_BD = self.model.transformer.wte(ids_B)
        place_B = self.cache.place_B[: len(ids_B)]
        bias = OneTokenBias(self.model.slopes_H, place_B, positions, x_BD.dtype).last_1HLS
        x_BD = one_token(x_BD, self.blocks, self.cache, place_B, bias,
                         self.model.config.softmax_scale)
        return self.model.transformer.norm_f(x_BD)

    def read(self, ids_BL: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Hidden states [B, L, D] after the last norm, for a piece of the prompts."""
        return read_prompt(self.model, ids_BL, piece, self.blocks, lambda x, copy: copy(
            x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return hidden_BD @ self.head_DV


def one_token(x_BD, blocks: list[Block], cache: Cache, place_B, bias_BH1S,
              scale: float | None) -> torch.Tensor:
    """The output of all blocks for x [B, D]. Writes each row's new key and value to the cache, at
    the row's position."""
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
    """A DenseStep with the model's current weights. None if the model's own forward must run.

    A DenseStep needs a CPU, fp32, a small model, and adapters that are plain LoRA. In 16 bits the
    sum of a weight and its adapter would be rounded, and much of the adapter would be lost.
    """
    config, head = model.config, model.head
    size = (config.linear_weights + head.numel()) * head.element_size()
    if (head.device.type != "cpu" or head.dtype != torch.float32 or size > MOST
            or config.clip_qkv is not None or config.no_bias):
        return None
    blocks = blocks_of(model, copy_of)
    return None if blocks is None else DenseStep(model, cache, blocks)


@torch.no_grad()
def copy_of(layer: nn.Module) -> Copy | None:
    """A linear layer and its adapter as one weight. None if the adapter is not plain LoRA."""
    found = base_and_adapter(layer)
    if found is None:
        return None
    base, adapter = found
    weight = dense(base.weight)
    if adapter is not None:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        weight = weight + layer.scaling[adapter] * (B @ A)
    return Copy(weight.t().contiguous(), base.bias)
