"""The GPU memory that answering needs, computed from the model's shape before any weights are read.

Weights, adapters and cache are exact. The memory of a prompt's tensors was counted in
decode/prefill.py, at the moment when the most of them are alive. A test compares the sum with 26
settings measured on an H100: it is within 1% of the memory that torch allocated, and never below
the memory that torch reserved.

On a CPU there is one more part, the weights dequantised in fp32 (decode/dense.py).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from phogpt_raw.cards import GIB, Card
from phogpt_raw.data.packing import round_up
from phogpt_raw.decode.engine import PREFILL, STEP
from phogpt_raw.model.attention import block_size
from phogpt_raw.model.cache import cache_bytes
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.nf4_product import MOST, SPLIT
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate.rates import CONTEXT, matmul_workspace

# Bytes that the choice of a token takes for each entry of the vocabulary, its logits included.
GREEDY, DRAWN = 2 + 4, 2 + 40
# Reserved by torch above what is allocated: blocks of other sizes, and the pool of one CUDA graph.
# Measured: 0.10 to 0.34 GiB.
FRAGMENTS = 0.4 * GIB


@dataclass(frozen=True)
class Model:
    """A model before its weights are read. adapter: number of the adapter's weights."""

    shape: ModelConfig
    dtype: torch.dtype
    nf4: bool = True
    adapter: int = 0


@dataclass(frozen=True)
class Work:
    """What is answered. rows: answers at once, in each of `models` engines; positions: tokens of
    the longest prompt with its answer; reading: tokens of prompts that are read together; kinds:
    bytes of a choice in each of the steps that become CUDA graphs."""

    rows: int
    positions: int
    reading: int = PREFILL
    models: int = 1
    kinds: tuple[int, ...] = (GREEDY,)


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    base: float
    adapters: float
    dequantised: float
    cache: float
    prompts: float
    graphs: float
    cuda: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(model: Model, work: Work, card: Card) -> Memory:
    """What answering takes at most."""
    gpu = card.device == "cuda"
    return Memory(
        base=base_bytes(model),
        adapters=work.models * adapter_bytes(model),
        dequantised=0 if gpu else work.models * 4 * model.shape.linear_weights,
        cache=work.models * row_bytes(model, work.positions) * work.rows,
        prompts=prompt_bytes(model, work, card),
        graphs=work.models * graph_bytes(model, work) if gpu else 0,
        cuda=CONTEXT + FRAGMENTS + 2 * matmul_workspace(card) if gpu else 0)


def base_bytes(model: Model) -> float:
    """The linears, the embedding, which is also the head, and the biases and norms."""
    shape, size = model.shape, model.dtype.itemsize
    linears = shape.linear_weights * (NF4_BYTES if model.nf4 else size)
    vectors = shape.n_layers * (9 + shape.expansion_ratio) + 2  # 4 biases, 2 norms; the last norm
    return linears + size * shape.d_model * (shape.vocab_size + vectors)


def adapter_bytes(model: Model) -> int:
    """The adapter's weights in fp32, and a 16-bit copy if the model computes in 16 bits."""
    return model.adapter * (4 + (2 if model.dtype.itemsize == 2 else 0))


def row_bytes(model: Model, positions: int) -> int:
    """The keys and values of one row."""
    shape = model.shape
    return cache_bytes(shape.n_layers, shape.d_model, 1, round_up(positions, STEP),
                       model.dtype.itemsize)


def prompt_bytes(model: Model, work: Work, card: Card) -> float:
    """What prompts take while they are read, PREFILL tokens at a time: the widest linear's weight
    dequantised; tensors of read_prompt, of which x, its norm and attention's output are of the
    model's width, q, k and v three times, and two of the MLP's 4 times as wide; the attention bias.

    In a batch of more than MOST rows every step dequantises too, in the pool of its graph.
    """
    shape, size = model.shape, model.dtype.itemsize
    tokens = min(PREFILL, work.reading)
    wide = shape.expansion_ratio * shape.d_model
    weight = size * shape.d_model * wide if model.nf4 else 0
    alive = tokens * size * max(2 * wide + 6 * shape.d_model + weight / (tokens * size),
                                3 * wide + 5 * shape.d_model)
    keys = min(work.positions, shape.max_seq_len)
    queries = min(tokens, keys, block_size(shape.n_heads, keys, model.dtype))
    bias = shape.n_heads * queries * keys * size
    parts = 4 * SPLIT * MOST * wide if card.device == "cuda" else 0
    return alive + bias + parts


def graph_bytes(model: Model, work: Work) -> float:
    """The pools of all CUDA graphs: one graph for each power of two up to `rows`, and for each kind
    of choice."""
    sizes = [2**n for n in range((work.rows - 1).bit_length())] + [work.rows]
    pools = [rows * kind * model.shape.vocab_size for rows in sizes for kind in work.kinds]
    if work.rows > MOST and model.nf4:  # these steps run through the model's own forward
        widest = model.dtype.itemsize * model.shape.expansion_ratio * model.shape.d_model**2
        pools += [widest] * sum(rows > MOST for rows in sizes)
    return sum(pools)


def most_rows(model: Model, work: Work, card: Card, most: int) -> int:
    """The most rows, up to `most`, with which the work fits the card; 0 where none do."""
    return next((rows for rows in range(most, 0, -1)
                 if memory(model, replace(work, rows=rows), card).total <= card.memory_gib * GIB),
                0)


def adapter_weights(folder: Path) -> int:
    """How many weights an adapter's file holds."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # PEFT's older .bin: 4 bytes a weight
        old = folder / "adapter_model.bin"
        return old.stat().st_size // 4 if old.is_file() else 0
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except Exception as error:  # safetensors raises nothing more special
        raise Refusal(f"{file}: cannot be read ({error}); take another copy of the adapter") \
            from None
