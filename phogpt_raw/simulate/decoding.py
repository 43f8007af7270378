"""Compute the memory that generating answers needs, before any weights are read.

The memory follows from the model's shape. The sizes of weights, adapters and cache are exact. The
size of a prompt's tensors was counted in the code of decode/prefill.py, at the point where they
take the most memory. A test compares the results with the memory that was measured on an H100 in 26
settings. The computed allocated memory agrees with the measured allocated memory within 1%. The
computed reserved memory is never below the measured reserved memory.

On a CPU, the weights dequantised to fp32 (decode/dense.py) take additional memory.
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

# To choose a token, a row needs this many bytes of memory for each entry of the vocabulary: GREEDY
# if it always takes the most likely token, DRAWN if it draws a token at random. In both numbers,
# the first 2 bytes are the entry's logit in 16 bits.
GREEDY, DRAWN = 2 + 4, 2 + 40
# Memory that torch reserves above the allocated memory, because of fragmentation and of the pool of
# one CUDA graph. Measured values are 0.10 to 0.34 GiB.
FRAGMENTS = 0.4 * GIB


@dataclass(frozen=True)
class Model:
    """A model whose weights are not read yet. adapter: number of weights in the adapter."""

    shape: ModelConfig
    dtype: torch.dtype
    nf4: bool = True
    adapter: int = 0


@dataclass(frozen=True)
class Work:
    """The answers to generate.

    rows: number of answers that an engine generates at once. models: number of engines. positions:
    tokens of the longest prompt together with its answer. reading: tokens of all prompts that are
    read at once. kinds: GREEDY or DRAWN for each kind of decoding step that becomes a CUDA graph.
    """

    rows: int
    positions: int
    reading: int = PREFILL
    models: int = 1
    kinds: tuple[int, ...] = (GREEDY,)


@dataclass(frozen=True)
class Memory:
    """Bytes of memory by purpose."""

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
    """The most memory that is in use on a card while the answers are generated."""
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
    """Bytes of the base: linear layers, biases, norms, and the embedding, which is the head too."""
    shape, size = model.shape, model.dtype.itemsize
    linears = shape.linear_weights * (NF4_BYTES if model.nf4 else size)
    # The biases and norms, as a number of vectors of d_model elements. In each block, the 4 biases
    # count as 5 + expansion_ratio vectors, and the 2 norms as 4. The last norm counts as 2.
    vectors = shape.n_layers * (9 + shape.expansion_ratio) + 2
    return linears + size * shape.d_model * (shape.vocab_size + vectors)


def adapter_bytes(model: Model) -> int:
    """Bytes of an adapter: fp32 weights, and a 16-bit copy if the model computes in 16 bits."""
    return model.adapter * (4 + (2 if model.dtype.itemsize == 2 else 0))


def row_bytes(model: Model, positions: int) -> int:
    """Bytes of the keys and values of one row."""
    shape = model.shape
    return cache_bytes(shape.n_layers, shape.d_model, 1, round_up(positions, STEP),
                       model.dtype.itemsize)


def prompt_bytes(model: Model, work: Work, card: Card) -> float:
    """Bytes that are needed to read prompts, at most PREFILL tokens at once.

    Three parts are added: the tensors of read_prompt, the attention bias, and on a GPU the partial
    sums of the NF4 product. The size of the tensors is computed at two points in read_prompt, and
    the larger size counts. At the first point there are two tensors of the MLP's width, six of the
    model's width (x, its norm, attention's output, q, k and v), and the largest NF4 weight
    dequantised. At the second point there are three tensors of the MLP's width, five of the model's
    width, and no dequantised weight.
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
    """Bytes of the memory pools of all CUDA graphs.

    There is one graph for each batch size (the powers of two below `rows`, and `rows` itself) and
    for each of `work.kinds`.
    """
    sizes = [2**n for n in range((work.rows - 1).bit_length())] + [work.rows]
    pools = [rows * kind * model.shape.vocab_size for rows in sizes for kind in work.kinds]
    if work.rows > MOST and model.nf4:  # a step of more than MOST rows dequantises each weight
        widest = model.dtype.itemsize * model.shape.expansion_ratio * model.shape.d_model**2
        pools += [widest] * sum(rows > MOST for rows in sizes)
    return sum(pools)


def most_rows(model: Model, work: Work, card: Card, most: int) -> int:
    """The largest number of rows, up to `most`, that fits in the card's memory; 0 if none fits."""
    return next((rows for rows in range(most, 0, -1)
                 if memory(model, replace(work, rows=rows), card).total <= card.memory_gib * GIB),
                0)


def adapter_weights(folder: Path) -> int:
    """The number of weights in an adapter's file; 0 if the folder has no file."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # older PEFT wrote a .bin file: 4 bytes per weight
        old = folder / "adapter_model.bin"
        return old.stat().st_size // 4 if old.is_file() else 0
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    except Exception as error:  # safetensors has no narrower error class
        raise Refusal(f"{file}: cannot be read ({error}); take another copy of the adapter") \
            from None
