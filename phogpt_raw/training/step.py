"""One optimizer step.

An accumulation window holds the examples of one step, split into micro-batches. The losses of all
its supervised tokens are summed, and the sum is divided once by the number of these tokens.
The result of a step therefore does not depend on the split. A common mistake is to average each
micro-batch and then to average these means. This gives more weight to the tokens of short answers.

train_step calls `mark(phase)` at the start of each phase. bench/ passes a stopwatch or a memory
meter as `mark`, and simulate/ passes a recorder. The host queues the micro-batches and the clipping
without waiting for the GPU. It waits once in each step, during the update: there the paged
optimizer waits for its pages.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from phogpt_raw.data.batches import Window
from phogpt_raw.model.adapters import Adapters
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.private_apis import found_inf
from phogpt_raw.training.graphs import GraphedModel
from phogpt_raw.training.limits import Limits
from phogpt_raw.training.loss import summed_loss

SMALLEST_SCALE = 1.0  # a skipped step halves the loss scale, but never below this value


@dataclass
class Training:
    """The objects that train_step needs. `wire` in setup.py builds them."""

    model: PhoGPT
    adapters: Adapters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    limits: Limits
    clip: float
    forward: PhoGPT | GraphedModel  # the model, or a wrapper that runs it as CUDA graphs


@dataclass(frozen=True)
class StepStats:
    """The results of a step, as scalar tensors on the device.

    loss: nats per supervised token. grad_norm: the gradient's norm before clipping. scale: the loss
    scale. skipped: 1.0 if the update was skipped, else 0.0; None in a simulation.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    scale: torch.Tensor
    skipped: torch.Tensor | None


def unmarked(phase: str) -> None:
    pass


def train_step(training: Training, window: Window,
               mark: Callable[[str], None] = unmarked) -> StepStats:
    """Accumulate the window's gradient in flat.grad, unscale and clip it, and update the adapters.

    After torch.OutOfMemoryError the same step can be called again. Adapters and optimizer state
    change only in the update, and the update allocates no more than a scalar.
    """
    model, limits = training.forward, training.limits
    flat, optimizer, scaler = training.adapters.flat, training.optimizer, training.scaler

    mark("zero")
    flat.grad.zero_()
    one = torch.ones((), device=flat.device)
    scale = scaler.scale(one).clamp(min=SMALLEST_SCALE)
    scaler.update(scale)  # also resets the scaler after a step that ran out of memory
    loss, supervised = torch.zeros_like(one), one * window.supervised

    for batch in window.micro_batches(limits.micro_batch):
        batch = batch.to(flat.device)
        mark("forward")
        hidden = model(batch.ids_BL, batch.doc_BL, bounds=batch.bounds,
                       recompute=limits.recompute)  # [B, L, D]
        hidden = hidden.flatten(0, 1).index_select(0, batch.rows_T)  # [T, D], supervised positions
        share = summed_loss(hidden, model.head, batch.targets_T, limits.chunk_rows) / supervised
        del hidden  # backward does not need it
        mark("backward")
        # Run backward on this thread. With autograd's own thread, Python's lock (GIL) would switch
        # between two threads at each of our autograd functions. These switches take a third of the
        # time of a short step.
        with torch.autograd.set_multithreading_enabled(False):
            scaler.scale(share).backward()
        loss += share.detach()

    mark("clip")
    scaler.unscale_(optimizer)
    skipped = found_inf(scaler, optimizer)  # 1.0 on the device if a gradient is inf or nan
    grad_norm = clip_grad_norm_([flat], training.clip)

    mark("optimizer")
    scaler.step(optimizer)
    scaler.update()
    training.adapters.cast()
    return StepStats(loss, grad_norm, scale, skipped)
