"""The number of blocks to recompute on a GPU, compared with a simulation of each number."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import example, ragged_examples
from torch.nn.attention import SDPBackend
from traces import on_meta, step_of

from phogpt_raw.cards import Card
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Stream, Window
from phogpt_raw.data.packing import choose_packing
from phogpt_raw.show.startcard import recompute_line
from phogpt_raw.simulate import fit as module
from phogpt_raw.simulate.fit import (
    Choice,
    attention_kernels,
    choose,
    largest,
    least_recompute,
    longest_rows,
    needed,
)
from phogpt_raw.simulate.rates import matmul_workspace

BLOCKS = 6
EFFICIENT, FLASH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION
CARD = Card("a card", "cuda", (7, 5), 100.0)
TINY, LARGE = replace(CARD, memory_gib=0.01), CARD


@pytest.fixture(scope="module")
def traces():
    """A simulated step, as a Trace, for each number of recomputed blocks, from 0 to all."""
    model, adapters = on_meta(BLOCKS)
    return [step_of(model, adapters, length=256, recompute=n) for n in range(BLOCKS + 1)]


@pytest.fixture
def no_answers(monkeypatch):
    """Reserve no memory for an evaluation.

    An evaluation would need much more memory than a step of a tiny model.
    """
    monkeypatch.setattr(module, "CACHE_MIB", 0)


def of(memory_gib: float) -> Card:
    return replace(CARD, memory_gib=memory_gib)


def test_the_peak_falls_along_a_straight_line_but_for_the_last_block(traces):
    peaks = [trace.replay(workspace=matmul_workspace(CARD)).peak_allocated for trace in traces]
    slope = (peaks[0] - peaks[-2]) / (BLOCKS - 1)
    assert slope > 0.04 * peaks[0]
    for n, peak in enumerate(peaks[:-1]):
        assert peak == pytest.approx(peaks[0] - n * slope, rel=0.01)
    assert peaks[-1] == pytest.approx(peaks[-2], rel=0.01)


def test_what_fits_is_not_recomputed_and_one_simulation_says_so(traces, no_answers):
    asked = []
    memory = needed(traces[0], CARD)
    found = least_recompute(lambda n: asked.append(n) or traces[n], BLOCKS, of(memory))
    assert found == Choice(0, BLOCKS, memory, None, memory)
    assert asked == [0]


@pytest.mark.parametrize("least", range(1, BLOCKS))
def test_as_few_blocks_as_fit_are_recomputed(traces, no_answers, least):
    need = [needed(trace, CARD) for trace in traces]
    memory = (need[least - 1] + need[least]) / 2
    assert least == min(n for n in range(BLOCKS + 1) if need[n] <= memory)
    asked = []
    chosen = least_recompute(lambda n: asked.append(n) or traces[n], BLOCKS, of(memory))
    assert asked == [0, BLOCKS - 1]  # the other numbers are computed from these two
    assert chosen.recompute == least
    assert chosen.gib == pytest.approx(need[least], abs=1e-5)
    assert (chosen.least, chosen.of) == (need[BLOCKS - 1], memory)


def test_a_card_of_exactly_the_least_gets_no_block_more_by_rounding(monkeypatch):
    """With these values, rounding makes (none - least) / slope slightly larger than 25."""
    none, least = 7.032436214336734, 0.6225875887122312
    monkeypatch.setattr(module, "needed", lambda gib, card: gib)
    assert least_recompute(lambda n: least if n else none, 26, of(least)).recompute == 25


def test_a_model_of_one_block_recomputes_it_or_nothing():
    model, adapters = on_meta(1)

    def run_step(recompute):
        return step_of(model, adapters, recompute=recompute)

    assert least_recompute(run_step, 1, LARGE).recompute == 0
    assert least_recompute(run_step, 1, TINY).recompute == 1


def test_where_an_evaluation_needs_most_what_is_chosen_fits_too(traces, monkeypatch):
    """If an evaluation needs the most memory, recomputing more blocks does not lower the peak any
    more. So more blocks than necessary may be recomputed, but never too few."""
    third = traces[2].replay(workspace=matmul_workspace(CARD)).peak_allocated
    monkeypatch.setattr(module, "CACHE_MIB", (third - traces[2].resident) / 2**20)
    need = [needed(trace, CARD) for trace in traces]
    assert need[2] == need[3] == need[5] < need[1]
    for memory in [need[5], *(sum(pair) / 2 for pair in pairwise(need[:3]))]:
        assert need[least_recompute(lambda n: traces[n], BLOCKS, of(memory)).recompute] <= memory


def test_where_nothing_fits_all_are_recomputed_and_it_says_what_helps(traces):
    chosen = least_recompute(lambda n: traces[n], BLOCKS, TINY)
    assert chosen.recompute == BLOCKS and chosen.gib > chosen.of
    assert recompute_line(chosen) == (
        f"6 of 6 blocks in backward (auto): {chosen.gib:.1f} of 0.0 GiB with margins, for 50% more "
        "arithmetic in the blocks; it may not fit: try a shorter --max-len or a smaller "
        "--micro-batch")


def test_in_words_it_says_how_many_and_the_margins():
    assert recompute_line(Choice(3, 6)) == "3 of 6 blocks in backward"
    assert recompute_line(Choice(0, 6, 8.04, None, 14.56)) == (
        "0 of 6 blocks in backward (auto): 8.0 of 14.6 GiB with margins")
    assert recompute_line(Choice(0, 6, 8.0, None, 14.56, auto=False)) == (
        "0 of 6 blocks in backward: 8.0 of 14.6 GiB with margins")
    half = recompute_line(Choice(3, 6, 8.0, 7.0, 14.56))
    assert re.search("for 25% more arithmetic in the blocks$", half)


def test_what_is_needed_is_the_peak_with_a_share_and_the_graphs_context_and_pages(traces):
    found, workspace = traces[0], matmul_workspace(CARD)
    peak = found.peak(workspace).allocated
    evaluating = found.resident + 512 * 2**20
    assert evaluating > peak  # because the model is small
    rest = (0.6 + 0.81) * 2**30 + found.pages
    assert needed(found, CARD) * 2**30 == pytest.approx(1.05 * evaluating + rest)
    gib = replace(found.events[-1][0], nbytes=2**30), True  # allocates 1 GiB more
    wide = replace(found, events=[*found.events, gib])
    assert needed(wide, CARD) * 2**30 == pytest.approx(
        1.05 * wide.peak(workspace).allocated + rest)


# -- the choice for a run


def asked_for(model, card, *, examples=None, **settings):
    """The choice for a run with these settings. By default its rows are not packed.

    The model's dtype is fp16, as on a GPU.
    """
    train = examples or ragged_examples(6)
    stand_in = SimpleNamespace(config=model.config, peft_config=model.peft_config,
                               head=torch.empty(0, dtype=torch.float16))
    config = Config(**{"packing": False, "batch_size": 4, **settings})
    job = SimpleNamespace(config=config, card=card, model=stand_in, planned=lambda: range(9),
                          examples=SimpleNamespace(train=train, held_out=[]),
                          stream=Stream(train, batch_size=config.batch_size, pad_id=3))
    return choose(job)


@pytest.mark.parametrize("recompute, blocks", [("none", 0), ("0", 0), ("1", 1), ("2", 2),
                                               ("all", 2)])
@pytest.mark.parametrize("card", [TINY, LARGE], ids=["tiny", "large"])
def test_what_is_asked_for_is_kept_whatever_the_card(adapted, monkeypatch, recompute, blocks, card):
    monkeypatch.delattr(module, "trace_step")
    model, _ = adapted(nf4=True)
    assert asked_for(model, card, recompute=recompute) == Choice(blocks, 2, auto=False)


def test_a_plan_says_what_the_asked_recomputation_needs(adapted, no_answers):
    model, _ = adapted(nf4=True)
    none, both = (asked_for(model, LARGE, recompute=n, dry_run=True) for n in ("none", "all"))
    assert (none.recompute, none.of, none.auto) == (0, LARGE.memory_gib, False)
    assert 0 < both.gib < none.gib == asked_for(model, LARGE).gib


def test_on_the_cpu_nothing_is_recomputed(adapted, monkeypatch):
    monkeypatch.delattr(module, "trace_step")
    model, _ = adapted(nf4=True)
    assert asked_for(model, Card("CPU", "cpu")) == Choice(0, 2)


@pytest.mark.parametrize("more", [dict(optimizer="adamw"), dict(loss_mib=4), dict(nf4=False)],
                         ids=str)
def test_what_the_run_is_asked_for_is_simulated(adapted, no_answers, more):
    """Each of these settings needs more memory than the plain run.

    The settings are 32-bit optimizer state, more logits at once, and 16-bit weights.
    """
    less = dict(loss_mib=1)
    plain = asked_for(adapted(nf4=True)[0], LARGE, **less).gib
    assert asked_for(adapted(nf4=more.get("nf4", True))[0], LARGE, **less | more).gib > plain


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
def test_the_card_decides(adapted, no_answers, nf4):
    model, _ = adapted(nf4=nf4)
    none = asked_for(model, LARGE, nf4=nf4)
    all_of_them = asked_for(model, TINY, nf4=nf4)
    assert (none.recompute, all_of_them.recompute) == (0, 2)
    memory = (none.gib + all_of_them.least) / 2
    assert asked_for(model, of(memory), nf4=nf4).recompute == 1


def test_two_calls_choose_alike_whatever_memory_is_free(adapted, monkeypatch, no_answers):
    def refuse(*_):
        raise AssertionError("how much is free differs from run to run")

    for name in ("mem_get_info", "memory_allocated", "memory_reserved", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    model, _ = adapted(nf4=True)
    memory = asked_for(model, TINY).least
    first, second = (asked_for(model, of(memory)) for _ in range(2))
    assert first == second and first.recompute == 1


def test_choosing_changes_neither_the_model_nor_random_generators(adapted):
    model, adapters = adapted(nf4=True)
    before, dice = adapters.flat.detach().clone(), torch.get_rng_state()
    asked_for(model, TINY)
    assert torch.equal(torch.get_rng_state(), dice)
    assert torch.equal(adapters.flat, before) and not adapters.flat.grad.any()
    assert model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("settings", [dict(rank=32), dict(dropout=0.1)], ids=str)
def test_the_adapters_are_those_of_the_model(adapted, no_answers, settings):
    """The model's own adapters count and not the flags, because an adapter may come from a folder.
    """
    plain, other = (asked_for(adapted(nf4=True, **lora)[0], LARGE).gib for lora in ({}, settings))
    assert other > plain


def test_a_longer_row_or_a_larger_micro_batch_needs_more(adapted, no_answers):
    model, _ = adapted(nf4=True)
    rows = [example([5] * n, 4, "row") for n in (20, 100, 30, 40)]
    need = [asked_for(model, LARGE, examples=rows[:count], micro_batch=size).gib
            for count, size in ((1, 1), (2, 1), (4, 1), (4, 2), (4, 4))]
    assert need[0] < need[1] == need[2] < need[3] < need[4]


def test_the_window_that_is_simulated_holds_the_longest_rows_and_of_these_the_longest_answers():
    examples = [example([5] * n, answer, "row")
                for n, answer in ((40, 3), (64, 9), (64, 2), (12, 11), (64, 5))]
    window = longest_rows(examples, 2)
    assert [tuple(b.ids_BL.shape) for b in window.micro_batches(2)] == [(2, 64)]
    assert (window.tokens, window.supervised) == (128, 14)
    assert longest_rows(examples, 99).tokens == sum(len(e.ids) for e in examples)


# -- the lengths of packed rows


SHORT = [example([5] * n, 4, f"row:{n}") for n in (20, 30, 40, 50, 60, 70)]


def test_rows_hold_a_whole_window_where_memory_allows(adapted, no_answers):
    model, _ = adapted(nf4=True)
    for card in (LARGE, Card("CPU", "cpu")):
        packing = asked_for(model, card, examples=SHORT, packing=True).packing
        stream = Stream(SHORT, batch_size=4, pad_id=3)
        most = max(sum(len(e.ids) for e in stream.picked(n)) for n in range(9))
        assert most <= packing.lengths[-1] < most + 16
        assert packing.longest == 80  # the longest example has 70 tokens


def test_rows_are_shorter_where_memory_is_short_before_anything_is_recomputed(adapted, no_answers):
    model, _ = adapted(nf4=True)
    whole = asked_for(model, LARGE, examples=SHORT, packing=True)
    one = asked_for(model, LARGE, examples=SHORT, packing=True, pack_len=70)
    assert one.gib < whole.gib
    between = asked_for(model, of((one.gib + whole.gib) / 2), examples=SHORT, packing=True)
    assert one.packing.lengths[-1] <= between.packing.lengths[-1] < whole.packing.lengths[-1]
    assert between.recompute == 0 and between.gib <= between.of
    tiny = asked_for(model, TINY, examples=SHORT, packing=True)
    assert tiny.packing.lengths[-1] == 80 and tiny.recompute == 2  # the longest example must fit


@pytest.mark.parametrize("card", [TINY, LARGE, Card("CPU", "cpu")], ids=lambda c: c.name)
def test_a_row_length_that_is_asked_for_is_kept(adapted, card):
    packing = asked_for(adapted(nf4=True)[0], card, examples=SHORT, packing=True,
                        pack_len=100).packing
    assert 80 <= packing.lengths[-1] <= 96


@pytest.mark.parametrize("asked, kept", [(54, 48), (64, 64), (79, 64), (20, 32)])
def test_a_row_length_is_rounded_down_where_the_longest_example_allows(adapted, asked, kept):
    rows = [example([5] * n, 4, f"row:{n}") for n in (17, 18, 19, 20, 17, 18, 19, 20)]
    packing = asked_for(adapted(nf4=True)[0], Card("CPU", "cpu"), examples=rows, packing=True,
                        batch_size=8, pack_len=asked).packing
    assert kept - 16 < packing.lengths[-1] <= kept


def test_a_longer_example_of_a_later_step_is_counted_too(adapted, no_answers):
    """The choice looks at a few steps only. A longer example in a later step must still fit."""
    model, _ = adapted(nf4=True)
    short = [example([5] * 20, 4, f"row:{n}") for n in range(40)]
    order = Stream(short, batch_size=1, pad_id=3).order(0)
    chosen = []
    for place in (0, -1):
        rows = list(short)
        rows[order[place]] = example([5] * 400, 4, "the long one")
        chosen.append(asked_for(model, LARGE, examples=rows, packing=True, batch_size=1))
    first, last = chosen
    assert first.packing.lengths[-1] == last.packing.lengths[-1] == 400
    assert first.gib == last.gib > asked_for(model, LARGE, examples=short, packing=True).gib


def test_the_packed_micro_batch_that_is_simulated_is_the_largest_of_the_run():
    windows = [SHORT[:3], SHORT[2:], SHORT[::2]]
    packing = choose_packing(windows, 70, 150)
    batches = [b for w in windows for b in Window(w, 3, packing).micro_batches(2)]
    [found] = largest(windows, packing, 2).micro_batches(2)
    assert found.ids_BL.numel() == max(b.ids_BL.numel() for b in batches)
    assert found.bounds in [b.bounds for b in batches]


@pytest.mark.parametrize("capability, kernel", [
    ((7, 0), (EFFICIENT, EFFICIENT)), ((7, 5), (EFFICIENT, EFFICIENT)),
    ((8, 9), (EFFICIENT, FLASH)), ((9, 0), (SDPBackend.CUDNN_ATTENTION, FLASH)),
    ((10, 0), (SDPBackend.CUDNN_ATTENTION, FLASH)), ((12, 0), (EFFICIENT, FLASH))])
def test_the_kernel_follows_the_capability(capability, kernel):
    card = replace(CARD, capability=capability)
    assert attention_kernels(card, torch.float16) == kernel
    assert attention_kernels(card, torch.float32) == (EFFICIENT, EFFICIENT)
