"""Matrix products that apply a factor or a change of dtype inside their kernel.

The kernel of a product of 16-bit matrices sums in fp32, and can write that sum at no extra cost.
`(a @ b).float()` would round it to 16 bits first, and needs a second kernel.
"""

import torch


def matmul_to(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in `dtype`; fp32 on a GPU is the kernel's own sum, not rounded in between."""
    if not a.is_cpu and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def scaled_matmul(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b) in one kernel: with beta 0 addmm does not read its first argument."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
