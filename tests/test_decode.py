"""bench/decode.py: the bytes that a decoding step reads, its two sides, bounds for other GPUs.

One side is this project's engine. The other side is transformers.
"""

import json
import re
import sys

import pytest
import torch
from rich.console import Console

from bench import compare, decode, decode_sides, products, report, results
from bench.sides import write_random_checkpoint
from phogpt_raw.model.adapters import new_adapters
from phogpt_raw.model.cache import cache_bytes
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig
from phogpt_raw.model.weights import load_base
from phogpt_raw.private_apis import nf4_fields, nf4_state

SHAPE = ModelConfig(128, 4, 2, vocab_size=4096, max_seq_len=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode") / "small"
    write_random_checkpoint(folder, SHAPE)
    return folder


def test_a_step_reads_the_weights_as_they_lie_in_memory(folder):
    """The expected size counts the 4-bit weights, their scales, the scales of these scales, the
    head and the adapter.

    Norms and biases are too small to matter.
    """
    model, _ = load_base(str(folder), dtype=torch.bfloat16, device="cpu")
    adapters = new_adapters(model, rank=4, alpha=8)
    size = 2 * model.head.numel() + 2 * adapters.count
    for p in model.parameters():
        state = nf4_state(p)
        if state is not None:
            fields = nf4_fields(state)
            size += p.numel() + fields.scales.numel() + 4 * fields.scale_scales.numel()
    assert decode.step_bytes(SHAPE, 4, rows=1, tokens=0) == pytest.approx(size, rel=1e-3)
    more = decode.step_bytes(SHAPE, 4, rows=3, tokens=50) - size
    assert more == pytest.approx(cache_bytes(2, 128, 3, 50, 2), rel=0.02)


def test_7b5_reads_five_and_a_half_gigabytes_a_token():
    assert decode.step_bytes(PUBLISHED["7b5"], 16, 1, 128) == pytest.approx(5.5e9, rel=0.02)


class Side:
    """A stand-in for one side of the benchmark: it returns fixed times without a GPU."""

    def __init__(self, step_s, full=False):
        self.step_s, self.full, self.orders = step_s, full, []

    def run(self, **order):
        self.orders.append(order)
        if self.full:
            return {"out_of_memory": True}
        return {"step_s": self.step_s, "tokens_per_s": order["rows"] / self.step_s,
                "first_s": 0.05, "allocated_gib": 5.5}


def test_sides_take_turns_and_are_held_against_the_bound(capsys):
    options = decode.parse(["--card", "t4"])
    sides = {"ours": Side(0.004), "transformers": Side(0.05)}
    ours, shipped, static = decode.turn(options, PUBLISHED["7b5"], sides, 128, 8, rate=3e12)
    assert ours["share_of_bound"] == pytest.approx(ours["bytes"] / 3e12 / 0.004)
    assert shipped["ours_times_faster"] == static["ours_times_faster"] == pytest.approx(12.5)
    assert [order.get("cache") for order in sides["transformers"].orders] == [None, "static"]
    sides["transformers"].full = True
    _, shipped, _ = decode.turn(options, PUBLISHED["7b5"], sides, 128, 8, rate=3e12)
    assert "ours_times_faster" not in shipped
    Console(width=80).print(report.decode([ours, shipped], "title"))
    said = capsys.readouterr().out
    assert "2,000.0" in said and "out of memory" in " ".join(said.split()) and "…" not in said


def test_cards_elsewhere_have_bounds_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--save"])
    decode.main(["--card", "t4,v100", "--batch", "1", "--save"])
    said = capsys.readouterr().out
    assert "at most, on Tesla T4" in said and re.search(r"128 +1 +5\.58 +39\.4 to 57\.3", said)
    t4, _ = sorted(tmp_path.iterdir())
    result = json.loads(t4.read_text())
    [row] = result["rows"]
    assert (result["what"], result["source"], row["who"]) == ("decode", "simulated", "bound")
    low, high = row["tokens_per_s"]
    assert low == pytest.approx(0.22e12 / row["bytes"]) and low < high
    decode.main(["--card", "t4", "--batch", "1", "--new", "64", "--save"])
    assert len(compare.decoding(all_settings=True)) == 5  # the second run has its own file and rows
    lines = compare.decoding()
    assert len(lines) == 4
    assert lines[2].startswith("| T4, simulated | 7B5 | 128 | 1 | bound | 39.4 to 57.3 |")


@pytest.mark.parametrize("flags, line", [
    (["--new", "1"], "argument --new: '1': must be a whole number from 2 to"),
    (["--peers", "vllm"], "--peers vllm: must be shipped, static"),
    (["--prompt", "2000"], "--prompt 2000 and --new 256: 7b5 reads at most 2048 tokens in all"),
    (["--prompt", "x"], "argument --prompt: 'x': must be a whole number from 1 to"),
    (["--card", "k80"], "--card k80: choose")])
def test_what_is_not_possible_is_refused_in_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--card", "t4", *flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith(f"error: {line}") and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_measuring_needs_a_gpu(capsys):
    for main in (products.main, lambda _: decode.measure(decode.parse([]))):
        with pytest.raises((SystemExit, decode.Refusal)):
            main([])


# -- on a GPU


@pytest.mark.gpu
def test_both_sides_write_what_they_are_asked_for(folder):
    pytest.importorskip("accelerate")
    ours = decode_sides.Ours(folder, torch.float16, 4)
    theirs = decode_sides.Transformers(folder, torch.float16, 4)
    for side in (ours, theirs):
        ends = side.run(prompt=9, rows=3, new=12)["ends"]
        assert len(ends) == 12 and ends == sorted(ends) and ends[0] > 0
        found = decode_sides.work(side, prompt=9, rows=3, new=12)
        assert found["first_s"] + 10 * found["step_s"] < 2 * found["whole_s"]
        assert found["tokens_per_s"] == pytest.approx(3 * 11 / (
            found["whole_s"] - found["first_s"]))
    assert ours.run(prompt=9, rows=3, new=4)["fused"] and ours.forward_s(20) > 0
    names = " ".join(ours.kernels(prompt=9, rows=1))
    assert "one_row" in names and "attend_kernel" in names


@pytest.mark.gpu
def test_both_sides_write_the_same_tokens(folder):
    """The weights have no biases, so transformers' MPT is the same model.

    Rounding may still change a token where two tokens are almost equally likely.
    """
    pytest.importorskip("accelerate")
    ours = decode_sides.Ours(folder, torch.float16, 4)
    theirs = decode_sides.Transformers(folder, torch.float16, 4)
    prompt = [list(range(10, 60))]
    mine = decode_sides.Engine(ours.model, eos_id=-1, pad_id=3, rows=1)
    with mine as engine:
        [answer] = engine.answers(prompt, 20)
    ids = torch.tensor(prompt, device="cuda")
    other = theirs.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                  do_sample=False, max_new_tokens=20, min_new_tokens=20,
                                  eos_token_id=None, pad_token_id=3)[0, 50:].tolist()
    assert sum(a == b for a, b in zip(answer.ids, other, strict=True)) >= 10
    assert answer.ids[0] == other[0]


@pytest.mark.gpu
def test_products_of_both_are_timed():
    [row] = products.measure(256, 512, [2], torch.float16)
    assert 0 < row["ours_s"] < 1e-3 and 0 < row["bitsandbytes_s"] < 1e-3
