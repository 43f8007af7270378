"""The trace of a step, compared with arithmetic by hand and with the real step on the CPU.

A trace is the list of the step's operations and of the memory that they allocate and free.

Shapes: N tokens, D in, O out, R rank, H heads, L queries, S keys, K head width, V vocabulary.
"""

import contextlib
import gc
import math
from dataclasses import replace
from itertools import pairwise

import bitsandbytes
import pytest
import torch
from conftest import ragged_examples
from torch import nn
from torch.nn.attention import SDPBackend
from traces import EFFICIENT, D, H, V, adapted_on_meta, empty, on_meta, recorded, step_of, traced

from phogpt_raw.data.batches import MicroBatch, Window
from phogpt_raw.model import phogpt
from phogpt_raw.model.attention import Bias, attend
from phogpt_raw.model.lora import lora_linear
from phogpt_raw.model.nf4 import nf4_linear
from phogpt_raw.simulate.allocator import Allocator
from phogpt_raw.simulate.ledger import KINDS, Storage, kind_of
from phogpt_raw.simulate.trace import META, Kernels, trace_step
from phogpt_raw.training.setup import wire

aten = torch.ops.aten
LINEARS = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]  # (in, out) of a block
WEIGHTS = 12 * D * D  # weights of a block's linear layers


def on_arrival(found):
    """(bytes alive by kind, saved bytes by block) at the start of backward."""
    moment = [m for m in found.moments() if m.phase == "forward"][-1]
    return moment.kinds, moment.blocks


def peak(found) -> int:
    return found.replay().peak_allocated


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# -- bytes by kind


def test_resident_bytes_are_what_arithmetic_says():
    rank = 33  # with this rank alignment leaves gaps between adapters
    found = traced(rank=rank)
    padded = 2 * sum(up(rank * d, 256) + up(o * rank, 256) for d, o in LINEARS)
    scales = [d * o // 64 for d, o in LINEARS]  # one 8-bit scale for 64 weights
    kinds, _ = on_arrival(found)
    ledger = {
        "NF4 weights": 2 * WEIGHTS // 2,
        # One 32-bit scale for 256 scales. Each weight matrix has an offset and two code tables.
        "NF4 constants": 2 * sum(n + 4 * math.ceil(n / 256) + 4 + 4 * 16 + 4 * 256 for n in scales),
        "embedding": 2 * V * D,
        "norms and biases": 2 * (2 * (4 * D + sum(o for _, o in LINEARS)) + 2 * D),
        "adapters": 4 * padded,
        "adapters' gradients": 4 * padded,
        "adapters' copy": 2 * padded,
        # Each of two moments has one 32-bit scale for 256 values, and a code table of 256 entries.
        "optimizer state": 2 * 4 * (padded // 256 + 256),
    }
    assert {kind: kinds[kind] for kind in ledger} == ledger
    assert found.resident == sum(ledger.values()) + 4 * H  # 4 * H: ALiBi's slopes
    assert found.pages == 2 * padded


def test_plain_weights_in_fp32_take_four_bytes_and_no_copy_of_the_adapters():
    kinds, _ = on_arrival(traced(nf4=False, dtype=torch.float32))
    assert kinds["plain weights"] == 2 * 4 * WEIGHTS
    assert kinds["embedding"] == 4 * V * D
    assert not {"NF4 weights", "NF4 constants", "adapters' copy"} & kinds.keys()


def test_adamw_has_two_32_bit_values_a_weight_and_no_pages():
    model, adapters = on_meta()
    found = step_of(model, adapters, optimizer="adamw")
    assert found.pages == 0
    # + 4: the number of steps so far
    assert on_arrival(found)[0]["optimizer state"] == 2 * 4 * adapters.flat.numel() + 4


@pytest.mark.parametrize("length", [96, 1024, 1100, 2048])
def test_the_bias_has_a_row_for_each_of_at_most_1024_queries(length):
    kinds, _ = on_arrival(traced(length=length))
    length = up(length, 32)  # rows are padded
    assert kinds["attention bias"] == 2 * H * min(length, 1024) * length + 4 * H


def saved_sizes(rank: int, rows: int, length: int) -> dict[str, int]:
    n = rows * length
    return dict(
        x=2 * n * D,
        narrow=2 * n * rank,  # x Aᵀ of one linear layer
        statistics=2 * 4 * n,  # a norm's mean and deviation
        attention=4 * rows * H * up(length, 32) + 16,  # log-sum-exp; 16: a seed and an offset
    )


@pytest.mark.parametrize("rank, rows, length", [(8, 1, 96), (4, 3, 64), (16, 2, 160)])
def test_saved_activations_are_what_arithmetic_says(rank, rows, length):
    _, saved = on_arrival(traced(rank=rank, rows=rows, length=length))
    size = saved_sizes(rank, rows, length)
    # A block saves 10 x: the output of qkv is 3, attention's output 1, the sum after it 1, the
    # output of up_proj 4, and the block's last sum 1.
    block = 10 * size["x"] + 4 * size["narrow"] + size["attention"]
    assert saved == {
        # Nothing below the first norm has a gradient, so the norm's output is saved and not
        # recomputed.
        "block 0": block + size["x"] + size["statistics"],
        "block 1": block + 2 * size["statistics"],
        "last norm": size["statistics"],
    }


def test_of_recomputed_blocks_only_their_inputs_are_kept():
    _, saved = on_arrival(traced(recompute=2))
    size = saved_sizes(8, 1, 96)
    assert saved == {
        "embedding": size["x"],  # the first block's input
        "block 0": size["x"] + 16,  # the second block's input; 16: attention's seed and offset
        "block 1": size["x"] + 16,  # the last norm's input; 16 as above
        "last norm": size["statistics"],
    }


def test_a_block_is_recomputed_in_backward_alone():
    assert not any("recomputed" in m.kinds for m in traced().moments())
    found = traced(recompute=1).moments()
    assert {m.phase for m in found if "recomputed" in m.kinds} == {"backward"}
    size = saved_sizes(8, 1, 96)
    assert max(m.kinds.get("recomputed", 0) for m in found) > 10 * size["x"]


# -- memory grows with the settings


@pytest.mark.parametrize("setting, values", [
    ("rows", [1, 2, 3, 4]), ("length", [20, 64, 96, 300, 1100, 2048]), ("rank", [1, 4, 8, 33, 64]),
    ("vocabulary", [512, 1024, 8192]), ("chunk", [8, 16, 64]), ("layers", [1, 2, 3]),
    ("recompute", [2, 1, 0]),
])
def test_memory_grows_with_every_setting(setting, values):
    """The allocator's rounding does not count, because it depends on the order of allocations."""
    # with this vocabulary the loss needs the most memory
    large = dict(vocabulary=8192) if setting == "chunk" else {}
    peaks = [max(m.allocated - m.kinds["rounding"] for m in traced(
        **large, **{setting: value}).moments()) for value in values]
    assert all(a <= b for a, b in pairwise(peaks))
    assert peaks[0] < peaks[-1]


# -- every byte has a kind


@pytest.mark.parametrize("settings", [dict(), dict(recompute=1, rows=2), dict(rows=2, length=1100),
                                      dict(nf4=False, optimizer="adamw"),
                                      dict(kernel=SDPBackend.CUDNN_ATTENTION)], ids=str)
def test_every_byte_alive_has_a_kind_at_every_moment(settings):
    found, workspace = traced(**settings), 8320 * 1024
    alive, most = {}, {}
    for n, (storage, taken) in enumerate(found.events):
        if taken:
            assert storage not in alive
            alive[storage] = storage.nbytes
        else:
            del alive[storage]
        if taken and n >= found.begun:
            most[storage.born] = max(most.get(storage.born, (0, 0)),
                                     (sum(alive.values()), len(alive)))
    moments = found.moments(workspace)
    assert [m.op for m in moments] == list(most)
    for moment in moments:
        assert moment.kinds.keys() <= set(KINDS)
        assert sum(moment.kinds.values()) == moment.allocated
        assert sum(moment.blocks.values()) == moment.kinds.get("saved activations", 0)
        held, count = most[moment.op]
        rounding = moment.kinds["rounding"]
        assert moment.allocated - rounding - workspace == held
        # Each block is rounded up by less than 512 bytes. A large block may also keep up to 1 MiB
        # that is not cut off. The limit has room for three such blocks.
        assert 0 <= rounding < 512 * count + 3 * 2**20
    assert found.peak(workspace).allocated == found.replay(workspace=workspace).peak_allocated


def test_a_step_gives_back_what_it_takes():
    found = traced(recompute=1)
    assert sum(s.nbytes if taken else -s.nbytes for s, taken in found.events) == found.resident
    without = Allocator()
    for storage, _ in found.events[:found.begun]:
        without.take(storage.nbytes)
    assert found.replay().allocated == without.allocated
    assert found.replay(workspace=2**25).allocated == without.allocated + 2**25


def test_a_plan_stays_as_it_is_when_its_model_goes():
    gc.disable()  # a garbage collection could free the recorder too early
    try:
        model, adapters = on_meta()
        found = step_of(model, adapters)
        events = len(found.events)
        del model, adapters
        assert len(found.events) == events
    finally:
        gc.enable()


def test_what_only_came_before_the_step_is_not_of_its_peak():
    found = traced()
    large = Storage(2**30, 0, "before", "")
    longer = replace(found, events=[(large, True), (large, False), *found.events],
                     begun=found.begun + 2)
    assert (longer.resident, peak(longer)) == (found.resident, peak(found))


def test_too_little_memory_is_an_error():
    found = traced()
    needed = found.replay().peak_reserved
    assert found.replay(limit=needed).peak_reserved == needed
    with pytest.raises(MemoryError):
        found.replay(limit=needed - 1)


def test_a_trace_leaves_nothing_behind_for_models_that_have_values(monkeypatch):
    """bitsandbytes keeps the code table of the device that quantises first, for all devices.

    So a trace on the meta device must not leave its code table, which has no values.
    """
    monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})
    traced()
    weight = torch.randn(64, 64)
    linear = nf4_linear(weight, torch.float32, "cpu")
    assert (linear(torch.eye(64)) - weight.T).abs().max() < 1


# -- the trace runs the real step


def test_what_is_no_longer_recomputed_shows(monkeypatch):
    before = on_arrival(traced())[1]
    monkeypatch.setattr(phogpt, "recomputed", lambda f, x: contextlib.nullcontext(f(x)))
    after = on_arrival(traced())[1]
    x = saved_sizes(8, 1, 96)["x"]
    assert after["block 1"] - before["block 1"] == 6 * x  # outputs: norms 2, GELU 4
    assert after["block 0"] - before["block 0"] == 5 * x  # the first norm's output is always saved


def test_one_more_tensor_kept_is_that_much_more_at_the_peak(monkeypatch):
    held, before = [], traced()

    def holding(*args):
        out = attend(*args)
        held.append(torch.empty_like(out))
        return out

    monkeypatch.setattr(phogpt, "attend", holding)
    after = traced()
    x = saved_sizes(8, 1, 96)["x"]
    assert x % 512 == 0 and peak(after) - peak(before) == 2 * x
    grown = after.peak().kinds["saved activations"] - before.peak().kinds["saved activations"]
    assert grown == 2 * x


def test_a_larger_chunk_of_logits_is_that_much_more_of_the_loss():
    most = [max(m.kinds.get("loss", 0) for m in traced(chunk=chunk, vocabulary=8192).moments())
            for chunk in (16, 32)]
    # 8 bytes for each logit (two fp32 values). For each row: its target, whether the target counts,
    # and the log-probability of the target in the previous chunk.
    assert most[1] - most[0] == 16 * (8 * 8192 + 8 + 1 + 4)


def test_the_attention_kernel_is_the_one_given():
    for kernel, name in ((EFFICIENT, "efficient"), (SDPBackend.CUDNN_ATTENTION, "cudnn")):
        names = [op.name for op in traced(kernel=kernel).ops if "attention" in op.name]
        assert len(names) == 4 and all(name in n for n in names)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
def test_on_the_cpu_the_step_does_and_holds_the_same(adapted, monkeypatch, nf4, recompute):
    """The recorder also runs on real values on the CPU.

    The recorder must find the same operations as on the meta device, and the same size and lifetime
    of each storage.
    """
    model, adapters = adapted(nf4=nf4)
    twin, its = adapted_on_meta(model.config, rank=4, dtype=torch.float32, nf4=nf4)
    window = Window(ragged_examples(3), pad_id=3)
    # A batch is copied to a GPU. On the CPU there is no copy, so the test makes one.
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: MicroBatch(
        *(t if t is None else t.to(device, copy=True) for t in vars(batch).values())))
    seen = []
    for both in ((model, adapters), (twin, its)):
        training = wire(*both, micro_batch=2, recompute=recompute)
        training.scaler = torch.amp.GradScaler("cpu", enabled=False)  # as on the meta device
        training.limits.chunk_rows = 16
        cpu = SDPBackend.FLASH_ATTENTION
        found = trace_step(training, window, Kernels(cpu, cpu))
        # clipping is left out: on a CPU torch clips with other operations
        ops = [op for op in found.ops if op.phase != "clip"]
        lives = [(s.nbytes, s.born, s.died, s.scope, kind_of(s), taken)
                 for s, taken in found.events[found.begun:]]
        seen.append((ops, lives))
    (ops, lives), (ops_on_meta, lives_on_meta) = seen
    assert len(ops) > 350 and ops == ops_on_meta
    assert len(lives) > 600 and lives == lives_on_meta


# -- FLOPs


def a_linear(kind: str):
    if kind == "nf4":
        return nf4_linear(empty(OUT, D), torch.float16, META, bias=nn.Parameter(empty(OUT)))
    return nn.Linear(D, OUT, dtype=torch.float16, device=META)


N, OUT, R = 70, 320, 8


@pytest.mark.parametrize("kind", ["nf4", "plain"])
def test_flops_of_a_linear_with_adapters(kind):
    linear = a_linear(kind).requires_grad_(False)
    x = empty(2, N // 2, D, requires_grad=True)
    A, B = (empty(*shape, dtype=torch.float32, requires_grad=True) for shape in ((R, D), (OUT, R)))
    out = []
    forward = recorded(lambda: out.append(lora_linear(x, linear, A, B, 2.0)))
    backward = recorded(lambda: out[0].backward(torch.empty_like(out[0])))
    base, adapter = 2 * N * OUT * D, 2 * N * R * (D + OUT)
    assert sum(op.flops for op in forward) == base + adapter
    assert sum(op.flops for op in backward) == base + 2 * adapter  # W is frozen


@pytest.mark.parametrize("kernel", [EFFICIENT, SDPBackend.CUDNN_ATTENTION], ids=lambda k: k.name)
@pytest.mark.parametrize("block", [None, 32])
def test_flops_of_attention(kernel, block):
    B, L, K = 2, 96, 32
    q, k, v = (empty(B, H, L, K, requires_grad=True) for _ in range(3))
    bias = Bias(empty(H, dtype=torch.float32), L, L, torch.float16, block=block)
    out = []
    forward = recorded(lambda: out.append(attend(q, k, v, bias, None)), kernel)
    backward = recorded(lambda: out[0].backward(torch.empty_like(out[0])), kernel)
    scores = B * H * (L * L if block is None else 32 * (32 + 64 + 96))  # the keys of each block
    assert sum(op.flops for op in forward) == 4 * K * scores
    assert sum(op.flops for op in backward) == 10 * K * scores  # backward computes the scores again


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_flops_of_a_step(recompute):
    rank, rows, length = 8, 2, 96
    found = traced(rank=rank, rows=rows, length=length, recompute=recompute)
    n, supervised = rows * length, 64  # 2 x 20 supervised rows, padded to 64
    adapters = sum(rank * (d + o) for d, o in LINEARS)
    attention = 4 * H * length * length * (D // H) * rows
    block = 2 * n * WEIGHTS + 2 * n * adapters + attention
    forward = 2 * block + 4 * supervised * V * D  # with the gradient of the loss
    backward = 2 * (2 * n * WEIGHTS + 4 * n * adapters + 2.5 * attention)
    backward -= 2 * n * 3 * D * D + 2 * n * rank * D  # the first linear's x has no gradient
    by_phase = {phase: sum(op.flops for op in found.ops if op.phase == phase)
                for phase in ("forward", "backward", "clip", "optimizer")}
    assert by_phase == dict(forward=forward, backward=backward + recompute * block, clip=0,
                            optimizer=0)


# -- bytes


def bytes_of(run) -> int:
    op, = recorded(run)
    return op.moved


def test_an_addition_in_place_reads_and_writes_its_sum():
    y, x, w = empty(N, OUT), empty(N, D), empty(D, OUT)
    assert bytes_of(lambda: y.addmm_(x, w)) == 2 * (2 * N * OUT + N * D + D * OUT)
    assert bytes_of(lambda: y.add_(y)) == 2 * 3 * N * OUT


def test_what_is_overwritten_is_not_read():
    y, x = empty(N, OUT), empty(N, OUT, dtype=torch.float32)
    assert bytes_of(lambda: y.copy_(x)) == (2 + 4) * N * OUT
    assert bytes_of(lambda: y.zero_()) == 2 * N * OUT
    assert bytes_of(lambda: y.fill_(1.0)) == 2 * N * OUT
    assert bytes_of(lambda: torch.exp(x, out=x)) == 2 * 4 * N * OUT
    assert bytes_of(lambda: torch.mm(empty(N, D), empty(D, OUT), out=y)) == 2 * (
        N * OUT + N * D + D * OUT)


def test_of_a_large_tensor_only_what_is_picked_counts():
    rows = torch.zeros(N, dtype=torch.int64, device=META)
    head, column = empty(V, D), rows[:, None]
    assert bytes_of(lambda: nn.functional.embedding(rows, head)) == 2 * 2 * N * D
    assert bytes_of(lambda: head.index_select(0, rows)) == 2 * 2 * N * D
    logits, picked = empty(N, V), empty(N, 1)
    assert bytes_of(lambda: logits.gather(1, column)) == 2 * 2 * N
    assert bytes_of(lambda: logits.scatter_(1, column, picked)) == 2 * 2 * N


def test_what_is_expanded_lies_in_memory_once():
    x, bias = empty(N, OUT), empty(OUT)
    assert bytes_of(lambda: x + bias.expand(N, OUT)) == 2 * (2 * N * OUT + OUT)


def test_views_and_empty_memory_are_no_operations():
    x = empty(2, N, D)
    assert recorded(lambda: [x.view(-1, D).t()[3:], x.detach(), torch.empty_like(x),
                             x.transpose(0, 1), x.expand(2, N, D), x.new_empty(3)]) == []


def test_every_operation_of_a_step_reads_or_writes():
    assert all(op.moved > 0 for op in traced(recompute=1).ops)
