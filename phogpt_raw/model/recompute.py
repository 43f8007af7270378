"""Made again in backward instead of kept: what is cheap to make from tensors that stay anyway.

A linear keeps its input for its adapter's gradient. Where that input is a norm's or a GELU's output
it need not: both keep their own input for their own backward, and give the output again from it for
a read and a write, with no matmul. In a block that is 6 of about 16 activations.

The surprise: of nested saved-tensor hooks torch calls only the innermost. Those of torch's
checkpoint, which stand outside a recomputed block, would no longer see what these let pass, and the
block would keep all of it; so what is not remade here is handed on to them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import call
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phogpt_raw.private_apis import base_of, current_saved_tensor_hooks, version_of

Kept = Callable[[], Tensor]  # what backward has instead of a tensor: called, it gives the tensor


@contextmanager
def remade(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """Gives function(*inputs); operations inside that would keep it keep how to make it again.

    `function` must be deterministic. The output is recognised as that very tensor or a view of it,
    not changed in place since; a copy (a cast) is another tensor and is kept. An input that was
    changed in place before backward raises as in autograd; a norm's weight and bias raise by
    themselves, its own backward needs them.
    """
    output = function(*inputs)
    # Without a gradient the function keeps no inputs either, so there is nothing to gain.
    hooks = remaking(output, function, inputs) if output.requires_grad else nullcontext()
    del inputs  # else they would stay where nothing keeps them: without gradients, in a checkpoint
    with hooks:
        yield output


def remaking(output: Tensor, function: Callable[..., Tensor], inputs) -> saved_tensors_hooks:
    """The hooks that see `output`, just made by function(*inputs), when an operation keeps it."""
    keep = keeper()
    recipe = Recipe(function, [keep(x) for x in inputs])
    # Weak: torch holds `pack` as long as what it packed. The caller holds the output meanwhile.
    this, version = ref(output), version_of(output)

    def pack(tensor: Tensor) -> Kept:
        whole = base_of(tensor)
        if whole is this() and version_of(tensor) == version and tensor.dtype == whole.dtype:
            return recipe.saver(tensor)
        return keep(tensor)

    return saved_tensors_hooks(pack, call)


class Recipe:
    """function(*inputs), made when the first of its savers asks for it, dropped after the last."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Kept]):
        self.function, self.inputs = function, inputs
        self.savers = self.to_come = 0
        self.output = None

    def saver(self, view: Tensor) -> Kept:
        """What an operation keeps instead of `view`, which is the output or a view of it."""
        self.savers += 1
        return partial(self.give, view.shape, view.stride(), view.storage_offset())

    def give(self, *geometry) -> Tensor:
        if self.output is None:
            with torch.no_grad():
                self.output = self.function(*(kept() for kept in self.inputs))
            self.to_come = self.savers
        view = self.output.as_strided(*geometry)
        self.to_come -= 1
        if self.to_come == 0:
            self.output = None
        return view


def keeper() -> Callable[[Tensor], Kept]:
    """How a tensor is kept: by the hooks further out, else as autograd itself does."""
    outer = current_saved_tensor_hooks()
    if outer is None:
        return lambda tensor: partial(unchanged, tensor.detach(), version_of(tensor))
    pack, unpack = outer
    return lambda tensor: partial(unpack, pack(tensor))


def unchanged(tensor: Tensor, version: int) -> Tensor:
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that backward needs was modified by an "
            f"inplace operation: it is at version {version_of(tensor)}, expected version {version}"
        )
    return tensor
