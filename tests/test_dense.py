"""Decoding on a CPU with dequantised weights: equal results, and unchanged 4-bit weights."""

import pytest
import torch
from decoding import (
    filled,
    holds_the_same,
    reads_as_the_models_forward,
    switch_adapters_off,
)
from peft import LoraConfig

from phogpt_raw.decode import dense as module
from phogpt_raw.decode.dense import dense_step
from phogpt_raw.model.adapters import inject
from phogpt_raw.model.cache import Step
from phogpt_raw.model.weights import load_base


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "plain"])
@torch.no_grad()
def test_a_step_is_that_of_the_models_forward(adapted, nf4):
    model, _ = adapted(nf4=nf4)
    model.eval()
    mine, other = filled(model, rows=4), filled(model, rows=4)
    fast = dense_step(model, mine)
    ids_B = torch.tensor([5, 99, 1234])
    for _ in range(4):
        hidden = fast(ids_B, 18)
        wanted = model(ids_B[:, None], cache=Step(other, 3, 18))[:, 0]
        torch.testing.assert_close(hidden, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(fast.logits(hidden), model.logits(hidden))
        for cache in (mine, other):
            cache.place_B[:3] += 1
        ids_B = ids_B + 1
    holds_the_same(mine, other)


@torch.no_grad()
def test_an_adapter_that_is_switched_off_is_off(adapted):
    model, _ = adapted(nf4=True)
    model.eval()
    switch_adapters_off(model)
    mine, other = filled(model, rows=4), filled(model, rows=4)
    ids_B = torch.tensor([5, 99, 1234])
    wanted = model(ids_B[:, None], cache=Step(other, 3, 18))[:, 0]
    torch.testing.assert_close(dense_step(model, mine)(ids_B, 18), wanted, rtol=0, atol=2e-5 *
                               float(wanted.abs().max()))


def test_a_merged_adapter_keeps_the_models_forward(adapted):
    model, _ = adapted()
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    assert dense_step(model, model.new_cache(1, 8)) is None


@torch.no_grad()
def test_a_prompt_is_read_as_the_models_forward_reads_it(adapted):
    model, _ = adapted(nf4=True)
    model.eval()
    reads_as_the_models_forward(model, lambda cache: dense_step(model, cache))


def test_the_weights_stay_as_they_are(adapted):
    model, adapters = adapted(nf4=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flat = adapters.flat.detach().clone()
    assert dense_step(model.eval(), model.new_cache(1, 8)) is not None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(adapters.flat, flat)


def test_adapters_that_are_more_than_lora_and_large_models_keep_the_models_forward(
        adapted, tiny, monkeypatch):
    for lora in (dict(dropout=0.5), dict(targets=["Wqkv"])):
        model, _ = adapted(nf4=True, **lora)
        assert (dense_step(model, model.new_cache(1, 8)) is None) == ("dropout" in lora)
    model, _ = load_base(str(tiny))
    inject(model, LoraConfig(r=4, target_modules=["Wqkv"], use_dora=True))
    assert dense_step(model, model.new_cache(1, 8)) is None
    model, _ = load_base(str(tiny))
    assert dense_step(model, model.new_cache(1, 8)) is not None
    monkeypatch.setattr(module, "MOST", 1000)
    assert dense_step(model, model.new_cache(1, 8)) is None
