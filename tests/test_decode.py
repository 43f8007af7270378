"""Answers through the cache are those of the full forward, alone and in a batch."""

import pytest
import torch

from phogpt_raw.decode import answer

NEVER, PAD = -1, 3  # an end that no argmax can be, where a test wants full length


def prompts(*lengths):
    dice = torch.Generator().manual_seed(0)
    return [torch.randint(4, 4096, (n,), generator=dice).tolist() for n in lengths]


def write(model, asked, *, eos_id=NEVER, max_new_tokens=12, **how):
    return answer(model, asked, eos_id=eos_id, pad_id=PAD, max_new_tokens=max_new_tokens, **how)


@torch.no_grad()
def without_cache(model, prompt, count):
    """The argmax of a full forward, taken again for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_no_token(lively):
    for prompt in prompts(1, 2, 9, 33):
        [written] = write(lively, [prompt])
        assert written.ids == without_cache(lively, prompt, 12)
        assert len(set(written.ids)) > 3  # not one token over and over, which anything could give
        assert not written.stopped


def test_a_batch_gives_each_the_answer_it_gets_alone(lively):
    asked = prompts(3, 17, 1, 8)
    together = write(lively, asked)
    assert together == [write(lively, [prompt])[0] for prompt in asked]
    assert len({tuple(a.ids) for a in together}) == 4


def test_an_answer_ends_at_the_end_token_and_says_so(lively):
    asked = prompts(3, 17)
    whole = write(lively, asked)
    end = whole[0].ids[5]
    assert end not in whole[1].ids
    first, second = write(lively, asked, eos_id=end)
    assert first.ids == whole[0].ids[: whole[0].ids.index(end)]
    assert first.stopped
    assert second == whole[1]  # a neighbour that ends disturbs no one


def test_nothing_is_computed_after_the_last_answer_has_ended(lively):
    [prompt] = prompts(4)
    end = write(lively, [prompt])[0].ids[2]
    calls = []
    lively.register_forward_hook(lambda *_: calls.append(1))
    write(lively, [prompt], eos_id=end, max_new_tokens=1000)
    assert len(calls) <= 3


def test_the_limit_cuts(lively):
    [prompt] = prompts(5)
    whole = write(lively, [prompt])[0].ids
    for limit in (1, 4):
        [written] = write(lively, [prompt], max_new_tokens=limit)
        assert (written.ids, written.stopped) == (whole[:limit], False)
    end = whole[3]
    first = whole.index(end)
    [written] = write(lively, [prompt], eos_id=end, max_new_tokens=first)
    assert (written.ids, written.stopped) == (whole[:first], False)
    [written] = write(lively, [prompt], eos_id=end, max_new_tokens=first + 1)
    assert (written.ids, written.stopped) == (whole[:first], True)


def test_tokens_are_told_one_by_one_as_they_are_written(lively):
    asked, streamed = prompts(3, 17), []
    first, _ = write(lively, asked, on_token=streamed.append)
    assert streamed == first.ids
    end, streamed = first.ids[5], []
    write(lively, asked, eos_id=end, on_token=streamed.append)
    assert streamed == first.ids[: first.ids.index(end)]  # the end itself is not


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(lively, training):
    lively.train(training)
    before = {name: p.clone() for name, p in lively.named_parameters()}
    write(lively, prompts(3))
    assert lively.training is training
    assert all(torch.equal(p, before[name]) for name, p in lively.named_parameters())


def test_dropout_is_off_while_writing(adapted):
    model, _ = adapted(dropout=0.9)
    assert model.training
    assert write(model, prompts(6)) == write(model, prompts(6))


def test_rows_that_fit_is_bytes():
    import doctest

    from phogpt_raw.model import cache

    assert doctest.testmod(cache).failed == 0
    assert cache.rows_that_fit(32, 4096, 10**6, 2, 512) == 1
