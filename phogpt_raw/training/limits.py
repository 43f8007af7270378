"""How much a step takes of the GPU's memory at once, and what gives way when that is too much.

The step reads the limits each time, so a run can go on with less after it has run out of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from phogpt_raw.messages import _


@dataclass
class Limits:
    """Mutable on purpose; none of the values changes what a step computes, only how."""

    micro_batch: int  # examples that go through the model at once
    chunk_rows: int  # supervised rows whose logits exist at once
    recompute: int = 0  # blocks, from the first, that backward computes again
    graphs: bool = False  # forward and backward run as CUDA graphs


def retry_without_graphs(work: Callable, training, say: Callable[[str], None]) -> Callable:
    """`work`; where it runs out of memory it is done once more, without CUDA graphs from then on.

    `work` must be able to begin again: train_step clears its gradients first and updates last.
    """

    def attempt(*args):
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            if not training.limits.graphs:
                raise
        # Not inside `except`: the traceback there keeps all activations alive.
        training.limits.graphs = False
        training.forward.release()
        say(_("GPU memory is too full for CUDA graphs: going on without, as with --no-capture"))
        return work(*args)

    return attempt
