"""The optimizer of the flat adapter buffer: AdamW with 8-bit state, in paged memory.

Dettmers et al. 2022 (arXiv:2110.02861): both moments as 8-bit values with one scale for each block
of 256. Paged means CUDA's managed memory, which moves to the host when the GPU is full.
bitsandbytes' `load_state_dict` would make it plain device memory; `load_state` keeps the pages.
"""

import math

import torch

from phogpt_raw.private_apis import make_state


def make_optimizer(flat: torch.nn.Parameter, kind: str, lr: float, weight_decay: float):
    """`paged_adamw_8bit` (plain 8-bit on the CPU, which has no pages) or 32-bit `adamw`.

    Its state is there from the start, so that an update allocates nothing: a step that runs out of
    memory does so before anything has changed, and can be tried again.
    """
    settings = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    device = flat.device.type
    if kind == "adamw":
        fused = device != "meta"  # one kernel without temporaries; the meta device has none
        optimizer = torch.optim.AdamW([flat], **settings, fused=fused)
        optimizer.state[flat] = {
            "step": torch.zeros((), device=flat.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat),
        }
        return optimizer
    import bitsandbytes as bnb

    kind = bnb.optim.PagedAdamW8bit if device == "cuda" else bnb.optim.AdamW8bit
    optimizer = kind([flat], **settings)
    make_state(optimizer, flat)
    return optimizer


def paged_bytes(optimizer) -> int:
    """Bytes of the state that a GPU run keeps in paged memory: the 8-bit moments, none in 32 bits.

    torch's allocator does not see them.
    """
    return sum(tensor.nbytes for state in optimizer.state.values()
               for name, tensor in state.items() if name in ("state1", "state2"))


def lr_at(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Learning rate of applied step 0, 1, …: linear up to the peak, a cosine down to floor * peak.

    >>> [round(lr_at(s, 10, 1.0, 2, 0.1), 2) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def load_state(optimizer, saved: dict) -> None:
    """Copy a saved state_dict into the optimizer's own tensors, which stay where they are.

    Older checkpoints have no state before the first applied step, and an AdamW that is not fused.
    """
    own = {flat: dict(values) for flat, values in optimizer.state.items()}
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for flat, values in own.items():
        loaded = optimizer.state[flat]
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                loaded[name] = value.copy_(loaded[name]) if name in loaded else value
            else:
                loaded.setdefault(name, value)
    for group, kind in zip(optimizer.param_groups, fused, strict=True):
        if kind is not None:
            group["fused"] = kind
