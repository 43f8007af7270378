"""Settings that limit the GPU memory of a step, and a retry without CUDA graphs.

Every step reads these settings anew. A run that has run out of memory can therefore switch CUDA
graphs off and continue.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from phogpt_raw.messages import _


@dataclass
class Limits:
    """The memory settings of a step. A run may change them at any time. No setting changes the
    result of a step."""

    micro_batch: int  # rows in one pass through the model
    chunk_rows: int  # supervised positions whose logits are in memory at once
    recompute: int = 0  # backward recomputes this number of blocks, counted from the first
    graphs: bool = False  # whether forward and backward run as CUDA graphs


def retry_without_graphs(work: Callable, training, say: Callable[[str], None]) -> Callable:
    """Wrap `work`: if it runs out of memory with CUDA graphs, repeat it without them.

    The graphs then stay off. `work` must be safe to repeat. train_step is safe to repeat, because
    it clears the gradients first and changes the adapters last.
    """

    def attempt(*args):
        try:
            return work(*args)
        except torch.OutOfMemoryError:
            if not training.limits.graphs:
                raise
        # Not inside `except`: the exception's traceback would keep all activations in memory.
        training.limits.graphs = False
        training.forward.release()
        say(_("GPU memory is too full for CUDA graphs: continuing without them, as with "
              "--no-capture"))
        return work(*args)

    return attempt
