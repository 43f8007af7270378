"""Activation recomputation of norms and GELU: backward recomputes their outputs.

A linear layer saves its input for the gradient of its adapter. If that input is the output of a
norm or of a GELU, it need not be saved. The norm or the GELU saves its own input in any case, and
its output can be recomputed from that input. The recomputation needs no matrix product: it reads
and writes each value once. Without this file, a block saves activations of about 16 times the
size of the hidden states [B, L, D]. The outputs of its norms and of its GELU are 6 of these 16:
1 for each of the two norms, and 4 for the GELU.

torch.utils.checkpoint applies the same idea to a whole block: it recomputes the block from the
block's input. The two methods can be combined.

If saved-tensor hooks are nested, torch calls only the innermost hooks. torch.utils.checkpoint uses
such hooks too. Inside a checkpointed block, the hooks of this file are the innermost hooks. If they
kept the tensors that they do not handle, the block would save all these tensors. So they pass each
such tensor to the outer hooks.
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

Saved = Callable[[], Tensor]  # a function that is saved in place of a tensor and returns the tensor


@contextmanager
def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Tensor]:
    """Yields the output, function(*inputs). If an operation inside the context saves the output for
    its backward, a function that recomputes the output is saved instead.

    `function` must be deterministic. The hooks recognise the output and its views, unless the
    output is changed in place. A copy or a cast of the output is another tensor, so it is saved as
    usual. If an input is changed in place before backward, backward raises a RuntimeError, as in
    plain autograd. Changing a norm's weight or bias raises this error too, because the norm's own
    backward needs the weight and the bias.
    """
    output = function(*inputs)
    # If the output needs no gradient, `function` itself saves no input. Recomputation would then
    # save an input in place of the output, and an input takes no less memory than the output.
    hooks = recompute_hooks(output, function, inputs) if output.requires_grad else nullcontext()
    del inputs  # this frame must not keep the inputs alive
    with hooks:
        yield output


def recompute_hooks(output: Tensor, function: Callable[..., Tensor],
                    inputs: tuple[Tensor, ...]) -> saved_tensors_hooks:
    """Saved-tensor hooks that save a Recomputation in place of `output`, which is the result of
    function(*inputs)."""
    save = current_save()
    recomputation = Recomputation(function, [save(x) for x in inputs])
    # A weak reference: torch keeps `pack` alive as long as the saved tensors, and `pack` must not
    # keep the output alive. During the context the caller holds the output.
    output_ref, version = ref(output), version_of(output)

    def pack(tensor: Tensor) -> Saved:
        base = base_of(tensor)
        is_output = base is output_ref() and version_of(tensor) == version
        if is_output and tensor.dtype == base.dtype:
            return recomputation.save(tensor)
        return save(tensor)

    return saved_tensors_hooks(pack, call)


class Recomputation:
    """The output function(*inputs), recomputed when backward first needs it.

    Several operations may have saved the same output. The output is freed after its last use.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Saved]):
        self.function, self.inputs = function, inputs
        self.users = self.waiting = 0
        self.output = None

    def save(self, view: Tensor) -> Saved:
        """The function that is saved in place of `view`, which is the output or a view of the
        output."""
        self.users += 1
        return partial(self.load, view.shape, view.stride(), view.storage_offset())

    def load(self, *geometry) -> Tensor:
        """A view of the recomputed output. geometry: shape, stride and storage offset of the view.
        """
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
    """A function that saves a tensor. The function uses the outer hooks. If there are no outer
    hooks, it saves the tensor as autograd does."""
    outside = current_saved_tensor_hooks()
    if outside is None:
        return lambda tensor: partial(unchanged, tensor.detach(), version_of(tensor))
    pack, unpack = outside
    return lambda tensor: partial(unpack, pack(tensor))


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """Returns `tensor`. Raises the same RuntimeError as autograd if the tensor's version is no
    longer `version`, which means that it was changed in place."""
    if version_of(tensor) != version:
        raise RuntimeError(
            f"a tensor of shape {list(tensor.shape)} that backward needs was modified by an "
            f"inplace operation: it is at version {version_of(tensor)}, expected version {version}"
        )
    return tensor
