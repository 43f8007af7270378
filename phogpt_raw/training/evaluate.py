"""Evaluate the adapters: the loss on held-out rows, and how many answers end by themselves."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.data.packing import Packing
from phogpt_raw.data.prompt import Example
from phogpt_raw.decode.engine import answer, evaluating, rows_that_fit
from phogpt_raw.model.nf4_product import MOST
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.training.limits import Limits
from phogpt_raw.training.loss import summed_loss

# MiB of the key-value cache. This limits how many answers are generated at once.
CACHE_MIB = 512


@dataclass(frozen=True)
class Score:
    """The result of an evaluation.

    val_loss: nats per supervised token. stops: the fraction of `answers` that the model ended by
    itself, with `</s>`; None if there are no answers. seconds: duration of the evaluation.
    """

    val_loss: float
    stops: float | None
    answers: list[str]
    seconds: float = 0.0

    @property
    def val_ppl(self) -> float:
        return perplexity(self.val_loss)


def perplexity(loss: float) -> float:
    """e^loss, for a loss in nats per token. A loss above 700 counts as 700, to avoid overflow."""
    return math.exp(min(loss, 700))


def evaluate(model: PhoGPT, tokenizer, examples: list[Example], config: Config, limits: Limits,
             packing: Packing | None = None,
             memory: Callable[[], AbstractContextManager] = nullcontext) -> Score:
    """Compute the loss on all examples, and greedy answers to the first --eval-answers questions.

    memory: a function that returns a context manager. Large tensors are allocated inside it.
    """
    started = time.perf_counter()
    with memory():
        loss = held_out_loss(model, Window(examples, tokenizer.pad_token_id, packing), limits)
    prompts = [e.prompt for e in examples if e.asks][: config.eval_answers]
    longest = max(map(len, prompts), default=0)
    rows = rows_that_fit(model.config, longest + config.answer_tokens, model.head.element_size(),
                         CACHE_MIB)
    written = answer(model, prompts, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                     max_new_tokens=config.answer_tokens, rows=min(rows, len(prompts), MOST),
                     capture=limits.graphs, memory=memory) if prompts else []
    stops = sum(a.stopped for a in written) / len(written) if written else None
    texts = [tokenizer.decode(a.ids).strip() for a in written]
    return Score(loss, stops, texts, time.perf_counter() - started)


def held_out_loss(model: PhoGPT, window: Window, limits: Limits) -> float:
    """The mean loss in nats per supervised token. Every token has the same weight, so a long answer
    has more weight than a short one."""
    device = model.head.device
    total = torch.zeros((), device=device)
    with evaluating(model):
        for batch in window.micro_batches(limits.micro_batch):
            batch = batch.to(device)
            hidden = model(batch.ids_BL, batch.doc_BL, bounds=batch.bounds)  # [B, L, D]
            hidden = hidden.flatten(0, 1).index_select(0, batch.rows_T)  # [T, D]
            total += summed_loss(hidden, model.head, batch.targets_T, limits.chunk_rows)
    return float(total) / window.supervised
