"""The exporter reads two models one block at a time and computes the distance between them.

This distance equals the distance between the two models if both are loaded completely.
"""

import checkpoints
import pytest
import torch

from phogpt_raw.export.distance import Distance, distance
from phogpt_raw.export.merge import Merger, mapped_tensors, write_merged
from phogpt_raw.model.adapters import load_adapters
from phogpt_raw.model.weights import NANO, load_base

CPU = torch.device("cpu")


@torch.no_grad()
def test_it_is_that_of_the_two_models_loaded(first_command, tmp_path, monkeypatch):
    monkeypatch.setattr("phogpt_raw.export.distance.ROWS", 1000)  # splits the head into five parts
    merger = Merger(NANO, first_command)
    write_merged(merger, tmp_path / "merged", torch.bfloat16, "nano")
    dice = torch.Generator().manual_seed(0)
    texts = [torch.randint(4, 4096, (n,), generator=dice).tolist() for n in (10, 50, 25)]
    found = distance(merger, mapped_tensors(tmp_path / "merged"), texts, CPU)

    one, _ = load_base("nano", device="cpu")
    load_adapters(one, first_command, trainable=False)
    other, _ = load_base(str(tmp_path / "merged"), nf4=False, device="cpu")
    one_TV, other_TV = (torch.cat([model.eval().logits(model(torch.tensor([text[:32]])))[0]
                                   for text in texts]) for model in (one, other))
    assert found.tokens == 10 + 32 + 25
    assert found.same == pytest.approx(
        float((one_TV.argmax(1) == other_TV.argmax(1)).float().mean()), abs=0.016)
    assert found.largest == pytest.approx(float((one_TV - other_TV).abs().max()), rel=1e-3)
    p = one_TV.softmax(1)
    nats = float((p * (one_TV.log_softmax(1) - other_TV.log_softmax(1))).sum(1).mean())
    assert found.divergence == pytest.approx(nats, rel=1e-3)
    # the texts are random, so no next token is likely, and the most likely token often changes
    assert 0 < found.divergence < 0.2 and found.same > 0.6


def test_a_checkpoint_of_the_rounded_weights_has_none(first_command, monkeypatch):
    """Both models have the same rounded weights, so only the rounding of sums can differ."""
    from phogpt_raw.export import distance as module

    merger = Merger(NANO, first_command)
    rounded = {name: module.over_nf4(merger, CPU, name) for name in merger.tensors}
    found = distance(merger, rounded, [[5, 6, 7, 8]], CPU)
    assert found == Distance(4, 1.0, pytest.approx(0, abs=1e-6), 0.0)


def test_over_plain_weights_it_is_the_rounding_to_the_dtype_alone(first_command):
    merger = Merger(NANO, first_command)
    same = {name: merger.merged(name) for name in merger.tensors}
    assert distance(merger, same, [[5, 6, 7, 8]], CPU, nf4=False) == Distance(
        4, 1.0, pytest.approx(0, abs=1e-6), 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_difference_may_have_either_sign(first_command, monkeypatch, sign):
    logits = torch.zeros(4, 2), sign * torch.tensor([[0.0, 3.0]]).expand(4, 2)
    monkeypatch.setattr("phogpt_raw.export.distance.both_heads", lambda *_: logits)
    merger = Merger(NANO, first_command)
    assert distance(merger, merger.tensors, [[5, 6, 7, 8]], CPU, nf4=False).largest == 3


@torch.no_grad()
def test_the_configs_own_values_count(tmp_path):
    """The config changes the norms' epsilon and ALiBi's slopes."""
    from phogpt_raw.export.distance import final_states

    config = checkpoints.vinai_config(
        d_model=64, n_heads=4, n_layers=2, vocab_size=4096, max_seq_len=64,
        layer_norm_epsilon=0.5, attn_config={"alibi_bias_max": 2})
    checkpoints.write_checkpoint(tmp_path / "base", config, dtype=torch.float32)
    model, _ = load_base(str(tmp_path / "base"), nf4=False, device="cpu")
    tensors = mapped_tensors(tmp_path / "base")
    ids = torch.randint(4, 4096, (1, 30), generator=torch.Generator().manual_seed(0))
    found = final_states(model.config, tensors.__getitem__, ids, CPU)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-5)
