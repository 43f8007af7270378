"""The pretraining loop. It keeps the weights with the lowest held-out loss, not the last weights.

The training text is small and is read many times. When the model begins to memorise this text, its
loss on other text rises.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch

from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.nano.recipe.evaluate import loss_of
from phogpt_raw.nano.recipe.stream import batches, steps_of_epoch
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.optim import lr_at

LR_FLOOR = 0.1  # the final learning rate as a share of the peak
PRINT_EVERY = 50  # steps


def train_and_keep_best(
    model: PhoGPT,
    stream: torch.Tensor,
    args: argparse.Namespace,
    autocast: Callable,
    held_out_loss: Callable[[], dict],
) -> dict:
    """Train, then restore the weights with the lowest held-out loss. Returns the learning curve.

    `held_out_loss` returns the loss as nats_a_token and nats_a_byte. It is called four times in
    each epoch, and after the last step. The training loss is read from the device only when it is
    printed. So the host can queue steps ahead of the GPU.
    """
    seq_len, rows = args.seq_len, args.batch_tokens // args.seq_len
    check_sizes(len(stream), model.config.max_seq_len, args)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    loss_fn = torch.compile(loss_of) if args.compile else loss_of
    epoch = steps_of_epoch(len(stream), seq_len, rows)
    steps = min(int(args.epochs * epoch), args.max_steps or sys.maxsize)
    evaluated = {round(q * epoch / 4) for q in range(1, int(4 * args.epochs) + 1)} | {steps}
    curve, best, best_weights = [], math.inf, None
    loss_sum, summed = torch.zeros((), device=stream.device), 0
    begun, data = time.perf_counter(), batches(stream, seq_len, rows, args.seed)
    for step in range(steps):
        lr = lr_at(step, steps, args.lr, args.warmup, LR_FLOOR)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast():
            loss = loss_fn(model, *next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.detach()
        summed += 1
        if step + 1 not in evaluated and summed < PRINT_EVERY:
            continue
        seconds, train_loss = time.perf_counter() - begun, loss_sum.item() / summed
        line = f"step {step + 1}/{steps}  train {train_loss:.4f}"
        if step + 1 in evaluated:
            point = dict(step=step + 1, tokens=(step + 1) * rows * seq_len, train=train_loss)
            point |= held_out_loss()
            curve.append(point)
            if point["nats_a_token"] < best:
                best = point["nats_a_token"]
                best_weights = {k: v.clone() for k, v in model.state_dict().items()}
            line += f"  held-out {point['nats_a_token']:.4f} ({point['nats_a_byte']:.4f} a byte)"
        print(f"{line}  {seconds:.0f} s", flush=True)
        loss_sum.zero_()
        summed = 0
    model.load_state_dict(best_weights)
    return {
        "tokens_seen": steps * rows * seq_len,
        "seconds": round(time.perf_counter() - begun, 1),
        "kept_step": min(curve, key=lambda point: point["nats_a_token"])["step"],
        "curve": curve,
    }


def check_sizes(tokens: int, max_seq_len: int, args: argparse.Namespace) -> None:
    """Raise Refusal if a step has no row, a row is too long, or the text is too short."""
    rows = args.batch_tokens // args.seq_len
    if rows < 1 or args.seq_len > max_seq_len or tokens <= 2 * args.seq_len * rows:
        raise Refusal(
            f"--seq-len {args.seq_len} --batch-tokens {args.batch_tokens}: a step needs at least "
            f"one row, a row has at most {max_seq_len} tokens, and the {tokens:,} training tokens "
            "must be enough for two steps"
        )


def make_optimizer(model: PhoGPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)],
        lr=lr, betas=(0.9, 0.95), fused=model.head.is_cuda,
    )  # fmt: skip
