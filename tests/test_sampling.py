"""The choice of the next token equals the choice of transformers. Its noise comes from a hash."""

import pytest
import torch

from phogpt_raw.decode import sampling as module
from phogpt_raw.decode.sampling import Needs, Sampling, filtered, gumbel, mixed, penalised


def longs(*values):
    return torch.tensor(values)


def choose(sampling, logits_BV, *, places=None, seed=0, history_BS=None):
    """Choose a token for each row with the same Sampling."""
    rows = len(logits_BV)
    values_PB = torch.tensor([sampling.values()] * rows).T
    place_B = torch.zeros(rows).long() if places is None else places
    return module.choose(logits_BV, values_PB, Needs.of([sampling]), history_BS, place_B,
                         torch.full((rows,), seed))


def test_greedy_is_the_likeliest():
    logits_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(Sampling(), logits_BV), logits_BV.argmax(-1))


def test_the_hash_is_splitmix64():
    """The hash gives the first values of the published generator for seed 0.

    The state of this generator after n steps is n times a constant.
    """
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
    """The test draws 20,000 times from five tokens.

    The count of each token must be within four standard deviations of its expected value.
    """
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    draws = 20_000
    logits_BV = probabilities.log().expand(draws, -1)
    chosen = choose(Sampling(temperature=1.0), logits_BV, places=torch.arange(draws), seed=11)
    for token, p in enumerate(probabilities.tolist()):
        count = int((chosen == token).sum())
        assert abs(count - draws * p) < 4 * (draws * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("how, kept", [
    (dict(top_k=2), {0, 1}), (dict(top_p=0.7), {0, 1}), (dict(min_p=0.25), {0, 1, 2}),
    (dict(top_k=4, min_p=0.1), {0, 1, 2, 3}), (dict(), {0, 1, 2, 3, 4})])
def test_only_what_the_filters_keep_is_drawn(how, kept):
    logits_BV = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02]).log().expand(3000, -1)
    chosen = choose(Sampling(temperature=1.0, **how), logits_BV, places=torch.arange(3000))
    assert set(chosen.tolist()) == kept


HOWS = [dict(top_k=7), dict(top_p=0.6), dict(min_p=0.2), dict(top_k=7, top_p=0.6),
        dict(top_k=12, top_p=0.9, min_p=0.1), dict(top_k=1), dict(top_k=10**6), dict(top_p=1e-9),
        dict(top_k=3, repetition_penalty=1.7), dict(min_p=1.0)]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_row_keeps_what_transformers_processors_keep(how):
    """The processors run in this order: penalty, temperature, top-k, top-p, min-p.

    Each processor sees only the tokens that the earlier ones have kept.
    """
    from transformers.generation import logits_process as hf

    dice = torch.Generator().manual_seed(1)
    logits_BV = 3 * torch.randn(20, 40, generator=dice)
    history_BS = torch.randint(0, 40, (20, 6), generator=dice)
    kinds = dict(repetition_penalty=hf.RepetitionPenaltyLogitsProcessor,
                 temperature=hf.TemperatureLogitsWarper, top_k=hf.TopKLogitsWarper,
                 top_p=hf.TopPLogitsWarper, min_p=hf.MinPLogitsWarper)
    wanted = logits_BV
    for name in kinds:
        if name in how or name == "temperature":
            wanted = kinds[name](how.get(name, 2.0))(history_BS, wanted)
    temperature_B, _, top_k_B, top_p_B, least_B, penalty_B = torch.tensor(
        [Sampling(temperature=2.0, **how).values()] * 20).T
    found = penalised(logits_BV, history_BS, penalty_B) / temperature_B[:, None]
    found = filtered(found, top_k_B, top_p_B, least_B)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rows_of_one_batch_have_their_own_values():
    dice = torch.Generator().manual_seed(2)
    logits_BV, place_B, seed_B = (3 * torch.randn(11, 40, generator=dice), torch.arange(11),
                                  torch.arange(11) + 5)
    history_BS = torch.randint(0, 40, (11, 6), generator=dice)
    hows = [Sampling(temperature=1.5, **how) for how in HOWS] + [Sampling()]
    alone = [module.choose(logits_BV[n : n + 1], torch.tensor([how.values()]).T, Needs.of([how]),
                           history_BS[n : n + 1], place_B[n : n + 1], seed_B[n : n + 1])
             for n, how in enumerate(hows)]
    together = module.choose(logits_BV, torch.tensor([how.values() for how in hows]).T,
                             Needs.of(hows), history_BS, place_B, seed_B)
    assert together.tolist() == torch.cat(alone).tolist()


def test_only_what_a_row_needs_is_computed():
    assert Needs.of([Sampling(), Sampling(top_k=5)]) == Needs(False, False, False)  # greedy rows
    assert Needs.of([Sampling(), Sampling(0.5)]) == Needs(False, True, False)
    assert Needs.of([Sampling(repetition_penalty=2), Sampling(0.5, top_p=0.9)]) == Needs(
        True, True, True)


def test_the_penalty_is_there_when_tokens_are_drawn():
    logits_BV = torch.tensor([[4.0, 3.9, 0.0]]).expand(4000, -1)
    found = choose(Sampling(temperature=1.0, repetition_penalty=4.0), logits_BV,
                   history_BS=torch.zeros(4000, 2).long(), places=torch.arange(4000))
    assert float((found == 0).float().mean()) == pytest.approx(0.0515, abs=0.015)


def test_a_temperature_that_makes_logits_infinite_is_greedy():
    logits_BV = torch.tensor([[1.0, 5.0, 3.0, -2.0]])
    for temperature in (1e-38, 1e-45, 1e-7):
        assert choose(Sampling(temperature=temperature), logits_BV).tolist() == [1]


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_nearly_even():
    logits_BV = torch.tensor([2.0, 1.0, 0.0]).expand(3000, -1)
    shares = []
    for temperature in (0.05, 1.0, 50.0):
        chosen = choose(Sampling(temperature=temperature), logits_BV, places=torch.arange(3000))
        shares.append(float((chosen == 0).float().mean()))
    assert shares[0] > 0.999 and shares[1] == pytest.approx(0.665, abs=0.03)
    assert shares[2] == pytest.approx(1 / 3, abs=0.04)


def test_the_penalty_takes_from_what_is_in_the_history_alone():
    logits_BV = torch.tensor([[4.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    chosen = choose(Sampling(repetition_penalty=2.0), logits_BV,
                    history_BS=torch.tensor([[0, 0], [2, 2]]))
    assert chosen.tolist() == [1, 0]
