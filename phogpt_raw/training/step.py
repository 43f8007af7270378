"""One optimizer step.

The loss of a window is a sum over its micro-batches, divided once by the supervised tokens of the
whole window. So a step is the same for any split into micro-batches. (Averaging each micro-batch
and then the averages is a common mistake: it gives the tokens of short answers more weight.)

train_step calls `mark` with the name of each phase: train.py passes nothing, bench/ a stopwatch or
a memory meter. Micro-batches and clipping are queued without waiting for the GPU. A step waits
once, in the update, where the paged optimizer waits for its pages.
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

SMALLEST_SCALE = 1.0  # of the loss; each skipped step halves the scale, down to this


@dataclass
class Training:
    """The parts of a step, built by setup.py."""

    model: PhoGPT
    adapters: Adapters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    limits: Limits
    clip: float
    forward: PhoGPT | GraphedModel  # the model, or its CUDA graphs


@dataclass(frozen=True)
class StepStats:
    """Scalars on the device: loss (nats per token), gradient norm before clipping, loss scale, and
    1.0 if the update was skipped (None in a simulation, which has no values)."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    scale: torch.Tensor
    skipped: torch.Tensor | None


def unmarked(phase: str) -> None:
    pass


def train_step(training: Training, window: Window,
               mark: Callable[[str], None] = unmarked) -> StepStats:
    """Accumulate the window's gradient in flat.grad, unscale and clip it, update the adapters.

    It can be called again after torch.OutOfMemoryError: nothing changes before the update, which
    allocates no more than a scalar.
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
        hidden = hidden.flatten(0, 1).index_select(0, batch.rows_T)  # [T, D], the supervised rows
        share = summed_loss(hidden, model.head, batch.targets_T, limits.chunk_rows) / supervised
        del hidden  # backward does not need it
        mark("backward")
        # On this thread. autograd's own thread would exchange Python's lock with this one at each
        # of our autograd functions, which takes a third of a short step.
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
