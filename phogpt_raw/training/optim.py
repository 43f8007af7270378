"""The optimizer of the flat adapter buffer: AdamW with 8-bit state in paged memory.

Both moments are 8-bit values with one scale for each block of 256 (Dettmers et al. 2022,
arXiv:2110.02861). Paged memory is CUDA's managed memory, which moves to the host when the GPU is
full. bitsandbytes' `load_state_dict` would replace it by ordinary device memory; `load_state` keeps
the pages.
"""

import math

import torch

from phogpt_raw.private_apis import make_state


def make_optimizer(flat: torch.nn.Parameter, kind: str, lr: float, weight_decay: float):
    """`paged_adamw_8bit` (not paged on a CPU) or 32-bit `adamw`.

    The state is allocated at the start, so an update allocates nothing. A step that runs out of
    memory therefore does so before it has changed anything, and can be repeated.
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
    """Bytes of the state in paged memory on a GPU: the 8-bit moments; 0 for 32 bits.

    torch's allocator does not count them.
    """
    return sum(tensor.nbytes for state in optimizer.state.values()
               for name, tensor in state.items() if name in ("state1", "state2"))


def lr_at(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Learning rate of applied step 0, 1, …: linear to the peak, then a cosine to floor * peak.

    >>> [round(lr_at(s, 10, 1.0, 2, 0.1), 2) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def load_state(optimizer, saved: dict) -> None:
    """Copy a saved state_dict into the optimizer's own tensors, which keep their addresses.

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
