"""Matrix products whose kernel also multiplies by a factor or changes the dtype.

The kernel of a 16-bit matrix product sums in fp32. It can write the fp32 sum at no extra cost.
`(a @ b).float()` rounds the sum to 16 bits first, and needs a second kernel.
"""

import torch


def matmul_to(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in `dtype`. On a GPU, an fp32 result is the kernel's own sum, never rounded to 16 bits.
    """
    if not a.is_cpu and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def scaled_matmul(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * (a @ b) in one kernel. With beta=0, addmm does not read its first argument."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
