"""Limits on the GPU memory of a step, and a retry without CUDA graphs when memory runs out.

Every step reads the limits, so a run can continue with lower ones after it has run out of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from phogpt_raw.messages import _


@dataclass
class Limits:
    """Mutable, so that a run can change them. No value changes the result of a step."""

    micro_batch: int  # rows in one pass through the model
    chunk_rows: int  # supervised rows whose logits are in memory at once
    recompute: int = 0  # blocks, from the first, that backward recomputes
    graphs: bool = False  # forward and backward run as CUDA graphs


def retry_without_graphs(work: Callable, training, say: Callable[[str], None]) -> Callable:
    """`work`, repeated without CUDA graphs if it runs out of memory with them; graphs stay off.

    `work` must be repeatable: train_step clears its gradients first and updates last.
    """

    def attempt(*args):
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            if not training.limits.graphs:
                raise
        # Outside `except`, whose traceback would keep all activations alive.
        training.limits.graphs = False
        training.forward.release()
        say(_("GPU memory is too full for CUDA graphs: going on without, as with --no-capture"))
        return work(*args)

    return attempt
