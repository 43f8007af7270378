"""The compute dtype of a GPU, and the check that this build of torch runs on it."""

import pytest
import torch

from phogpt_raw.cards import Card, runs_on, this_card, training_dtype
from phogpt_raw.refusal import Refusal
from phogpt_raw.simulate.rates import KNOWN, known, matmul_workspace

T4 = Card("Tesla T4", "cuda", (7, 5), 14.56)
V100 = Card("Tesla V100-SXM2-16GB", "cuda", (7, 0), 15.77)
A100 = Card("NVIDIA A100-SXM4-40GB", "cuda", (8, 0), 39.4)
L4 = Card("NVIDIA L4", "cuda", (8, 9), 22.0)
H200 = Card("NVIDIA H200", "cuda", (9, 0), 139.8)
CPU = Card("CPU", "cpu")


@pytest.mark.parametrize("card, dtype, reason", [
    (T4, torch.float16, "compute capability 7.5 has no bf16"),
    (V100, torch.float16, "compute capability 7.0 has no bf16"),
    (A100, torch.bfloat16, "compute capability 8.0 has bf16 in hardware"),
    (L4, torch.bfloat16, "compute capability 8.9 has bf16 in hardware"),
    (H200, torch.bfloat16, "compute capability 9.0 has bf16 in hardware"),
    (CPU, torch.float32, "CPU"),
])
def test_dtype_follows_the_compute_capability_with_a_reason(card, dtype, reason):
    chosen, said = training_dtype(card)
    assert chosen == dtype
    assert reason in said


@pytest.mark.parametrize("card", [T4, V100])
def test_emulated_bf16_is_refused_and_the_way_out_named(card):
    with pytest.raises(Refusal, match=r"which Tesla .* only emulates; give --dtype auto"):
        training_dtype(card, "bf16")


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(Refusal, match="fp32 or bf16"):
        training_dtype(CPU, "fp16")


@pytest.mark.parametrize("card, asked, dtype", [
    (T4, "fp16", torch.float16), (T4, "fp32", torch.float32), (A100, "fp16", torch.float16),
    (A100, "bf16", torch.bfloat16), (CPU, "bf16", torch.bfloat16), (CPU, "fp32", torch.float32),
])
def test_a_dtype_that_the_card_computes_in_is_taken_as_asked(card, asked, dtype):
    assert training_dtype(card, asked) == (dtype, "set by --dtype")


@pytest.mark.parametrize("built, arch, runs", [
    ("sm_75", "sm_70", False),      # the default build of torch on a V100
    ("compute_75", "sm_70", False),
    ("sm_70", "sm_70", True),
    ("sm_70", "sm_75", True),
    ("sm_80", "sm_86", True),
    ("sm_80", "sm_89", True),
    ("sm_86", "sm_80", False),      # machine code does not run on an older minor version
    ("sm_80", "sm_90", False),      # machine code does not run on a later generation
    ("compute_80", "sm_90", True),  # the driver can compile older PTX for a newer GPU
    ("compute_90", "sm_80", False),
    ("sm_90a", "sm_90", True),
    ("sm_100", "sm_120", False),
    ("compute_100", "sm_120", True),
])
def test_what_a_build_runs_on(built, arch, runs):
    assert runs_on(built, arch) is runs


def test_this_card_is_the_one_torch_sees():
    card = this_card()
    assert card.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (card.memory_gib > 0) == torch.cuda.is_available()


def test_a_card_that_this_build_cannot_run_on_is_refused_with_the_constraints_file(monkeypatch):
    class V100Properties:
        name, major, minor, total_memory = "Tesla V100-SXM2-16GB", 7, 0, 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: V100Properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_120"])
    with pytest.raises(Refusal, match=r"sm_70.*sm_75 sm_80 compute_120.*constraints-v100\.txt"):
        this_card()
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75"])
    assert this_card() == Card("Tesla V100-SXM2-16GB", "cuda", (7, 0), 16.0)


@pytest.mark.parametrize("name", ["t4", "T4", "h200"])
def test_a_known_card_is_found_in_small_and_capital_letters(name):
    assert known(name) is KNOWN[name.lower()]


def test_an_unknown_card_is_one_line_that_names_the_known():
    with pytest.raises(Refusal, match=r"^--card t5: choose from t4, v100, l4, a100, h200$"):
        known("t5")


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_card_has_rates_from_low_to_high_and_says_where_from(name):
    known = KNOWN[name]
    for rate in ("matmul", "attention", "bandwidth", "launch", "host"):
        low, high = getattr(known.rates, rate)
        assert 0 < low <= high, rate
    assert known.rates.source
    assert known.card.device == "cuda" and known.card.memory_gib > 0


def test_the_known_cards_are_those_that_a_run_would_see():
    """The GPUs T4, V100, L4, A100 and H200 in this test file have the properties of real GPUs."""
    assert [known.card for known in KNOWN.values()] == [T4, V100, L4, A100, H200]


@pytest.mark.parametrize("card, nbytes", [(T4, 8_519_680), (V100, 8_519_680), (A100, 8_519_680),
                                          (L4, 8_519_680), (H200, 32 * 2**20)])
def test_torch_takes_more_for_matmuls_on_hopper(card, nbytes):
    assert matmul_workspace(card) == nbytes
