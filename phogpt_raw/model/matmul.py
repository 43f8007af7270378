"""Matrix products with their ends fused: no kernel of its own for a factor or a change of dtype.

The surprise: a product of 16-bit matrices is summed in fp32 inside the kernel in any case. Asking
for that sum costs nothing; `(a @ b).float()` rounds it to 16 bits first, and reads it again.
"""

import torch


def matmul_to(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in `dtype`; on a GPU fp32 comes straight from the kernel's sums."""
    if not a.is_cpu and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def scaled_matmul(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b): with beta 0 addmm does not read its first argument."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
