"""The optimizer of the flat adapter buffer: AdamW with 8-bit state, in pages.

Dettmers et al. 2022 (arXiv:2110.02861): both moments as 8-bit numbers with a scale a block of 256.
Paged means in CUDA's managed memory, which moves to the host when the card is full. The surprise:
`load_state_dict` silently turns pages into plain device memory; `load_state` here makes them again.
"""

import math

import torch


def make_optimizer(flat: torch.nn.Parameter, kind: str, lr: float, weight_decay: float):
    """`paged_adamw_8bit` (plain 8-bit on the CPU, which has no pages) or 32-bit `adamw`."""
    settings = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    if kind == "adamw":
        return torch.optim.AdamW([flat], **settings)
    import bitsandbytes as bnb

    paged = flat.device.type == "cuda"
    return (bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit)([flat], **settings)


def describe(kind: str, device: str) -> str:
    if kind == "adamw":
        return "AdamW, 32-bit state"
    return "AdamW, 8-bit state" + (", paged" if device == "cuda" else " (pages need a GPU)")


def lr_at(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Learning rate of applied step 0, 1, …: linear up to the peak, a cosine down to floor * peak.

    >>> [round(lr_at(s, 10, 1.0, 2, 0.1), 2) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def load_state(optimizer, state: dict) -> None:
    """Restore a saved state_dict; paged state goes back into pages."""
    optimizer.load_state_dict(state)
    if not getattr(optimizer, "is_paged", False):
        return
    from bitsandbytes import functional as F

    for flat, values in optimizer.state.items():
        if flat.device.type != "cuda":
            continue
        for name in ("state1", "state2"):
            value = values[name]
            if value.numel() >= 1e5:  # below, bitsandbytes itself does not page
                page = F.get_paged(*value.shape, dtype=value.dtype, device=value.device)
                page.copy_(value.cpu())
                optimizer.page_mng.paged_tensors.append(page)
                values[name] = page
