"""What --dry-run adds to a plan for a GPU whose rates are known: how long the run would take."""

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
    """Seconds of the step that has the median number of tokens, at the card's higher and lower
    rates; evaluations and saving are not included."""

    low: float
    high: float


def duration(job: Job, choice: Choice) -> Duration | None:
    """The simulated duration of a step of the planned run; None for a card without known rates, and
    in fp32, of which no rates are known. The rows must be packed as `choice` says."""
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
