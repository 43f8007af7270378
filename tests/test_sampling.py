"""Choosing the next token: transformers' processors, and noise that is a hash."""

import pytest
import torch

from phogpt_raw.decode.sampling import Sampler, Sampling, gumbel, mixed


def longs(*values):
    return torch.tensor(values)


def choose(sampler, logits_BV, *, place=0, seed=0, history_BS=None):
    rows = len(logits_BV)
    place_B, seed_B = torch.full((rows,), place), torch.full((rows,), seed)
    return sampler.choose(logits_BV, history_BS, place_B, seed_B)


def test_greedy_is_the_likeliest():
    logits_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(Sampler(Sampling()), logits_BV), logits_BV.argmax(-1))


def test_the_hash_is_splitmix64():
    """The first values of the published generator from seed 0: its state after n steps is n times
    the constant."""
    golden = 0x9E3779B97F4A7C15
    states = [(n * golden) % 2**64 for n in range(3)]
    signed = longs(*(s - 2**64 if s >= 2**63 else s for s in states))
    found = [value % 2**64 for value in mixed(signed).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_noise_is_gumbels_and_no_value_is_infinite():
    noise = gumbel(longs(1, 2, 3, 4), longs(0, 5, 9, 1000), 250_880)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)  # Euler's constant
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, rel=0.01)
    assert float((noise < 0).float().mean()) == pytest.approx(0.3679, abs=0.002)  # 1 / e


def test_noise_differs_by_seed_place_and_token_and_repeats():
    noise = gumbel(longs(1, 2, 1), longs(3, 3, 4), 1000)
    assert torch.equal(noise, gumbel(longs(1, 2, 1), longs(3, 3, 4), 1000))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pair = torch.stack([noise[one], noise[other]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.1
    assert len(noise[0].unique()) > 990


def test_tokens_are_drawn_with_their_probabilities():
    """20,000 draws from five tokens: each count within four standard deviations."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    draws = 20_000
    logits_BV = probabilities.log().expand(draws, -1)
    sampler = Sampler(Sampling(temperature=1.0))
    chosen = sampler.choose(logits_BV, None, torch.arange(draws), torch.full((draws,), 11))
    for token, p in enumerate(probabilities.tolist()):
        count = int((chosen == token).sum())
        assert abs(count - draws * p) < 4 * (draws * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("how, kept", [
    (dict(top_k=2), {0, 1}), (dict(top_p=0.7), {0, 1}), (dict(min_p=0.25), {0, 1, 2}),
    (dict(top_k=4, min_p=0.1), {0, 1, 2, 3}), (dict(), {0, 1, 2, 3, 4})])
def test_only_what_the_filters_keep_is_drawn(how, kept):
    logits_BV = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02]).log().expand(3000, -1)
    sampler = Sampler(Sampling(temperature=1.0, **how))
    chosen = sampler.choose(logits_BV, None, torch.arange(3000), torch.zeros(3000).long())
    assert set(chosen.tolist()) == kept


@pytest.mark.parametrize("how", [dict(top_k=7), dict(top_p=0.6), dict(min_p=0.2)], ids=str)
def test_the_order_of_the_filters_is_transformers(how):
    """The temperature first: at 2 a filter by probability keeps others than at 1."""
    from transformers.generation import logits_process as hf

    logits_BV = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    kinds = dict(top_k=hf.TopKLogitsWarper, top_p=hf.TopPLogitsWarper, min_p=hf.MinPLogitsWarper)
    [(name, value)] = how.items()
    wanted = kinds[name](value)(None, hf.TemperatureLogitsWarper(2.0)(None, logits_BV))
    sampler = Sampler(Sampling(temperature=2.0, **how))
    found = sampler.choose(logits_BV.expand(4000, -1), None, torch.arange(4000),
                           torch.zeros(4000).long())
    assert set(found.tolist()) == set(wanted[0].isfinite().nonzero().flatten().tolist())


def test_the_penalty_is_there_when_tokens_are_drawn():
    logits_BV = torch.tensor([[4.0, 3.9, 0.0]]).expand(4000, -1)
    sampler = Sampler(Sampling(temperature=1.0, repetition_penalty=4.0))
    history = torch.zeros(4000, 2).long()
    found = sampler.choose(logits_BV, history, torch.arange(4000), torch.zeros(4000).long())
    assert float((found == 0).float().mean()) == pytest.approx(0.0515, abs=0.015)


def test_a_temperature_that_makes_logits_infinite_is_greedy():
    logits_BV = torch.tensor([[1.0, 5.0, 3.0, -2.0]])
    for temperature in (1e-38, 1e-45, 1e-7):
        assert choose(Sampler(Sampling(temperature=temperature)), logits_BV).tolist() == [1]


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_nearly_even():
    logits_BV = torch.tensor([2.0, 1.0, 0.0]).expand(3000, -1)
    shares = []
    for temperature in (0.05, 1.0, 50.0):
        sampler = Sampler(Sampling(temperature=temperature))
        chosen = sampler.choose(logits_BV, None, torch.arange(3000), torch.zeros(3000).long())
        shares.append(float((chosen == 0).float().mean()))
    assert shares[0] > 0.999 and shares[1] == pytest.approx(0.665, abs=0.03)
    assert shares[2] == pytest.approx(1 / 3, abs=0.04)


def test_the_penalty_takes_from_what_is_in_the_history_alone():
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    logits_BV = torch.tensor([[4.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    chosen = choose(sampler, logits_BV, history_BS=torch.tensor([[0, 0], [2, 2]]))
    assert sampler.needs_history and chosen.tolist() == [1, 0]
