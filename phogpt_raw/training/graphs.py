"""Run the model's forward and backward as CUDA graphs, so that Python need not launch each kernel.

For a micro-batch of 512 tokens of PhoGPT-7B5, the GPU works 50 ms, but Python needs twice as long
to launch the thousands of kernels. A CUDA graph is a recorded list of kernels that the GPU replays.
Its inputs and outputs keep their addresses, so a graph serves only one shape. A shape consists of
the number of rows, their length, the document bounds (if there are documents) and the number of
recomputed blocks.

A shape runs eagerly the first time. This shows that it fits in memory. The shape is captured the
second time. The loss is computed between forward and backward. It has few kernels and always runs
eagerly, so the number of supervised rows may vary.

Memory is the difficult part. Graphs have their own memory pool, and torch does not use this pool
for other work. Memory that was freed on one stream can be reused on the same stream only. Therefore
some other work also allocates from the graphs' pool, on the graphs' stream: an eager step of
another shape, and an evaluation. Such work never runs between a graph's forward and its backward.
The loss runs between them, so it must not allocate from the pool. While the pool is in use, torch
cannot release the pool's cached memory when the GPU is full. Many different long row lengths can
therefore fill the memory. Then limits.py drops the graphs and repeats the work without graphs.

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

SHAPES = 64  # the largest number of captured shapes, because each graph takes some driver memory
# A shape is captured only if at least WORTH of its micro-batches remain. With fewer micro-batches,
# the graphs would save less time than the capture takes.
WORTH = 10


class GraphedModel:
    """Wraps a PhoGPT for training. It is called like the model, and computes the same hidden states
    and gradients.

    flat: the adapters' flat parameter. The values in the adapters' tensors may change. The tensors
    themselves and the LoRA scaling must not be replaced. If `limits.graphs` is False, every call
    runs the model eagerly.
    """

    def __init__(self, model: PhoGPT, flat: nn.Parameter, limits: Limits):
        self.model, self.flat, self.limits, self.head = model, flat, limits, model.head
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Graphs | None] = {}
        self.expected: Counter | None = None  # remaining micro-batches by (B, L), if known
        self.replayed: set[Graphs] = set()  # graphs that were replayed in this step
        self.new: set[Graphs | None] = set()  # captured in this step; None: the capture failed

    def __call__(self, ids_BL: torch.Tensor, doc_BL: torch.Tensor | None = None,
                 recompute: int = 0, bounds: DocumentBounds | None = None) -> torch.Tensor:
        """Hidden states [B, L, D]. If a graph computed them, the next replay may overwrite them."""
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
        """Whether capturing a shape [B, L] saves time, because enough micro-batches of this shape
        remain. Each call counts one micro-batch as done."""
        if self.expected is None:
            return True
        self.expected[tuple(shape)] -= 1
        return self.expected[tuple(shape)] >= WORTH

    @contextmanager
    def memory(self):
        """A context that uses the graphs' stream and allocates from their pool.

        It must not be used between a graph's forward and its backward.
        """
        if not self.limits.graphs:
            yield
            return
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        outside.wait_stream(self.stream)

    def capture(self, ids_BL, doc_BL, how: dict) -> "Graphs | None":
        """Record the model's forward and backward without running them. The recorded backward adds
        to the adapters' gradients.

        Returns None if memory is too full. The shape then always runs eagerly.
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
        except RuntimeError as error:  # torch may report a full memory as a failed capture
            if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
                raise
            return None
        saved -= torch.cuda.memory_allocated()
        return Graphs(ids_BL, doc_BL, hidden_BLD.detach(), gradient_BLD, forward, backward, saved)

    def release(self) -> None:
        """Free the graphs' memory. Tensors in this memory must not be used afterwards."""
        torch.cuda.synchronize()
        self.graphs, self.replayed, self.new = {}, set(), set()
        gc.collect()
        self.pool = None
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        """Peak GPU memory of a step, in bytes. Reset torch's peak before the step, and call this
        method once after the step.

        After a capture torch counts the graph's memory as free. In a step that replays a graph,
        `torch.cuda.max_memory_allocated` therefore omits the saved activations. This method adds
        them. In the step of the capture, torch counts them itself.
        """
        saved = max((graphs.saved for graphs in self.replayed - self.new), default=0)
        self.replayed, self.new = set(), set()
        return torch.cuda.max_memory_allocated() + saved


@dataclass(frozen=True, eq=False)
class Graphs:
    """The forward and backward graphs of a shape, with their input and output tensors.

    These tensors have fixed addresses. saved: bytes of the activations that forward saves for
    backward.
    """

    ids_BL: torch.Tensor
    doc_BL: torch.Tensor | None
    hidden_BLD: torch.Tensor
    gradient_BLD: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    saved: int


class Replay(torch.autograd.Function):
    """Replays the forward graph in `forward`, and the backward graph in `backward`.

    `flat` is an input only to make autograd call `backward`. The backward graph itself adds to
    flat.grad.
    """

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
    """The reason why CUDA graphs are off for this model; None if they are on."""
    if not wanted:
        return "--no-capture"
    if device != "cuda":
        return _("there is no GPU")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return _("LoRA dropout needs PEFT's own layers")
    return None
