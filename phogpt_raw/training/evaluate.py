"""What the adapters are worth: loss on held-out rows, and whether answers stop by themselves."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from phogpt_raw.config import Config
from phogpt_raw.data.batches import make_window
from phogpt_raw.data.prompt import Example
from phogpt_raw.decode import answer, evaluating
from phogpt_raw.model.cache import rows_that_fit
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.training.loss import batch_loss, chunk_rows

CACHE_MIB = 512  # answers are written together as far as their keys and values fit into this


@dataclass(frozen=True)
class Score:
    """val_loss: nats a supervised token; stops: share of `answers` that end by themselves."""

    val_loss: float
    stops: float | None
    answers: list[str]

    @property
    def val_ppl(self) -> float:
        return math.exp(min(self.val_loss, 700))


def held_out_loss(model: PhoGPT, examples: list[Example], *, micro_batch: int, pad_id: int,
                  chunk: int) -> float:
    """Mean loss in nats over all supervised tokens: long answers weigh by their length."""
    window = make_window(examples, micro_batch, pad_id)
    total = torch.zeros((), device=model.head.device)
    with evaluating(model):
        for batch in window.batches:
            total += batch_loss(model, batch.to(model.head.device), chunk)
    return float(total) / window.supervised


class Evaluation:
    """A run's look at its held-out rows; calling it gives a Score, or None where there are none.

    `memory` gives a context to allocate in, such as that of a captured model.
    """

    def __init__(self, model: PhoGPT, tokenizer, examples: list[Example], config: Config,
                 memory: Callable = nullcontext):
        self.model, self.tokenizer, self.examples, self.config = model, tokenizer, examples, config
        self.memory = memory

    def __call__(self) -> Score | None:
        if not self.examples:
            return None
        with self.memory():
            return self.score()

    def score(self) -> Score:
        config, tokenizer = self.config, self.tokenizer
        loss = held_out_loss(
            self.model, self.examples, micro_batch=config.micro_batch,
            pad_id=tokenizer.pad_token_id,
            chunk=chunk_rows(self.model.config.vocab_size, config.loss_mib),
        )
        prompts = [e.ids[: len(e.ids) - e.answer] for e in self.examples[: config.eval_answers]]
        written = []
        shape, longest = self.model.config, max(map(len, prompts), default=0)
        rows = rows_that_fit(shape.n_layers, shape.d_model, longest + config.answer_tokens,
                             self.model.head.element_size(), CACHE_MIB)
        for start in range(0, len(prompts), rows):
            written += answer(self.model, prompts[start : start + rows],
                              eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                              max_new_tokens=config.answer_tokens)
        stops = sum(a.stopped for a in written) / len(written) if written else None
        texts = [tokenizer.decode(a.ids).strip() for a in written]
        return Score(loss, stops, texts)
