"""Random weights: the seed determines them, they have the model's shapes, and tests can use them.
"""

import bitsandbytes as bnb
import pytest
import torch

from bench.random_data import random_base, random_tensors
from phogpt_raw.model.checkpoint_format import parameter_shapes
from phogpt_raw.model.phogpt import ModelConfig

SHAPE = ModelConfig(64, 4, 2, vocab_size=96, max_seq_len=64)


def test_the_values_follow_from_the_seed_alone():
    first, again, other = (dict(random_tensors(SHAPE, seed=seed, device="cpu"))
                           for seed in (1, 1, 2))
    assert {name: t.shape for name, t in first.items()} == parameter_shapes(SHAPE)
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, again[name]) and not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("zero_biases", [False, True])
def test_matrices_are_small_and_vectors_are_random_or_those_of_a_new_model(zero_biases):
    given = random_tensors(SHAPE, seed=0, device="cpu", dtype=torch.float32,
                           zero_biases=zero_biases)
    for name, tensor in given:
        if tensor.dim() == 2:
            assert abs(float(tensor.mean())) < 0.002 and 0.018 < float(tensor.std()) < 0.022, name
            continue
        mean = 0.0 if name.endswith("bias") else 1.0
        if zero_biases:
            assert (tensor == mean).all(), name
        else:
            assert (tensor != mean).all() and abs(float(tensor.mean()) - mean) < 0.1, name


def test_a_random_base_is_a_frozen_nf4_model():
    model = random_base(SHAPE, torch.float32, "cpu")
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 8 and all(isinstance(m, bnb.nn.Linear4bit) for m in linears)
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    expected = dict(random_tensors(SHAPE, seed=0, device="cpu"))
    assert torch.equal(model.head, expected["transformer.wte.weight"].float())
    logits = model.logits(model(torch.arange(40)[None]))
    assert logits.shape == (1, 40, 96) and logits.isfinite().all()
