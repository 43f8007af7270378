"""Estimate the duration of a run for --dry-run, on a GPU whose rates are known."""

from dataclasses import dataclass

import torch

from phogpt_raw.cards import Card
from phogpt_raw.data.batches import Window
from phogpt_raw.simulate.fit import Choice, simulated
from phogpt_raw.simulate.rates import KNOWN, Rates
from phogpt_raw.simulate.roofline import step_seconds
from phogpt_raw.training.setup import Job


@dataclass(frozen=True)
class Duration:
    """Seconds of a step with the median number of tokens. Evaluations and checkpoints are not
    included. low: at the card's higher rates. high: at the card's lower rates."""

    low: float
    high: float


def duration(job: Job, choice: Choice) -> Duration | None:
    """The simulated duration of a step of the planned run.

    It is None if no rates are known for the card. It is None in fp32 too, because no fp32 rates are
    known. The rows must already be packed with `choice.packing`.
    """
    rates = rates_of(job.card)
    if rates is None or job.model.head.dtype == torch.float32:
        return None
    trace = simulated(job)(median_window(job), choice.recompute)
    seconds = step_seconds(trace.ops, rates)
    return Duration(seconds.low, seconds.high)


def rates_of(card: Card) -> Rates | None:
    return next((known.rates for known in KNOWN.values() if known.card.name == card.name), None)


def median_window(job: Job) -> Window:
    windows = sorted((job.stream.window(step) for step in job.planned()), key=lambda w: w.tokens)
    return windows[len(windows) // 2]
