"""Run prompts through all blocks (prefill), with the weights that a fast decoding step uses.

The model's own forward computes the same function through modules, PEFT's layers and autograd
functions. For a short prompt, the Python overhead of these parts takes longer than the work of the
GPU. fused.py and dense.py define how a linear layer is stored and applied.

B rows, L tokens, D hidden, S positions, H heads, K head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from phogpt_raw.model.attention import attend
from phogpt_raw.model.cache import Piece
from phogpt_raw.model.phogpt import PhoGPT


class Norm:
    """A layer norm without the overhead of a module."""

    def __init__(self, norm: nn.LayerNorm):
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def __call__(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x_BLD, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Block:
    """The weights of a block. Each linear layer has the form that fused.py or dense.py uses."""

    norm_1: Norm
    Wqkv: object
    out_proj: object
    norm_2: Norm
    up_proj: object
    down_proj: object


def blocks_of(model: PhoGPT, gather: Callable[[nn.Module], object]) -> list[Block] | None:
    """The weights of all blocks. Each linear layer is replaced by the result of gather(layer).
    Returns None if `gather` returns None for any layer."""
    blocks = []
    for b in model.transformer.blocks:
        layers = (b.attn.Wqkv, b.attn.out_proj, b.ffn.up_proj, b.ffn.down_proj)
        linears = [gather(layer) for layer in layers]
        if any(linear is None for linear in linears):
            return None
        Wqkv, out_proj, up_proj, down_proj = linears
        blocks.append(Block(Norm(b.norm_1), Wqkv, out_proj, Norm(b.norm_2), up_proj, down_proj))
    return blocks


def read_prompt(model: PhoGPT, ids_BL: torch.Tensor, piece: Piece, blocks: list[Block],
                linear: Callable[[torch.Tensor, object], torch.Tensor]) -> torch.Tensor:
    """Hidden states [B, L, D] after the last norm. The keys and values are written to the cache.

    linear: a function. linear(x, w) applies w, a linear layer of a block, to x [B, L, …].
    """
    config = model.config
    heads, scale = (3, config.n_heads, config.d_model // config.n_heads), config.softmax_scale
    x_BLD = model.transformer.wte(ids_BL)
    seen = piece.seen(model.slopes_H, ids_BL.shape[1], x_BLD.dtype)
    for n, block in enumerate(blocks):
        qkv_BL3HK = linear(block.norm_1(x_BLD), block.Wqkv).unflatten(2, heads)
        q_BHLK, k_BHLK, v_BHLK = (part.transpose(1, 2) for part in qkv_BL3HK.unbind(2))
        k_BHSK, v_BHSK = piece.extend(n, k_BHLK, v_BHLK)
        out_BHLK = attend(q_BHLK, k_BHSK, v_BHSK, seen, scale)
        x_BLD = x_BLD + linear(out_BHLK.transpose(1, 2).flatten(2), block.out_proj)
        wide = F.gelu(linear(block.norm_2(x_BLD), block.up_proj))
        x_BLD = x_BLD + linear(wide, block.down_proj)
    return model.transformer.norm_f(x_BLD)
