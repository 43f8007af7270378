"""One optimizer step.

The loss of a window is a sum over its micro-batches, divided once by the supervised tokens of the
whole window, so a step is the same for every way to split it. Averaging each micro-batch and then
the averages weighs a short answer's tokens above a long one's, a mistake that trainers have made
for years.

`mark` names the phases: train.py passes nothing, bench/ a stopwatch or a scale. The micro-batches
and the clipping are queued without waiting for the GPU; the one wait of a step is in the update,
where GradScaler asks whether a gradient overflowed and the paged optimizer waits for its pages.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from phogpt_raw.data.batches import MicroBatch, Window
from phogpt_raw.training.loss import batch_loss


@dataclass(frozen=True)
class StepStats:
    """Device tensors, read when they are shown: loss (nats a token), grad_norm before clipping."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


def unmarked(phase: str) -> None:
    pass


def make_scaler(dtype: torch.dtype, device: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16. For bf16 and fp32 the scale begins at 1 and what matters is the check:
    a step with a gradient that is not finite is left out. It halves the scale, which does no harm
    there, and tells train.py.

    2^12 to begin with: the default 2^16 overflows for the first steps of every run.
    """
    if dtype == torch.float16:
        return torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=200)
    return torch.amp.GradScaler(device, init_scale=1.0, growth_interval=2**30)


def make_micro_step(model, scaler, chunk: int, mark: Callable = unmarked) -> Callable:
    """A callable (micro-batch, window's supervised tokens) -> its share of the loss, detached.

    It runs forward and backward, so the adapters' gradients grow by this micro-batch's share.
    `model` is the PhoGPT, or its captured twin.
    """

    def micro_step(batch: MicroBatch, supervised: torch.Tensor) -> torch.Tensor:
        mark("forward")
        loss = batch_loss(model, batch, chunk) / supervised
        mark("backward")
        # On this thread: handing Python's lock to autograd's own and back for each of our functions
        # takes a third of a short step.
        with torch.autograd.set_multithreading_enabled(False):
            scaler.scale(loss).backward()
        return loss.detach()

    return micro_step


def train_step(
    window: Window,
    micro_step: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
    flat: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip: float,
    mark: Callable[[str], None] = unmarked,
) -> StepStats:
    """Accumulate the window's gradients into flat.grad, clip their true norm, update flat."""
    mark("zero")
    flat.grad.zero_()
    loss = torch.zeros((), device=flat.device)
    supervised = torch.full_like(loss, window.supervised)
    for batch in window.batches:
        loss += micro_step(batch.to(flat.device), supervised)

    mark("clip")
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_([flat], clip)

    mark("optimizer")
    scaler.step(optimizer)
    scaler.update()
    return StepStats(loss, grad_norm)
