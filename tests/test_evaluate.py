"""The held-out loss per token, and the number of answers that the model itself ends."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ragged_examples

from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.data.packing import Packing
from phogpt_raw.data.prompt import Example, next_tokens
from phogpt_raw.decode.engine import answer
from phogpt_raw.training import evaluate as module
from phogpt_raw.training.evaluate import Score, evaluate, held_out_loss
from phogpt_raw.training.limits import Limits

PAD = 3


def test_loss_is_plain_cross_entropy_over_all_supervised_tokens(adapted):
    """The tolerance is for fp32: the losses of some hundred tokens are added in another order."""
    model, _ = adapted()
    examples = ragged_examples(7)
    losses = []
    for e in examples:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([e.ids])))[0, :-1]
        losses.append(F.cross_entropy(logits[-e.supervised :],
                                      torch.tensor(e.ids[-e.supervised :]), reduction="none"))
    expected = float(torch.cat(losses).mean())
    means = float(torch.stack([loss.mean() for loss in losses]).mean())
    assert abs(means - expected) > 1e-3  # the mean of the rows' mean losses would be wrong
    for micro_batch in (1, 2, 3, 7, 50):
        for chunk in (1, 1000):
            loss = held_out_loss(model, Window(examples, PAD), Limits(micro_batch, chunk))
            assert loss == pytest.approx(expected, rel=1e-6)


def test_packing_gives_the_same_loss(adapted):
    """In fp32 only the order of the sums differs."""
    model, _ = adapted()
    examples, limits = ragged_examples(7), Limits(1, 16)
    packed = Window(examples, PAD, Packing((64, 160), longest=64, most=16))
    assert len(packed.shapes(1)) < 7
    assert held_out_loss(model, packed, limits) == pytest.approx(
        held_out_loss(model, Window(examples, PAD), limits), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_model_as_it_was_and_without_gradients(adapted, training):
    model, adapters = adapted(dropout=0.5)
    model.train(training)
    one, other = (held_out_loss(model, Window(ragged_examples(4), PAD), Limits(2, 16))
                  for _ in range(2))
    assert one == other  # dropout is off
    assert model.training is training
    assert not adapters.flat.grad.any()


def evaluated(model, tokenizer, examples, micro_batch=1, **settings):
    config = Config(model="tiny", **settings)
    return evaluate(model, tokenizer, examples, config, Limits(micro_batch, 16))


def test_stops_counts_the_answers_that_end_by_themselves(lively, tokenizer):
    model, examples = lively, ragged_examples(9)
    settings = dict(micro_batch=1, eval_answers=6, answer_tokens=5)
    asked = [e.ids[: len(e.ids) - e.supervised] for e in examples[:6]]

    def alone():
        return [answer(model, [p], eos_id=2, pad_id=PAD, max_new_tokens=5)[0] for p in asked]

    with torch.no_grad():  # swaps </s> and a token of an answer in the head
        token = alone()[0].ids[3]
        model.head[[2, token]] = model.head[[token, 2]]
    alone = alone()
    stopped = sum(a.stopped for a in alone)
    assert 0 < stopped < 6
    score = evaluated(model, tokenizer, examples, **settings)
    assert score.stops == stopped / 6
    assert score.answers == [tokenizer.decode(a.ids).strip() for a in alone]
    assert score.val_loss == pytest.approx(
        held_out_loss(model, Window(examples, PAD), Limits(4, 16)), rel=1e-6)
    assert score.seconds > 0


@pytest.mark.parametrize("limit, rows", [(512, 3), (0, 1)])
def test_answers_are_written_together_as_far_as_their_cache_fits(lively, tokenizer, monkeypatch,
                                                                 limit, rows):
    seen, original = [], module.answer
    monkeypatch.setattr(module, "CACHE_MIB", limit)
    monkeypatch.setattr(module, "answer", lambda *a, **how: seen.append(how["rows"])
                        or original(*a, **how))
    evaluated(lively, tokenizer, ragged_examples(3), eval_answers=8, answer_tokens=2)
    assert seen == [rows]


def test_answers_can_be_left_out(adapted, tokenizer):
    model, _ = adapted()
    score = evaluated(model, tokenizer, ragged_examples(3), eval_answers=0)
    assert (score.stops, score.answers) == (None, [])
    assert score.val_loss > 0


def test_perplexity_is_the_exponential_and_never_overflows():
    assert Score(2.0, None, []).val_ppl == pytest.approx(math.exp(2))
    assert math.isfinite(Score(1e6, None, []).val_ppl)
    assert math.isnan(Score(math.nan, None, []).val_ppl)


def test_texts_have_a_loss_and_no_question_to_answer(adapted, tokenizer):
    """A {text} row has a loss from its second token on, and it has no question."""
    model, _ = adapted()
    asking = ragged_examples(2)
    text = Example(asking[0].ids, next_tokens(asking[0].ids, start=0), where="notes.txt:1")
    assert not text.asks and all(example.asks for example in asking)
    config, limits = Config(eval_answers=2, answer_tokens=3), Limits(2, 16)
    score = evaluate(model, tokenizer, [text, *asking], config, limits)
    alone = evaluate(model, tokenizer, asking, config, limits)
    assert score.answers == alone.answers and len(score.answers) == 2
    assert score.val_loss != alone.val_loss
    assert evaluate(model, tokenizer, [text], config, limits).stops is None
