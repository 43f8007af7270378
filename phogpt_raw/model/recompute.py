"""Activation recomputation of norms and GELU: backward recomputes their outputs, none is saved.

A linear layer saves its input for the gradient of its adapter. Where that input is the output of a
norm or of a GELU, it need not be saved. The norm or the GELU saves its own input in any case, and
from that its output can be recomputed by reading and writing each value once, without a matrix
product. Of about 16 activations that a block saves, 6 are outputs of norms or of GELU.

torch.utils.checkpoint is the coarse form of the same idea: it recomputes a whole block from the
block's input. Both can be combined.

Of nested saved-tensor hooks torch calls only the innermost. A checkpoint is made of
such hooks too. Inside it, the hooks here would hide every tensor that they do not handle
themselves, and the checkpointed block would save them all. So they pass such a tensor on to the
hooks outside.
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

Saved = Callable[[], Tensor]  # saved in place of a tensor; called, it gives the tensor


@contextmanager
def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """Yields function(*inputs). Operations inside the context that would save this output for their
    backward save how to recompute it.

    `function` must be deterministic. The hooks recognise the output tensor and its views, as long
    as they are not changed in place. A copy or a cast of the output is another tensor, and is
    saved. If an input is changed in place before backward, backward raises a RuntimeError, as in
    plain autograd. Changing a norm's weight or bias raises too, since the norm's own backward needs
    them.
    """
    output = function(*inputs)
    # If the output needs no gradient, `function` saves no input, and there is nothing to gain.
    hooks = recompute_hooks(output, function, inputs) if output.requires_grad else nullcontext()
    del inputs  # this frame must not keep the inputs alive
    with hooks:
        yield output


def recompute_hooks(output: Tensor, function: Callable[..., Tensor],
                    inputs: tuple[Tensor, ...]) -> saved_tensors_hooks:
    """Hooks that save a Recomputation in place of `output`, which function(*inputs) has given."""
    save = current_save()
    recomputation = Recomputation(function, [save(x) for x in inputs])
    # Weak, because torch keeps `pack` alive as long as what it packed. The caller holds the output
    # during the context.
    output_ref, version = ref(output), version_of(output)

    def pack(tensor: Tensor) -> Saved:
        base = base_of(tensor)
        is_output = base is output_ref() and version_of(tensor) == version
        if is_output and tensor.dtype == base.dtype:
            return recomputation.save(tensor)
        return save(tensor)

    return saved_tensors_hooks(pack, call)


class Recomputation:
    """function(*inputs), computed when backward first needs it and freed after its last use:
    several operations may have saved the same output."""

    def __init__(self, function: Callable[..., Tensor], inputs: list[Saved]):
        self.function, self.inputs = function, inputs
        self.users = self.waiting = 0
        self.output = None

    def save(self, view: Tensor) -> Saved:
        """What an operation saves in place of `view`, the output or a view of it."""
        self.users += 1
        return partial(self.load, view.shape, view.stride(), view.storage_offset())

    def load(self, *geometry) -> Tensor:
        """The view with this shape, stride and offset of the recomputed output."""
        if self.output is None:
            with torch.no_grad():
                self.output = self.function(*(load() for load in self.inputs))
            self.waiting = self.users
        view = self.output.as_strided(*geometry)
        self.waiting -= 1
        if self.waiting == 0:
            self.output = None
        return view


def current_save() -> Callable[[Tensor], Saved]:
    """How to save a tensor here: by the hooks outside if there are any, else as autograd does."""
    outside = current_saved_tensor_hooks()
    if outside is None:
        return lambda tensor: partial(unchanged, tensor.detach(), version_of(tensor))
    pack, unpack = outside
    return lambda tensor: partial(unpack, pack(tensor))


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """`tensor`; raises autograd's RuntimeError if it was changed in place since `version`."""
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that backward needs was modified by an "
            f"inplace operation: it is at version {version_of(tensor)}, expected version {version}"
        )
    return tensor
