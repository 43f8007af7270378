"""Store many small parameters as views of a flat buffer, and their gradients as views of a second
buffer.

Clipping, the optimizer and an all-reduce then handle one tensor instead of hundreds. Parameters and
gradients are fp32. If the model computes in 16 bits, a third buffer holds a copy of the parameters
in that dtype. One cast then serves all layers and all micro-batches of a step.

The 16-bit copy is not updated automatically. Code that changes the parameters must call `cast`
afterwards: after loading, and after each optimizer step. The forward pass never casts.
"""

from collections.abc import Iterable

import torch
from torch import nn

ALIGNMENT = 256  # elements in a block of the 8-bit optimizer; no block spans two parameters


class FlatBuffer:
    """Moves `named_parameters` (fp32, on one device) into one buffer.

    flat: the buffer, one nn.Parameter, fp32 [N]. If `trainable`, flat.grad is allocated immediately
        and is zero. Each parameter's gradient is a view of flat.grad, and autograd adds to it. If
        not `trainable`, nothing requires a gradient, and flat.grad is None.
    compute: a copy of flat in `compute_dtype`, made by the last `cast`. It is None if
        `compute_dtype` is fp32. Each parameter's attribute `compute_copy` is a view of this copy.
    views: (name, fp32 view of flat) of each parameter, in order.
    count: the number of elements in all parameters, without the padding between them.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]],
                 compute_dtype: torch.dtype, trainable: bool = True):
        named = list(named_parameters)
        places, size = aligned_places([p for _, p in named])
        zeros = torch.zeros(size, device=named[0][1].device)
        self.flat = nn.Parameter(zeros, requires_grad=trainable)
        if trainable:
            self.flat.grad = torch.zeros_like(zeros)
        self.compute = None
        if compute_dtype != torch.float32:
            self.compute = torch.empty_like(zeros, dtype=compute_dtype)
        self.views = []
        for (name, p), place in zip(named, places, strict=True):
            view = self.flat.data[place].view_as(p)
            p.data = view.copy_(p.data)
            p.requires_grad_(trainable)
            if trainable:
                p.grad = self.flat.grad[place].view_as(p)
            if self.compute is not None:
                p.compute_copy = self.compute[place].view_as(p)
            self.views.append((name, view))
        self.count = sum(p.numel() for _, p in named)
        self.cast()

    def cast(self) -> None:
        """Copy `flat` to `compute`. Call this after every change of the parameters."""
        if self.compute is not None:
            self.compute.copy_(self.flat.detach())


def on_host(value):
    """A copy of a tensor in host memory. `value` can also be nested dicts and lists of tensors.

    A copy from a GPU goes to page-locked memory, which torch reuses for the next copy. It is
    asynchronous: it may still run when this function returns.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(on_host, value))
    return value


def aligned_places(tensors: list[torch.Tensor]) -> tuple[list[slice], int]:
    """The slice of each tensor in a flat buffer, and the size of the buffer, both in elements.

    >>> aligned_places([torch.empty(3, 5), torch.empty(300), torch.empty(1)])
    ([slice(0, 15, None), slice(256, 556, None), slice(768, 769, None)], 1024)
    """
    places, end = [], 0
    for tensor in tensors:
        places.append(slice(end, end + tensor.numel()))
        end += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
    return places, end
