"""PhoGPT's forward: MPT blocks with biases, ALiBi attention and a tied head.

The parameters have llm-foundry's names, which are also their names in the checkpoint. Every linear
layer and every norm has a bias. transformers' own MPT has no biases, and drops PhoGPT's biases
without an error. There is no position embedding. With a vocabulary of 250,880 tokens, logits for
all positions would take much memory. So `forward` returns the hidden states, and the loss applies
the head only at the positions that it needs.

B micro-batch, L length, S positions that attention sees, D hidden, H heads, K head width, V
vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from phogpt_raw.data.packing import DocumentBounds
from phogpt_raw.model.attention import alibi_slopes, attend
from phogpt_raw.model.cache import Cache, Piece, Step
from phogpt_raw.model.documents import Documents, attend_documents, visible
from phogpt_raw.model.recompute import recomputed
from phogpt_raw.refusal import Refusal


@dataclass(frozen=True)
class ModelConfig:
    """The fields of VinAI's config.json that affect the model's results. `from_json` also checks
    the fields in SUPPORTED."""

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    max_seq_len: int
    expansion_ratio: int = 4
    no_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    alibi_bias_max: float = 8
    clip_qkv: float | None = None
    softmax_scale: float | None = None

    @property
    def linear_weights(self) -> int:
        """The number of weights in the linear layers of all blocks: Wqkv, out_proj, up_proj and
        down_proj."""
        return self.n_layers * self.d_model**2 * (4 + 2 * self.expansion_ratio)

    @classmethod
    def from_json(cls, config: dict, where: str = "config.json") -> "ModelConfig":
        """A ModelConfig from VinAI's config.json. Raises Refusal that names the first field that is
        not supported or not valid."""
        parts = {part: config.get(part) or {} for part in ("attn_config", "ffn_config")}
        for part, fields in parts.items():
            if not isinstance(fields, dict):
                raise Refusal(f"{where}: {part} is not an object")
        if config.get("quantization_config"):
            raise Refusal(f"{where}: the checkpoint is already quantised (quantization_config); "
                          f"name the original checkpoint, which this program quantises itself")
        for field, supported in SUPPORTED.items():
            part, _, name = field.rpartition(".")
            value = parts.get(part, config).get(name, supported[0])
            if value not in supported:
                raise Refusal(
                    f"{where}: {field} = {value!r} is not supported, only "
                    f"{' or '.join(repr(s) for s in supported)}; this is not a PhoGPT model"
                )
        fields = cls.__dataclass_fields__
        given = {k: v for k, v in {**config, **parts["attn_config"]}.items() if k in fields}
        epsilon = config.get("norm_eps")  # the name of this field in llm-foundry
        if epsilon is not None and given.setdefault("layer_norm_epsilon", epsilon) != epsilon:
            raise Refusal(f"{where}: layer_norm_epsilon and norm_eps are two names of one value, "
                          f"but their values differ")
        try:
            shape = cls(**given)
        except TypeError as error:
            raise Refusal(f"{where}: {str(error).split(') ')[-1]}: not an MPT config?") from None
        for field in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len",
                      "expansion_ratio"):
            value = getattr(shape, field)
            if type(value) is not int or not 1 <= value <= LARGEST.get(field, 2**24):
                raise Refusal(f"{where}: {field} = {value!r} is not a whole number from 1 to "
                              f"{LARGEST.get(field, 2**24):,}")
        for field in ("layer_norm_epsilon", "alibi_bias_max", "clip_qkv", "softmax_scale"):
            value = getattr(shape, field)
            if value is None and fields[field].default is None:
                continue
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise Refusal(f"{where}: {field} = {value!r} is not a positive number")
        if shape.d_model % shape.n_heads:
            raise Refusal(f"{where}: d_model {shape.d_model} is not a multiple of n_heads "
                          f"{shape.n_heads}")
        return shape


# VinAI's two model shapes. PhoGPT-7B5-Instruct and 4B-Chat have the same shapes as their bases.
PUBLISHED = {
    "7b5": ModelConfig(4096, 32, 32, vocab_size=250_880, max_seq_len=2048),
    "4b": ModelConfig(3072, 24, 32, vocab_size=20_480, max_seq_len=8192),
}

# LARGEST: the largest accepted value of a field. SUPPORTED: all accepted values of a field; the
# first value is the default. learned_pos_emb is not listed: VinAI's config.json sets it to true,
# but MPT has no learned positions with ALiBi. Loading refuses a checkpoint that contains learned
# positions.
LARGEST = {"n_layers": 1024, "d_model": 2**16, "n_heads": 1024, "expansion_ratio": 64}
SUPPORTED = {
    "model_type": ("mpt",),
    "ffn_config.ffn_type": ("mptmlp",),
    "ffn_config.ffn_act_fn": (None, {"name": "gelu"}, {"name": "gelu", "approximate": "none"}),
    "ffn_act_fn": (None,),
    "attn_config.attn_logit_softcapping": (None,),
    "attn_config.alibi": (True,),
    "attn_config.attn_type": ("multihead_attention",),
    "attn_config.attn_uses_sequence_id": (False,),
    "attn_config.prefix_lm": (False,),
    "attn_config.qk_ln": (False,),
    "attn_config.qk_gn": (False,),
    "attn_config.rope": (False,),
    "attn_config.sliding_window_size": (-1,),
    "attn_config.attn_pdrop": (0,),
    "resid_pdrop": (0,),
    "emb_pdrop": (0,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "logit_scale": (None,),
    "tie_word_embeddings": (True,),
}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, bias = config.d_model, not config.no_bias
        self.heads, self.clip, self.scale = config.n_heads, config.clip_qkv, config.softmax_scale
        self.Wqkv = nn.Linear(d, 3 * d, bias=bias)
        self.out_proj = nn.Linear(d, d, bias=bias)

    def forward(self, x_BLD, seen, extend=None):
        qkv = self.Wqkv(x_BLD)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        qkv = rearrange(qkv, "b l (three h k) -> b l three h k", three=3, h=self.heads)
        if isinstance(seen, Documents):
            out = attend_documents(qkv, seen, self.scale)
            return self.out_proj(rearrange(out, "b l h k -> b l (h k)"))
        # The split is along an inner axis, so backward joins the gradients in the layout of qkv.
        q, k, v = (rearrange(part, "b l h k -> b h l k") for part in qkv.unbind(2))
        if extend is not None:
            k, v = extend(k, v)
        return self.out_proj(rearrange(attend(q, k, v, seen, self.scale), "b h l k -> b l (h k)"))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, bias = config.d_model, not config.no_bias
        self.up_proj = nn.Linear(d, config.expansion_ratio * d, bias=bias)
        self.down_proj = nn.Linear(config.expansion_ratio * d, d, bias=bias)

    def forward(self, x_BLD):
        with recomputed(F.gelu, self.up_proj(x_BLD)) as wide:  # exact GELU, no tanh approximation
            return self.down_proj(wide)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x)).

    The outputs of the norms and of the GELU are not saved. Backward recomputes them (recompute.py).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        norm = {"eps": config.layer_norm_epsilon, "bias": not config.no_bias}
        self.norm_1 = nn.LayerNorm(config.d_model, **norm)
        self.attn = Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, **norm)
        self.ffn = FeedForward(config)

    def forward(self, x_BLD, seen, extend=None):
        with recomputed(self.norm_1, x_BLD) as normed:
            x_BLD = x_BLD + self.attn(normed, seen, extend)
        with recomputed(self.norm_2, x_BLD) as normed:
            return x_BLD + self.ffn(normed)


class PhoGPT(nn.Module):
    """`forward` returns hidden states. `logits` applies the head to the rows that the caller
    selects."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.d_model),
                blocks=nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                norm_f=nn.LayerNorm(
                    config.d_model, eps=config.layer_norm_epsilon, bias=not config.no_bias
                ),
            )
        )
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max)
        self.register_buffer("slopes_H", slopes, persistent=False)

    def forward(self, ids_BL, doc_BL=None, cache: Piece | Step | None = None,
                recompute: int = 0, bounds: DocumentBounds | None = None) -> torch.Tensor:
        """Hidden states [B, L, D] after the last norm.

        doc_BL: the document number of each token. A token attends only to its own document. Padding
            has its own document number, so padding and packing need no separate code. None: each
            row is one document.
        cache: a view of a key-value cache. ids_BL are the next L tokens of its rows. The new
            tokens attend to the earlier tokens of their row in the cache. doc_BL is then ignored.
        recompute: the number of blocks, counted from the first, that store only their input for
            backward. Backward computes these blocks a second time. Each of these blocks stores
            about ten activations fewer than without recomputation, but needs 1.5 times the
            arithmetic: a block of N frozen parameters needs 6N FLOPs per token with recomputation,
            and 4N without.
        bounds: limits on the number and the length of the documents in doc_BL. With these limits,
            attention can use faster kernels (documents.py).
        """
        x, length = self.transformer.wte(ids_BL), ids_BL.shape[1]
        if cache is None:
            seen = visible(self.slopes_H, self.config.d_model // self.config.n_heads, length,
                           x.dtype, doc_BL, bounds)
        else:
            seen = cache.seen(self.slopes_H, length, x.dtype)
        for n, block in enumerate(self.transformer.blocks):
            if cache is not None:
                x = block(x, seen, partial(cache.extend, n))
            elif torch.is_grad_enabled() and n < recompute:
                x = checkpoint(block, x, seen, use_reentrant=False)
            else:
                x = block(x, seen)
        return self.transformer.norm_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits, [..., D] -> [..., V]. The head is tied: its weights are the embedding's."""
        return F.linear(hidden, self.head)

    @property
    def head(self) -> torch.Tensor:
        """The head's weight [V, D]."""
        return self.transformer.wte.weight

    def new_cache(self, rows: int, positions: int) -> Cache:
        """An empty key-value cache for `rows` sequences of up to `positions` tokens each."""
        c = self.config
        kv = (c.n_heads, positions, c.d_model // c.n_heads)
        return Cache(c.n_layers, rows, *kv, dtype=self.head.dtype, device=self.head.device)
