"""The model's forward and backward as CUDA graphs: thousands of kernels, no Python between them.

At 512 tokens of PhoGPT-7B5 the GPU works for 50 ms a micro-step and Python, naming its kernels one
by one, for twice that. A graph is that list of kernels, written down once and replayed by the GPU.
What it reads and writes stays where it was, so it serves one shape: micro-batch x length.

A shape runs eagerly when it is first seen, which shows that it fits, and is captured when it comes
again. The loss between forward and backward is few kernels and stays eager, so the number of
supervised rows may change.

The surprise is the memory. A graph has a pool of its own, full to everything else; and memory freed
on one stream serves that stream alone. So what is large and never runs between a graph's forward
and its backward (another shape's eager step, an evaluation) allocates from that pool and on that
stream. The loss, which does run there, must not. And while a pool is in use torch gives nothing
cached back to whoever finds the card full, so rows of many long lengths can fill it with what is
free elsewhere: `or_eagerly` then drops the graphs and does the work again without.

B micro-batch, L length, D hidden.
"""

import gc
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from phogpt_raw.model.phogpt import PhoGPT

SHAPES = 64  # that are captured; each graph costs the driver some memory, and capturing a second


class Captured:
    """A PhoGPT for training: called like the model, with the same hidden states and gradients.

    `flat` is the adapters' flat parameter. Adapters, their scaling and `model.recompute` must stay
    as they are from now on; their weights may change. `on` until the graphs are given up.
    """

    def __init__(self, model: PhoGPT, flat: nn.Parameter):
        self.model, self.flat, self.head = model, flat, model.head
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Graphs | None] = {}
        self.on = True

    def __call__(self, ids_BL: torch.Tensor, doc_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [B, L, D]; those of a replay are overwritten by the next one."""
        if not self.on:
            return self.model(ids_BL, doc_BL)
        shape = (*ids_BL.shape, doc_BL is not None)
        if shape not in self.seen:
            self.seen.add(shape)
        elif shape not in self.graphs and len(self.graphs) < SHAPES:
            self.graphs[shape] = self.capture(ids_BL, doc_BL)
        graphs = self.graphs.get(shape)
        if graphs is None:
            with self.memory():
                return self.model(ids_BL, doc_BL)
        return Replay.apply(self.flat, graphs, ids_BL, doc_BL)

    @contextmanager
    def memory(self):
        """Work on the graphs' stream, in their memory; never between a forward and its backward."""
        if not self.on:
            yield
            return
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        outside.wait_stream(self.stream)

    def capture(self, ids_BL, doc_BL) -> "Graphs | None":
        """Write down forward, and backward into the adapters' gradients; neither is run.

        None where the card is too full for it; the shape stays eager then.
        """
        torch.cuda.empty_cache()  # while capturing, nothing cached can be given back
        ids_BL, doc_BL = ids_BL.clone(), doc_BL if doc_BL is None else doc_BL.clone()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        into = {"pool": self.pool.id, "stream": self.stream}
        try:
            with torch.cuda.graph(forward, **into):
                hidden_BLD = self.model(ids_BL, doc_BL)
            slope_BLD = torch.empty_like(hidden_BLD)
            with torch.cuda.graph(backward, **into), \
                    torch.autograd.set_multithreading_enabled(False):
                hidden_BLD.backward(slope_BLD)
        except RuntimeError as error:  # also one of ending the capture, raised on the way out
            if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
                raise
            return None
        return Graphs(ids_BL, doc_BL, hidden_BLD.detach(), slope_BLD, forward, backward)

    def give_up(self) -> None:
        """No graphs from now on; their memory goes back, nothing must be left that lies in it."""
        torch.cuda.synchronize()
        self.on, self.graphs = False, {}
        gc.collect()
        self.pool = None
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Graphs:
    """Two graphs and the tensors at their ends, which stay where they are."""

    ids_BL: torch.Tensor
    doc_BL: torch.Tensor | None
    hidden_BLD: torch.Tensor
    slope_BLD: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Replay(torch.autograd.Function):
    """Takes `flat` so that autograd comes back here; its gradient the graph adds to flat.grad."""

    @staticmethod
    def forward(ctx, flat, graphs: Graphs, ids_BL, doc_BL):
        ctx.graphs = graphs
        graphs.ids_BL.copy_(ids_BL)
        if doc_BL is not None:
            graphs.doc_BL.copy_(doc_BL)
        graphs.forward.replay()
        return graphs.hidden_BLD.detach()

    @staticmethod
    def backward(ctx, slope_BLD):
        ctx.graphs.slope_BLD.copy_(slope_BLD)
        ctx.graphs.backward.replay()
        return None, None, None, None


def or_eagerly(work: Callable, captured: Captured | None, say: Callable[[str], None]) -> Callable:
    """`work`, done once more without graphs where the card is too full for it beside them.

    Work that can be begun again: train_step forgets its gradients first and updates last.
    """

    def done(*args):
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            if captured is None or not captured.on:
                raise
        captured.give_up()  # not in `except`: the traceback there holds all activations
        say("the card is too full for CUDA graphs: going on without, as with --no-capture")
        return work(*args)

    return done


def why_not(model: PhoGPT, device: str, wanted: bool) -> str | None:
    """The reason not to capture this model, None where it can be."""
    if not wanted:
        return "--no-capture"
    if device != "cuda":
        return "graphs need a GPU"
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "dropout runs PEFT's own layers"
    return None
