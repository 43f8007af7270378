"""Answers with the key-value cache equal answers with full forwards, alone and in a batch."""

from itertools import islice

import pytest
import torch

from phogpt_raw.decode import engine as module
from phogpt_raw.decode.engine import Engine, answer, rows_that_fit
from phogpt_raw.decode.sampling import Needs, Sampling
from phogpt_raw.model.cache import Cache
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import load_base

NEVER, PAD = -1, 3  # NEVER: no token has this id, so an answer has full length


def prompts(*lengths):
    dice = torch.Generator().manual_seed(0)
    return [torch.randint(4, 4096, (n,), generator=dice).tolist() for n in lengths]


def write(model, asked, *, eos_id=NEVER, max_new_tokens=12, **how):
    return answer(model, asked, eos_id=eos_id, pad_id=PAD, max_new_tokens=max_new_tokens, **how)


@torch.no_grad()
def without_cache(model, prompt, count):
    """A greedy answer without a cache: each token is the argmax of a full forward."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
    return ids[len(prompt) :]


def test_the_cache_changes_no_token(lively):
    for prompt in prompts(1, 2, 9, 33):
        [written] = write(lively, [prompt])
        assert written.ids == without_cache(lively, prompt, 12)
        assert len(set(written.ids)) > 3  # one repeated token would prove nothing
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
    assert second == whole[1]  # a row that ends does not change the other rows


def test_nothing_is_computed_after_the_last_answer_has_ended(lively, monkeypatch):
    [prompt] = prompts(4)
    end = write(lively, [prompt])[0].ids[2]
    calls = []
    original = module.Engine.step
    monkeypatch.setattr(module.Engine, "step", lambda *a: calls.append(1) or original(*a))
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


def test_tokens_are_given_one_by_one_as_they_are_written(lively):
    asked, streamed = prompts(3, 17), []
    first, _ = write(lively, asked, on_token=streamed.append)
    assert streamed == first.ids
    end, streamed = first.ids[5], []
    write(lively, asked, eos_id=end, on_token=streamed.append)
    assert streamed == first.ids[: first.ids.index(end)]  # without the end token


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


# -- 200 tokens, adapters, rows that start and end at different times


@pytest.fixture(params=["adapter", "base"])
def long_model(request, adapted, tiny):
    """tiny in NF4, with an adapter that changes the answers, or without an adapter."""
    if request.param == "base":
        return load_base(str(tiny))[0].eval()
    model, adapters = adapted(nf4=True)
    with torch.no_grad():
        adapters.flat.normal_(std=0.1)
    adapters.cast()
    return model.eval()


def test_200_tokens_are_those_of_the_full_forward_whatever_comes_and_goes(long_model):
    """Five prompts of unequal length share three rows of the cache. Their answers have different
    lengths."""
    asked, most = prompts(5, 40, 1, 23, 11), [200, 30, 77, 5, 120]
    written = [[] for _ in asked]
    with Engine(long_model, eos_id=NEVER, pad_id=PAD, rows=3) as engine:
        for key, (prompt, count) in enumerate(zip(asked, most, strict=True)):
            engine.add(key, prompt, count)
        for token in engine.run():
            if token.id is not None:
                written[token.key].append(token.id)
        assert engine.steps <= 280  # one request at a time would need 432 steps
    for prompt, count, ids in zip(asked, most, written, strict=True):
        assert ids == without_cache(long_model, prompt, count)


@pytest.mark.parametrize("fast", [True, False], ids=["dense", "the model's forward"])
def test_a_cache_that_grows_and_a_prompt_in_pieces_change_no_token(long_model, fast, monkeypatch):
    asked = prompts(50, 3)
    wanted = [without_cache(long_model, prompt, 60) for prompt in asked]
    monkeypatch.setattr(module, "STEP", 8)
    monkeypatch.setattr(module, "AHEAD", 9)
    monkeypatch.setattr(module, "PREFILL", 16)
    if not fast:
        monkeypatch.setattr(module, "dense_step", lambda *_: None)
    with Engine(long_model, eos_id=NEVER, pad_id=PAD, rows=2) as engine:
        sizes, grow = [], Cache.grow
        monkeypatch.setattr(Cache, "grow", lambda *a: sizes.append(a[1]) or grow(*a))
        found = [a.ids for a in engine.answers(asked, 60)]
        assert len(sizes) > 4 and sizes == sorted(sizes) and 110 <= sizes[-1] < 130
    assert found == wanted


def test_the_4_bits_are_not_dequantised_again_for_each_token(adapted, monkeypatch):
    from bitsandbytes import functional

    model, _ = adapted(nf4=True)
    calls, original = [], functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit",
                        lambda *a, **k: calls.append(1) or original(*a, **k))
    counts = []
    for tokens in (3, 30):
        calls.clear()
        write(model, prompts(5), max_new_tokens=tokens)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_an_answer_that_is_dropped_writes_no_more_and_leaves_its_place(lively):
    asked = prompts(4, 9, 6)
    wanted = write(lively, asked, max_new_tokens=30)
    found = {key: [] for key in range(3)}
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=2) as engine:
        for key, prompt in enumerate(asked):
            engine.add(key, prompt, 30)
        for token in engine.run():
            if token.id is not None:
                found[token.key].append(token.id)
            if token.key == 0 and len(found[0]) == 5:
                engine.drop(0)
    assert found[0] == wanted[0].ids[:5]
    assert [found[1], found[2]] == [wanted[1].ids, wanted[2].ids]


def test_requests_may_come_while_others_are_answered(lively):
    first, second = prompts(4, 9)
    wanted = write(lively, [first, second], max_new_tokens=20)
    found = {0: [], 1: []}
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=4) as engine:
        engine.add(0, first, 20)
        for token in engine.run():
            if token.id is not None:
                found[token.key].append(token.id)
            if token.key == 0 and len(found[0]) == 7:
                engine.add(1, second, 20)
    assert [found[0], found[1]] == [a.ids for a in wanted]


def test_a_row_that_has_ended_stays_where_it_is(lively):
    """On a GPU the host reads tokens one step late. So an ended row takes part in one more step."""
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=2) as engine:
        engine.add(0, *prompts(4), 1)
        engine.add(1, *prompts(4), 9)
        engine.admit()
        engine.rows.append(engine.rows[0])  # row 1 has ended; row 0 replaces it
        places = []
        for _ in range(3):
            engine.step(2, Needs.of([]))
            places.append(engine.cache.place_B.tolist())
    assert [one for one, _ in places] == [5, 6, 7] and len({other for _, other in places}) == 1
    assert engine.ids_B is None


def test_who_stops_taking_tokens_may_take_the_rest_later(lively):
    asked = prompts(4, 9, 6)
    wanted = [a.ids for a in write(lively, asked, max_new_tokens=11)]
    found = {key: [] for key in range(3)}
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=2) as engine:
        for key, prompt in enumerate(asked):
            engine.add(key, prompt, 11)
        taken = True
        while taken:  # each run stops after three tokens
            taken = list(islice(engine.run(), 3))
            for token in taken:
                if token.id is not None:
                    found[token.key].append(token.id)
    assert list(found.values()) == wanted


def test_after_a_consumer_has_raised_the_next_answer_is_right(lively):
    first, second = prompts(4, 9)
    wanted = write(lively, [second], max_new_tokens=6)

    def fail(_):
        raise RuntimeError("the consumer")

    with Engine(lively, eos_id=NEVER, pad_id=PAD) as engine:
        with pytest.raises(RuntimeError, match="the consumer"):
            engine.answers([first, first], 10, on_token=fail)
        assert engine.answers([second], 6) == wanted
        engine.add(7, first, 3)
        with pytest.raises(ValueError, match="other requests are open"):
            engine.answers([second], 6)
    with engine:  # after it is entered again, the engine has no requests
        assert engine.answers([second], 6) == wanted


def test_a_request_that_waits_can_be_dropped(lively, monkeypatch):
    """A request can be dropped while it is in the queue and while the engine reads earlier prompts.
    """
    monkeypatch.setattr(module, "PREFILL", 16)
    asked = prompts(12, 14, 13)
    for rows in (1, 3):
        keys = []
        with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=rows) as engine:
            for key, prompt in enumerate(asked):
                engine.add(key, prompt, 6)
            for token in engine.run():
                if not keys:
                    engine.drop(1)
                keys.append(token.key)
        assert sorted(keys) == [0] * 7 + [2] * 7


def test_prompts_that_are_more_than_a_pass_holds_go_in_several(lively, monkeypatch):
    monkeypatch.setattr(module, "PREFILL", 30)
    seen = []
    original = module.Engine.prefill
    monkeypatch.setattr(module.Engine, "prefill", lambda self, group: seen.append(
        [len(row.prompt) for row in group]) or original(self, group))
    write(lively, prompts(10, 40, 12, 9, 14), max_new_tokens=2)
    assert seen == [[9, 10], [12, 14], [40]]


def test_requests_that_cannot_be_are_errors(lively):
    with pytest.raises(ValueError, match="0 rows"):
        Engine(lively, eos_id=NEVER, pad_id=PAD, rows=0)
    with Engine(lively, eos_id=NEVER, pad_id=PAD) as engine:
        with pytest.raises(ValueError, match="the prompt has 0 tokens"):
            engine.add(0, [], 5)
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            engine.add(0, [5], 0)
        engine.add(0, [5], 5)
        with pytest.raises(ValueError, match="request 0: this key is already in use"):
            engine.add(0, [6], 5)
        assert [token.key for token in engine.run()] == [0] * 6
        engine.add(0, [6], 1)  # request 0 has ended: its key is free


DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3)


def test_drawn_answers_repeat_and_are_the_same_alone_and_in_a_batch(lively):
    asked = prompts(3, 17, 1, 8)

    def draw(them, seed, **how):
        with Engine(lively, eos_id=NEVER, pad_id=PAD, **how) as engine:
            return [a.ids for a in engine.answers(them, 25, seed, DRAWN)]

    together = draw(asked, 7)
    assert draw(asked, 7) == together
    assert draw(asked, 7, rows=2) == together
    assert [draw([prompt], 7)[0] for prompt in asked] == together
    assert draw(asked, 8) != together
    assert together != [a.ids for a in write(lively, asked, max_new_tokens=25)]


def test_drawn_answers_of_any_lengths_and_seeds_are_those_alone(lively, monkeypatch):
    """Rows end at different times, and the cache grows. Moved rows keep their history and seed."""
    monkeypatch.setattr(module, "STEP", 8)
    monkeypatch.setattr(module, "AHEAD", 5)
    asked, most = prompts(3, 17, 1, 8, 8), [30, 4, 22, 9, 40]

    def draw(keys, rows):
        found = {key: [] for key in keys}
        with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=rows) as engine:
            for key in keys:
                engine.add(key, asked[key], most[key], 100 + key, DRAWN)
            for token in engine.run():
                if token.id is not None:
                    found[token.key].append(token.id)
        return found

    alone = {key: ids for n in range(5) for key, ids in draw([n], 1).items()}
    assert [len(alone[key]) for key in range(5)] == most
    assert draw(range(5), 5) == draw(range(5), 3) == alone


def test_rows_with_other_sampling_do_not_influence_each_other(lively, monkeypatch):
    """Rows begin and end at different times, while the cache and the history grow."""
    monkeypatch.setattr(module, "STEP", 8)
    monkeypatch.setattr(module, "AHEAD", 5)
    hows = [Sampling(), DRAWN, Sampling(0.7), Sampling(repetition_penalty=1.5),
            Sampling(1.0, top_k=3), Sampling(1.2, top_p=0.5), Sampling(1.0, min_p=0.2), Sampling()]
    asked, most = prompts(3, 17, 1, 8, 8, 5, 2, 30), [30, 4, 22, 9, 40, 3, 12, 25]

    def draw(keys, rows):
        found = {key: [] for key in keys}
        with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=rows) as engine:
            for key in keys:
                engine.add(key, asked[key], most[key], 100 + key, hows[key])
            for token in engine.run():
                if token.id is not None:
                    found[token.key].append(token.id)
        return found

    alone = {key: ids for n in range(8) for key, ids in draw([n], 1).items()}
    assert draw(range(8), 3) == draw(range(8), 8) == draw(range(7, -1, -1), 4) == alone


def test_a_conversation_reads_only_what_is_new(lively):
    """The prompt of each turn begins with the conversation so far.

    The answer equals the answer of a new engine to the whole prompt.
    """
    turns = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    read = []
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=1) as engine:
        conversation = []
        for turn in turns:
            conversation += turn
            engine.add(0, conversation, 6)
            read.append(len(conversation) - engine.known(conversation))
            ids = [token.id for token in engine.run() if token.id is not None]
            [alone] = write(lively, [conversation], max_new_tokens=6)
            assert ids == alone.ids
            conversation = conversation + ids
    assert read == [4, 2 + 1, 3 + 1]  # + 1: the last written token was not read yet


def test_another_conversation_is_read_from_where_it_differs(lively):
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=1) as engine:
        for prompt, known in (([5, 6, 7, 8], 0), ([5, 6, 9, 8], 2), ([5, 6, 9, 8], 3), ([4], 0),
                              ([5, 6, 9], 0)):
            engine.add(0, prompt, 5)
            assert engine.known(prompt) == known
            assert [t.id for t in engine.run()][:-1] == write(lively, [prompt],
                                                              max_new_tokens=5)[0].ids


def test_what_a_broken_off_prompt_has_overwritten_is_read_again(lively, monkeypatch):
    """Ctrl-C interrupts the reading of a second prompt. Then the first prompt is asked again."""
    first, second, forward = [5, 6, 7, 8, 9], [5, 9, 10, 11, 12, 13], lively.forward
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=1) as engine:
        engine.add(0, first, 5)
        wanted = [token.id for token in engine.run()]

        def broken_off(*how, **more):
            for cached in engine.cache.kv:
                cached[:, 0, :, 1:] = 7
            raise KeyboardInterrupt

        fast, engine.fast = engine.fast, None
        monkeypatch.setattr(lively, "forward", broken_off)
        engine.add(0, second, 5)
        with pytest.raises(KeyboardInterrupt):
            next(engine.run())
        engine.drop(0)
        engine.fast = fast
        monkeypatch.setattr(lively, "forward", forward)
        engine.add(0, first, 5)
        assert [token.id for token in engine.run()] == wanted


def test_a_dropped_answer_leaves_what_it_had_read(lively):
    with Engine(lively, eos_id=NEVER, pad_id=PAD, rows=1) as engine:
        engine.add(0, [5, 6, 7], 20)
        running = engine.run()
        ids = [next(running).id for _ in range(4)]
        engine.drop(0)
        prompt = [5, 6, 7, *ids, 9]
        assert engine.known(prompt) >= 3 + 3
        engine.add(0, prompt, 5)
        assert [t.id for t in engine.run()][:-1] == write(lively, [prompt], max_new_tokens=5)[0].ids


def test_what_was_written_is_penalised_and_what_stands_behind_a_row_is_not(lively):
    """transformers' processor, applied to exactly the tokens so far, chooses the tokens
    that the engine chooses."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty = RepetitionPenaltyLogitsProcessor(5.0)
    asked = prompts(3, 17)
    with Engine(lively, eos_id=NEVER, pad_id=PAD) as engine:
        found = [a.ids for a in engine.answers(asked, 12, sampling=Sampling(
            repetition_penalty=5.0))]
    for prompt, ids in zip(asked, found, strict=True):
        so_far = list(prompt)
        for token in ids:
            with torch.no_grad():
                logits = lively.logits(lively(torch.tensor([so_far]))[:, -1]).float()
            assert int(penalty(torch.tensor([so_far]), logits).argmax()) == token
            so_far.append(token)
    assert all(len(set(ids)) == len(ids) for ids in found)


def test_nothing_is_held_once_the_engine_is_left(lively):
    with Engine(lively, eos_id=NEVER, pad_id=PAD) as engine:
        engine.answers(prompts(3), 4)
        assert engine.cache is not None
    held = [name for name, value in vars(engine).items() if isinstance(value, torch.Tensor)]
    assert engine.cache is engine.fast is None and not engine.graphs and not held


def test_rows_that_fit_is_bytes():
    shape = ModelConfig(d_model=512, n_heads=8, n_layers=32, vocab_size=256, max_seq_len=64)
    row = 2 * 32 * 512 * 256 * 2
    assert rows_that_fit(shape, 200, 2, 4 * row // 2**20) == 4
    assert rows_that_fit(shape, 10**6, 2, 1) == 1
