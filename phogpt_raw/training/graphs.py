"""The model's forward and backward as CUDA graphs, so that Python launches no kernels one by one.

At 512 tokens of PhoGPT-7B5 the GPU works 50 ms on a micro-batch, and Python needs twice that to
launch its thousands of kernels. A CUDA graph is that list of kernels, recorded once and replayed by
the GPU. Its inputs and outputs keep their addresses, so a graph serves one shape: micro-batch x
length, with or without documents, and one recompute depth.

A shape runs eagerly the first time, which shows that it fits in memory, and is captured the second
time. The loss between forward and backward has few kernels and stays eager, so the number of
supervised rows may vary.

Memory is the difficult part. Graphs have their own memory pool, and torch does not lend it to other
work; memory freed on one stream can be reused on that stream only. So large work that never runs
between a graph's forward and its backward (the eager step of another shape, an evaluation)
allocates from that pool, on the graphs' stream. The loss runs between a graph's forward and its
backward, so it must not allocate from that pool. While a pool is in use torch cannot release its
cached memory when the GPU is full, so rows of many long lengths can exhaust it. Then limits.py
drops the graphs and repeats the work without them.

B micro-batch, L length, D hidden.
"""

import gc
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from phogpt_raw.data.packing import DocumentBounds
from phogpt_raw.messages import _
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.training.limits import Limits

SHAPES = 64  # shapes captured at most; each graph takes some driver memory
WORTH = 10  # micro-batches still to come; capturing takes about as long as these save


class GraphedModel:
    """A PhoGPT for training: called like the model, with the same hidden states and gradients.

    flat: the adapters' flat parameter. The adapters' tensors and scaling must not be replaced;
    their values may change. Where `limits.graphs` is off it calls the model.
    """

    def __init__(self, model: PhoGPT, flat: nn.Parameter, limits: Limits):
        self.model, self.flat, self.limits, self.head = model, flat, limits, model.head
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Graphs | None] = {}
        self.expected: Counter | None = None  # micro-batches of each (B, L) to come; None: unknown
        self.replayed: set[Graphs] = set()  # in this step
        self.new: set[Graphs | None] = set()  # captured in this step

    def __call__(self, ids_BL: torch.Tensor, doc_BL: torch.Tensor | None = None,
                 recompute: int = 0, bounds: DocumentBounds | None = None) -> torch.Tensor:
        """Hidden states [B, L, D]; the next replay overwrites those of a replay."""
        how = {"recompute": recompute, "bounds": bounds}
        if not self.limits.graphs:
            return self.model(ids_BL, doc_BL, **how)
        shape = (*ids_BL.shape, doc_BL is not None, bounds, recompute)
        worth = self.is_worth(ids_BL.shape)
        if shape not in self.seen:
            self.seen.add(shape)
        elif worth and shape not in self.graphs and len(self.graphs) < SHAPES:
            self.graphs[shape] = self.capture(ids_BL, doc_BL, how)
            self.new.add(self.graphs[shape])
        graphs = self.graphs.get(shape)
        if graphs is None:
            with self.memory():
                return self.model(ids_BL, doc_BL, **how)
        self.replayed.add(graphs)
        return Replay.apply(self.flat, graphs, ids_BL, doc_BL)

    def is_worth(self, shape: torch.Size) -> bool:
        """Whether capturing saves time: whether enough micro-batches of this shape are still to
        come."""
        if self.expected is None:
            return True
        self.expected[tuple(shape)] -= 1
        return self.expected[tuple(shape)] >= WORTH

    @contextmanager
    def memory(self):
        """Run on the graphs' stream, in their pool; never between a forward and its backward."""
        if not self.limits.graphs:
            yield
            return
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        outside.wait_stream(self.stream)

    def capture(self, ids_BL, doc_BL, how: dict) -> "Graphs | None":
        """Record forward, and backward into the adapters' gradients; runs neither.

        None where memory is too full; the shape then stays eager.
        """
        torch.cuda.empty_cache()  # during a capture cached memory cannot be released
        ids_BL, doc_BL = ids_BL.clone(), doc_BL if doc_BL is None else doc_BL.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        into = {"pool": self.pool.id, "stream": self.stream}
        try:
            with torch.cuda.graph(forward, **into):
                hidden_BLD = self.model(ids_BL, doc_BL, **how)
            gradient_BLD = torch.empty_like(hidden_BLD)
            saved = torch.cuda.memory_allocated()
            with torch.cuda.graph(backward, **into), \
                    torch.autograd.set_multithreading_enabled(False):
                hidden_BLD.backward(gradient_BLD)
        except RuntimeError as error:  # out of memory may appear as an error of ending the capture
            if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
                raise
            return None
        saved -= torch.cuda.memory_allocated()
        return Graphs(ids_BL, doc_BL, hidden_BLD.detach(), gradient_BLD, forward, backward, saved)

    def release(self) -> None:
        """Free the graphs' memory; nothing in it may be used afterwards."""
        torch.cuda.synchronize()
        self.graphs, self.replayed, self.new = {}, set(), set()
        gc.collect()
        self.pool = None
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        """The most memory in use since torch's peak was reset and since the last call.

        torch counts a graph's own memory as free once it is captured. So
        `torch.cuda.max_memory_allocated` includes the loss of a replayed step but not its saved
        activations; they are added here. During a capture torch counts them itself.
        """
        saved = max((graphs.saved for graphs in self.replayed - self.new), default=0)
        self.replayed, self.new = set(), set()
        return torch.cuda.max_memory_allocated() + saved


@dataclass(frozen=True, eq=False)
class Graphs:
    """A forward and a backward graph and their input and output tensors, at fixed addresses.

    saved: bytes of the activations that forward leaves for backward.
    """

    ids_BL: torch.Tensor
    doc_BL: torch.Tensor | None
    hidden_BLD: torch.Tensor
    gradient_BLD: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    saved: int


class Replay(torch.autograd.Function):
    """Takes `flat` so that autograd calls backward; the graph itself adds to flat.grad."""

    @staticmethod
    def forward(ctx, flat, graphs: Graphs, ids_BL, doc_BL):
        ctx.graphs = graphs
        graphs.ids_BL.copy_(ids_BL)
        if doc_BL is not None:
            graphs.doc_BL.copy_(doc_BL)
        graphs.forward.replay()
        return graphs.hidden_BLD.detach()

    @staticmethod
    def backward(ctx, gradient_BLD):
        ctx.graphs.gradient_BLD.copy_(gradient_BLD)
        ctx.graphs.backward.replay()
        return None, None, None, None


def why_not(model: PhoGPT, device: str, wanted: bool) -> str | None:
    """The reason why this model cannot be captured; None where it can."""
    if not wanted:
        return "--no-capture"
    if device != "cuda":
        return _("there is no GPU")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return _("dropout runs PEFT's own layers")
    return None
