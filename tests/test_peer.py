"""bench/peer.py gives both sides the same weights, model function, adapters and arithmetic."""


import pytest
import torch

from bench import command_line, peer, sides
from bench.random_data import random_rows
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import read_model
from phogpt_raw.refusal import Refusal

SHAPE = ModelConfig(64, 4, 2, vocab_size=96, max_seq_len=64)


@pytest.fixture
def folder(tmp_path):
    sides.write_random_checkpoint(tmp_path, SHAPE)
    return tmp_path


def ours(folder):
    return read_model(folder, nf4=False, dtype=torch.float32, device=torch.device("cpu"))


def test_both_compute_the_same_function(folder):
    from transformers import MptForCausalLM

    theirs = MptForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(random_rows(96, 2, 40, seed=3))
    mine = ours(folder)
    with torch.no_grad():
        # The tolerance is for fp32: the two blocks have sums of 64 and 256 terms, and the logits
        # have a size of 0.2.
        torch.testing.assert_close(mine.logits(mine(ids)), theirs(ids).logits, rtol=1e-5, atol=1e-6)


def test_the_weights_are_random_and_the_biases_zero(folder):
    named = dict(ours(folder).named_parameters())
    assert all(not p.any() for n, p in named.items() if n.endswith("bias"))
    weights = [p for n, p in named.items() if p.dim() == 2]
    assert len(weights) == 9 and all(0.015 < p.std() < 0.025 for p in weights)


def test_tokens_follow_from_the_seed_alone():
    assert random_rows(96, 2, 8, seed=1) == random_rows(96, 2, 8, seed=1)
    assert random_rows(96, 2, 8, seed=1) != random_rows(96, 2, 8, seed=2)


@pytest.mark.parametrize("rank", [4, 16])
def test_adapter_weights_are_counted_as_they_are_made(folder, rank):
    adapters = new_adapters(ours(folder), rank=rank, alpha=8)
    assert peer.adapter_weights(SHAPE, rank) == adapters.count


def test_a_ratio_is_the_median_over_pairs_and_not_of_medians():
    def found(step_s):
        return {"step_s": step_s, "allocated_gib": 1.0, "reserved_gib": 2.0}

    pairs = [{"peer": found(p), "ours": found(o), "eager": found(1.0)}
             for p, o in ((6.0, 1.0), (4.0, 2.0), (9.0, 3.0))]
    losses = {"captured": [1.0, 2.0], "eager": [1.0, 2.5], "peer": [1.25, 2.5]}
    found = peer.summary({"pairs": pairs, "losses": losses})
    assert found["ours_times_faster"] == 3.0
    assert (found["peer_step_s"], found["ours_step_s"]) == (6.0, 2.0)
    assert (found["captured_loss_apart"], found["peer_loss_apart"]) == (0.5, 0.25)


def test_a_side_out_of_memory_has_no_figure():
    full = {"out_of_memory": True}
    fits = {"step_s": 1.0, "allocated_gib": 1.0, "reserved_gib": 2.0}
    found = peer.summary({"pairs": [{"peer": full, "ours": fits, "eager": fits}],
                         "losses": {"captured": [1.0], "eager": [1.0], "peer": None}})
    assert "peer_step_s" not in found and "ours_times_faster" not in found
    assert found["ours_step_s"] == 1.0 and "peer_loss_apart" not in found


class Answering:
    """A stand-in for one side that records its orders.

    If `full` is true, it runs out of memory in every run with a memory cap.
    """

    def __init__(self, full=False):
        self.full, self.orders = full, []

    def run(self, **order):
        self.orders.append(order)
        if self.full and order["cap_gib"]:
            return {"out_of_memory": True}
        return {"losses": [1.0] * order["count"], "seconds": [2.0] * order["count"],
                "allocated_gib": 1.0, "reserved_gib": 2.0}


@pytest.mark.parametrize("full", [False, True])
def test_sides_take_turns_and_each_path_is_what_its_name_says(full):
    options = peer.parse(["--losses", "5", "--pairs", "2", "--steps", "3", "--warmup", "1"])
    ours, theirs = Answering(), Answering(full)
    row = peer.compare("2x64", {"ours": ours, "peer": theirs}, options, cap_gib=13.0)
    assert [(o["path"], o["count"]) for o in ours.orders] == [
        ("captured", 5), ("eager", 5), *[("captured", 4), ("eager", 4)] * 2]
    assert {o["cap_gib"] for o in ours.orders} == {13.0}  # our side always has the cap
    # the Trainer is tried with the memory cap; if it runs out of memory, it runs without a cap
    assert [(o["count"], o["cap_gib"]) for o in theirs.orders] == [
        (2, 13.0), *[(n, 0 if full else 13.0) for n in (5, 4, 4)]]
    assert row["peer_fits"] != full
    assert all((o["micro_batch"], o["seq_len"]) == (2, 64) for o in ours.orders + theirs.orders)
    assert [pair["ours"]["step_s"] for pair in row["pairs"]] == [2.0, 2.0]


def test_ours_begins_from_the_same_adapters_each_time(folder, monkeypatch):
    monkeypatch.setattr(sides, "now", lambda: 0.0)
    options = command_line.parse(command_line.parser(""), ["--measured", "--model", str(folder)])
    ours = sides.Ours(options)
    first, second = ([float(loss) for loss, _ in ours.steps(2, 24, 3, path="eager",
                                                            recompute="none")] for _ in range(2))
    assert first == second and len(set(first)) == 3


@pytest.mark.parametrize("flags, line", [
    (["--work", "512"], "--work 512: rows x tokens, such as 1x512,8x512"),
    (["--work", "1x512x2"], "--work 1x512x2: rows x tokens"), (["--work", ""], "--work: is empty"),
    (["--work", "0x512"], "--work 0x512: rows x tokens"),
    (["--recompute", "auto"], "--recompute auto: all, none or a number of blocks"),
])
def test_impossible_work_is_refused_before_any_is_done(flags, line):
    with pytest.raises(Refusal, match=line):
        peer.parse(flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("flags", [[], ["--model", "nano"]])
def test_what_it_cannot_do_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        peer.main(flags)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
