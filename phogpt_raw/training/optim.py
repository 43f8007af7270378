"""The optimizer of the flat adapter buffer: AdamW with 8-bit state in paged memory.

Both moments of AdamW are stored as 8-bit values. Each block of 256 values has one scale (Dettmers
et al. 2022, arXiv:2110.02861). Paged memory is CUDA's managed memory. CUDA moves it to the host
when the GPU is full. `load_state_dict` of bitsandbytes would replace the pages by ordinary GPU
memory. `load_state` in this module keeps the pages.
"""

import math

import torch

from phogpt_raw.private_apis import make_state


def make_optimizer(flat: torch.nn.Parameter, kind: str, lr: float, weight_decay: float):
    """Create the optimizer of this `kind`: 32-bit `adamw`, or `paged_adamw_8bit`.

    The 8-bit optimizer is not paged on a CPU. The state is allocated here, not in the first update.
    A step can therefore run out of memory only before it has changed anything, so it can be
    repeated.
    """
    settings = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    device = flat.device.type
    if kind == "adamw":
        fused = device != "meta"  # fused: one kernel, no temporary tensors
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
    """Bytes of the optimizer state that a GPU keeps in paged memory: the 8-bit moments.

    The result is 0 for 32-bit AdamW. torch's allocator does not count these bytes.
    """
    return sum(tensor.nbytes for state in optimizer.state.values()
               for name, tensor in state.items() if name in ("state1", "state2"))


def lr_at(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """The learning rate of a step.

    step: number of applied steps before this one. steps: planned number of steps.

    The rate rises linearly to `peak` during `warmup` steps. Then it falls along a cosine to
    floor * peak.

    >>> [round(lr_at(s, 10, 1.0, 2, 0.1), 2) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def load_state(optimizer, saved: dict) -> None:
    """Copy a saved state_dict into the optimizer's own tensors, which keep their addresses.

    Checkpoints of older versions are accepted too. They contain no state before the first applied
    step, and their AdamW is not fused.
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
