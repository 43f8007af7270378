"""When a model is captured as CUDA graphs, and what happens if it cannot be captured.

These tests check only GraphedModel's bookkeeping, with stand-ins for graphs. test_gpu.py tests real
graphs.
"""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from phogpt_raw.data.packing import DocumentBounds
from phogpt_raw.training import graphs
from phogpt_raw.training.graphs import GraphedModel, why_not
from phogpt_raw.training.limits import Limits, retry_without_graphs

FULL = torch.OutOfMemoryError("CUDA out of memory")


class Twin(GraphedModel):
    """A GraphedModel that only records captures. Rows longer than `room` run out of memory."""

    def __init__(self, model, flat, room=10**9):
        super().__init__(model, flat, Limits(1, 16, graphs=True))
        self.room, self.tries = room, []

    def capture(self, ids_BL, doc_BL, how):
        self.tries.append((*ids_BL.shape, doc_BL is not None))
        return object() if ids_BL.shape[1] <= self.room else None


@pytest.fixture
def twin(adapted, monkeypatch):
    """A function that makes a Twin. The Twin records the eager runs and the replays."""
    def make(**settings):
        model, adapters = adapted()
        for name in ("MemPool", "Stream", "synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        made = Twin(model, adapters.flat, **settings)
        made.ran, made.replayed_shapes = [], []
        monkeypatch.setattr(
            made, "model", lambda ids, doc, **how: made.ran.append(tuple(ids.shape)))
        monkeypatch.setattr(made, "memory", nullcontext)
        monkeypatch.setattr(graphs.Replay, "apply",
                            lambda flat, _, ids, doc: made.replayed_shapes.append(tuple(ids.shape)))
        return made

    return make


def ids(rows, length):
    return torch.zeros(rows, length, dtype=torch.long)


def test_a_shape_runs_eagerly_once_and_then_as_graphs_made_once(twin):
    made = twin()
    for _ in range(3):
        made(ids(2, 64))
        made(ids(2, 96))
        made(ids(2, 64), ids(2, 64))  # documents count as another shape
    assert made.ran == [(2, 64), (2, 96), (2, 64)]
    assert made.tries == [(2, 64, False), (2, 96, False), (2, 64, True)]
    assert made.replayed_shapes == 2 * made.ran


def test_another_recompute_depth_is_another_graph(twin):
    made = twin()
    for depth in (0, 0, 2, 2, 0):
        made(ids(1, 64), recompute=depth)
    assert sorted(shape[-1] for shape in made.graphs) == [0, 2]
    assert len(made.ran) == 2 and len(made.replayed_shapes) == 3


def test_a_shape_with_too_few_micro_batches_to_come_is_not_captured(twin):
    made = twin()
    made.expected = Counter({(1, 64): 12, (1, 96): 11})
    for _ in range(4):
        made(ids(1, 64))
        made(ids(1, 96))
        made(ids(1, 32))  # a shape that is not in `expected`
    assert [shape[1] for shape in made.tries] == [64]
    assert made.replayed_shapes == 3 * [(1, 64)]


def test_other_bounds_of_documents_are_another_graph(twin):
    made = twin()
    for longest in (32, 64, 32, 64):
        made(ids(1, 64), ids(1, 64), bounds=DocumentBounds(4, longest))
    assert len(made.graphs) == 2 and len(made.ran) == 2


def test_a_shape_that_finds_no_room_stays_eager_without_another_try(twin):
    made = twin(room=64)
    for _ in range(4):
        made(ids(1, 96))
        made(ids(1, 64))
    assert made.tries == [(1, 96, False), (1, 64, False)]
    assert made.replayed_shapes == 3 * [(1, 64)] and made.ran.count((1, 96)) == 4


def test_beyond_so_many_shapes_none_is_captured(twin, monkeypatch):
    monkeypatch.setattr(graphs, "SHAPES", 2)
    made = twin()
    for _ in range(3):
        for length in (32, 64, 96):
            made(ids(1, length))
    assert [shape[1] for shape in made.tries] == [32, 64]
    assert made.ran.count((1, 96)) == 3


def test_without_graphs_it_is_the_model_and_allocates_as_the_model_does(twin, monkeypatch):
    made = twin()
    for _ in range(2):
        made(ids(1, 64))
    assert made.replayed_shapes == [(1, 64)]
    made.limits.graphs = False
    made.release()
    assert not made.graphs and made.pool is None
    made(ids(1, 64))
    made(ids(1, 96))
    assert made.replayed_shapes == [(1, 64)] and made.ran == [(1, 64), (1, 64), (1, 96)]
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda _: pytest.fail("its pool is gone"))
    with GraphedModel.memory(made):
        pass


@pytest.mark.parametrize("saved, peak", [([], 70), ([30], 100), ([30, 45], 115)])
def test_the_peak_of_a_step_counts_the_activations_of_its_replays(twin, monkeypatch, saved, peak):
    made = twin()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70)
    made.replayed = {graphs.Graphs(*[None] * 6, size) for size in saved}
    assert made.peak_bytes() == peak
    assert made.peak_bytes() == 70  # the next step has no replays yet
    captured = graphs.Graphs(*[None] * 6, 30)
    made.replayed, made.new = {captured}, {captured}
    assert made.peak_bytes() == 70  # torch counted the activations at capture
    made.replayed = {captured}
    assert made.peak_bytes() == 100


# -- when a capture is tried again


def tried_again(work, made, said):
    training = SimpleNamespace(limits=made.limits, forward=made)
    return retry_without_graphs(work, training, said.append)


def test_work_that_runs_out_of_memory_is_done_again_without_graphs_and_says_so(twin):
    made, said, calls = twin(), [], []

    def work(a, b):
        calls.append(made.limits.graphs)
        if made.limits.graphs and len(calls) > 1:
            raise FULL
        return a + b

    done = tried_again(work, made, said)
    assert done(1, 2) == 3 and said == []
    assert done(3, 4) == 7 and calls == [True, True, False]
    assert said == [
        "GPU memory is too full for CUDA graphs: continuing without them, as with --no-capture"]
    assert done(5, 6) == 11 and len(said) == 1


@pytest.mark.parametrize("has_graphs", [False, True])
def test_what_does_not_fit_without_graphs_either_is_an_error(twin, has_graphs):
    said, made = [], twin()
    made.limits.graphs = has_graphs

    def work():
        raise FULL

    with pytest.raises(torch.OutOfMemoryError):
        tried_again(work, made, said)()
    assert len(said) == has_graphs


def test_other_errors_are_not_tried_again(twin):
    made, calls = twin(), []

    def work():
        calls.append(1)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        tried_again(work, made, [])()
    assert made.limits.graphs and len(calls) == 1


def test_a_model_on_a_gpu_is_captured(adapted):
    assert why_not(adapted()[0], "cuda", True) is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_flag_that_says_no_is_the_first_reason(adapted, device, dropout):
    assert why_not(adapted(dropout=dropout)[0], device, False) == "--no-capture"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_there_are_no_graphs_on_the_cpu(adapted, dropout):
    assert why_not(adapted(dropout=dropout)[0], "cpu", True) == "there is no GPU"


def test_dropout_is_not_captured(adapted):
    """PEFT puts an nn.Dropout into each layer, or an Identity if the probability is 0."""
    model, _ = adapted(dropout=0.1)
    assert "dropout" in why_not(model, "cuda", True)
    assert "dropout" in why_not(model.eval(), "cuda", True)  # the model may be trained later
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    assert why_not(model, "cuda", True) is None
