"""Traces (records of a simulated step) of a tiny model: two NF4 blocks of width 192.

By default a step has one row and computes in fp16.
"""

import torch
from conftest import example
from peft import LoraConfig
from torch.nn.attention import SDPBackend

from phogpt_raw.data.batches import Window
from phogpt_raw.model.adapters import TARGETS, inject
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.model.weights import base_on_meta
from phogpt_raw.simulate.ledger import Op, Trace
from phogpt_raw.simulate.trace import META, Kernels, Recorder, trace_step
from phogpt_raw.training.setup import wire

EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
D, H, V = 192, 6, 512


def on_meta(layers: int = 2, *, rank: int = 8, vocabulary: int = V, dtype=torch.float16,
            nf4: bool = True) -> tuple:
    """(model, adapters) on the meta device."""
    shape = ModelConfig(D, H, layers, vocab_size=vocabulary, max_seq_len=4096)
    return adapted_on_meta(shape, rank=rank, dtype=dtype, nf4=nf4)


def adapted_on_meta(shape: ModelConfig, *, rank: int, dtype, nf4: bool) -> tuple:
    model = base_on_meta(shape, dtype, nf4=nf4)
    with META:
        return model, inject(model, LoraConfig(r=rank, lora_alpha=16,
                                               target_modules=list(TARGETS)))


def step_of(model: PhoGPT, adapters, *, rows: int = 1, length: int = 96, answer: int = 20,
            recompute: int = 0, chunk: int = 16, optimizer: str = "paged_adamw_8bit",
            kernel: SDPBackend = EFFICIENT) -> Trace:
    training = wire(model, adapters, optimizer=optimizer, micro_batch=rows, recompute=recompute)
    training.limits.chunk_rows = chunk
    window = Window([example([5] * length, answer, "row")] * rows, pad_id=3)
    return trace_step(training, window, Kernels(kernel, kernel))


def traced(layers: int = 2, *, rank: int = 8, vocabulary: int = V, dtype=torch.float16,
           nf4: bool = True, **step) -> Trace:
    return step_of(*on_meta(layers, rank=rank, vocabulary=vocabulary, dtype=dtype, nf4=nf4), **step)


def recorded(run, kernel: SDPBackend = EFFICIENT) -> list[Op]:
    """Call run() and return the recorded operations."""
    recorder = Recorder(Kernels(kernel, kernel))
    with recorder:
        run()
    return recorder.ops


def empty(*shape, dtype=torch.float16, **settings) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META, **settings)
