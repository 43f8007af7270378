"""Record the memory and the FLOPs of a training step on tensors without values, on any laptop.

This is not a second implementation of the step. The model that trains is built on torch's meta
device, and `train_step` itself runs on it. A dispatch mode records every operation, with the bytes
that it reads and writes. It also records when each storage is created and freed. If the step
changes, its trace changes too.

Two things differ from a GPU, but they do not change the memory peak. First, 32-bit AdamW is several
operations on the meta device, and one fused kernel on a GPU. Second, memory that a kernel allocates
only while it runs is not recorded. The caller must supply two facts about the GPU: its attention
kernels, and the size of the workspace that torch keeps for cuBLAS.

Meta tensors are used for the following reason: if torch is built without CUDA, fake tensors of the
device cuda abort the process.
"""

import weakref
from collections.abc import Iterable, Iterator, ValuesView
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend

from phogpt_raw import private_apis
from phogpt_raw.data.batches import Window
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.private_apis import TorchDispatchMode, flop_registry, schema_of, storage_key
from phogpt_raw.simulate.ledger import Op, Storage, Trace
from phogpt_raw.training.optim import paged_bytes
from phogpt_raw.training.step import Training, train_step

aten = torch.ops.aten
META = torch.device("meta")


class Kernels(NamedTuple):
    """The attention kernels that torch chooses on a card. bias: for attention with a bias. causal:
    for causal attention without a bias."""

    bias: SDPBackend
    causal: SDPBackend


class Recorder(TorchDispatchMode):
    """A dispatch mode that records all operations on meta tensors. kernels: the attention kernels
    of the card."""

    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.ops: list[Op] = []
        self.events: list[tuple[Storage, bool]] = []
        self.alive: dict[int, tuple[Storage, weakref.ref]] = {}
        self.phase, self.scopes = "before", []

    def mark(self, phase: str) -> None:
        self.phase = phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if private_apis.is_attention_choice(func):
            bias = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return (self.kernels.causal if bias is None else self.kernels.bias).value
        out = func(*args, **kwargs)
        made = list(tensors(out))
        for tensor in made:
            self.see(tensor)
        if not is_view(func):
            self.ops.append(Op(str(func), self.phase, flops(func, args, kwargs, out),
                               moved(func, args, kwargs, made)))
        return out

    def see(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Record a tensor's storage if it is new. kind: its purpose, one of ledger.KINDS."""
        whole = tensor.untyped_storage()
        key = storage_key(whole)
        if key in self.alive:
            self.alive[key][0].kind = self.alive[key][0].kind or kind
            return
        scope, inside = self.scopes[-1] if self.scopes else ("", [])
        storage = Storage(whole.nbytes(), len(self.ops), self.phase, scope, kind)
        inside.append(storage)
        self.events.append((storage, True))
        self.alive[key] = storage, weakref.ref(whole, partial(self.gone, key))

    def gone(self, key: int, _) -> None:
        storage, _ = self.alive.pop(key)
        storage.died = len(self.ops)
        self.events.append((storage, False))

    @contextmanager
    def following(self, modules: Iterable[tuple[str, torch.nn.Module]]):
        """A context that records new storages under the name of the module that runs.

        modules: (name, module) of each module that is followed.
        """

        def leave(*_):
            for storage in self.scopes.pop()[1]:
                storage.scope_end = len(self.ops)

        hooks = []
        for name, module in modules:
            enter = partial(self.enter, name)
            hooks += [module.register_forward_pre_hook(enter),
                      module.register_forward_hook(leave, always_call=True)]
        yield
        for hook in hooks:
            hook.remove()

    def enter(self, name: str, *_) -> None:
        self.scopes.append((name, []))


def tensors(found) -> Iterator[torch.Tensor]:
    """All tensors among an operation's arguments or results, including tensors in lists."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple, ValuesView)):
        for part in found:
            yield from tensors(part)


@cache
def is_view(func) -> bool:
    """Whether an operation runs no kernel, because it returns a view or uninitialised memory."""
    if func.is_view or func in NO_KERNEL or func.namespace == "profiler":
        return True
    returns = schema_of(func).returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)


NO_KERNEL = {private_apis.unsafe_view(), aten.empty.memory_format, aten.empty_like.default,
             aten.empty_strided.default, aten.new_empty.default, aten.detach.default}
PICKS = {aten.embedding.default, aten.gather.default, aten.index_select.default,
         aten.scatter_.src}
# In-place operations that write to a tensor without reading its old values.
OVERWRITES = {aten.copy_.default, aten.fill_.Scalar, aten.zero_.default}


def flops(func, args, kwargs, out) -> float:
    """FLOPs of an operation's matrix products. A multiplication and an addition are two FLOPs.

    The formulas are torch's. torch has no formula for addmm_, so the formula of addmm is used. The
    FLOPs of attention include every key that is given to a block of queries. Masked keys count too,
    because the kernels with a bias process them.
    """
    if private_apis.is_document_attention(func):
        return document_flops(func, args)
    known = aten.addmm if func is aten.addmm_.default else func.overloadpacket
    count = flop_registry.get(known)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def document_flops(func, args) -> float:
    """FLOPs of variable-length attention, times two.

    Forward has two matrix products, and backward has five. Each document counts as if it were as
    long as the longest one. The factor two comes from a measurement on an H100, for heads wider
    than 128. The memory-efficient kernel was slower in its variable-length form than with a bias:
    the time per key was 1.1 to 2.4 times the time per key with a bias. Masked keys were counted
    too.
    """
    named = dict(zip((a.name for a in schema_of(func).arguments), args, strict=False))
    tokens, heads, width = named["query"].shape[-3:]
    longest = named.get("max_seqlen_q", named.get("max_q"))
    products = 5 if "logsumexp" in named else 2
    return 2.0 * 2 * products * tokens * longest * heads * width


def moved(func, args, kwargs, made: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes, each tensor counted once."""
    if func in PICKS:  # only the picked rows of a large tensor are read and written
        return 2 * sum(map(touched, made if func is not aten.scatter_.src else [args[3]]))
    read = [*tensors(args), *tensors(kwargs.values())]
    if schema_of(func).is_mutable:  # the results of an in-place operation are among its arguments
        made = []
        written = [a for a, s in zip(args, schema_of(func).arguments, strict=False)
                   if s.is_write and isinstance(a, torch.Tensor)]
        read += [] if func in OVERWRITES else written
    return sum(map(touched, read + made))


def touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that a kernel reads or writes. An expanded dimension, which repeats the
    same bytes, counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def trace_step(training: Training, window: Window, kernels: Kernels) -> Trace:
    """Run a training step on the meta device, and return its trace.

    training: its model comes from base_on_meta and has adapters. kernels: the attention kernels of
    the card.
    """
    recorder, model = Recorder(kernels), training.model.train()
    name_residents(recorder, training)
    begun = len(recorder.events)
    with recorder, recorder.following(scopes(model)):
        train_step(training, window, recorder.mark)
    # The list of events is copied, because the recorder adds events when tensors are freed later.
    return Trace(recorder.ops, list(recorder.events), begun, paged_bytes(training.optimizer))


def scopes(model: PhoGPT) -> Iterable[tuple[str, torch.nn.Module]]:
    yield "model", model
    yield "embedding", model.transformer.wte
    for n, block in enumerate(model.transformer.blocks):
        yield f"block {n}", block
    yield "last norm", model.transformer.norm_f


def name_residents(recorder: Recorder, training: Training) -> None:
    """Record the purpose of each tensor that exists before the step. Paged optimizer states are
    left out, because torch's allocator does not manage them."""
    model, adapters = training.model, training.adapters
    for name, tensor in training.optimizer.state[adapters.flat].items():
        if isinstance(tensor, torch.Tensor) and name not in ("state1", "state2"):
            recorder.see(tensor, "optimizer state")
    for tensor, kind in ((adapters.flat, "adapters"), (adapters.flat.grad, "adapters' gradients"),
                         (adapters.compute, "adapters' copy")):
        if tensor is not None:
            recorder.see(tensor, kind)
    recorder.see(model.head, "embedding")
    recorder.see(model.slopes_H, "attention bias")
    for p in model.parameters():
        state = private_apis.nf4_state(p)
        if state is None:
            recorder.see(p, "plain weights" if p.dim() > 1 else "norms and biases")
            continue
        recorder.see(p, "NF4 weights")
        for tensor in private_apis.nf4_fields(state).tensors():
            recorder.see(tensor, "NF4 constants")
