"""For epoch.py and step_time.py --data: simulate the accumulation windows of an epoch of train.py.

An accumulation window is the examples of one step, split into micro-batches. Its time is the sum of
the times of its micro-batches. Many micro-batches have the same shape, so each shape is simulated
only once. Clipping and the update happen once in each step, so they are counted once for each
window.
"""

from dataclasses import dataclass

from bench.command_line import Setting
from bench.simulated import OnCard, Traces, both_ends, shape_key
from phogpt_raw.cards import Card
from phogpt_raw.config import Config
from phogpt_raw.data.batches import MicroBatch, Window
from phogpt_raw.data.examples import Examples
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.weights import PINNED_IDS
from phogpt_raw.simulate.fit import Choice, choose_for
from phogpt_raw.simulate.ledger import Trace
from phogpt_raw.simulate.rates import Rates
from phogpt_raw.simulate.roofline import by_phase
from phogpt_raw.training.setup import PLANNED, make_stream


@dataclass(frozen=True)
class Epoch:
    """The accumulation windows of a run's first epoch on a card.

    choice: the packing and the number of recomputed blocks.
    """

    windows: list[Window]
    micro_batch: int
    choice: Choice

    def some(self, most: int) -> list[Window]:
        """At most `most` windows that represent all windows. All windows are sorted by their number
        of tokens, and windows at equal distances in this order are chosen."""
        ordered = sorted(self.windows, key=lambda window: window.tokens)
        count = min(most, len(ordered))
        return [ordered[int((n + 0.5) * len(ordered) / count)] for n in range(count)]


def plan(examples: list[Example], config: Config, card: Card, blocks: int,
         traces: Traces | None) -> Epoch:
    """Plan the first epoch of a run over these examples on a card.

    blocks: number of blocks in the model. traces: the object that simulates the steps; it may be
    None for a CPU. Raises Refusal for an example that is too long for an accumulation window.
    """
    stream = stream_of(examples, config)
    planned = range(min(PLANNED, config.steps or stream.steps(config.epochs)))

    def trace(window: Window, recompute: int) -> Trace:
        return traces.trace_window(window, config.micro_batch, recompute, traces.kernel(card))

    choice = choose_for(card, config, blocks, stream, planned, max(len(e.ids) for e in examples),
                        trace)
    stream.packing = choice.packing
    return Epoch([stream.window(step) for step in range(stream.steps(1))], config.micro_batch,
                 choice)


def stream_of(examples: list[Example], config: Config):
    """train.py's accumulation windows of these examples. Raises Refusal for an example that is too
    long for a window."""
    return make_stream(all_train(examples), config, PINNED_IDS["pad"])


def all_train(examples: list[Example]) -> Examples:
    """The examples in the form that set_up needs. No example is held out."""
    return Examples(examples, [], [], "none", "the ids are given", "ids")


def layout(windows: list[Window], micro_batch: int) -> dict:
    """The numbers of steps, examples and rows of an epoch.

    examples_a_row: mean number of examples in a row. fill: the tokens that are not padding, as a
    fraction of all tokens in the rows. row_lengths: the different lengths of rows in tokens, with
    padding.
    """
    shapes = [shape for window in windows for shape in window.shapes(micro_batch)]
    rows = sum(rows for rows, _ in shapes)
    examples = sum(len(window.examples) for window in windows)
    return {
        "steps": len(windows), "examples": examples, "rows": rows,
        "examples_a_row": examples / rows,
        "fill": (sum(window.tokens for window in windows)
                 / sum(rows * length for rows, length in shapes)),
        "row_lengths": sorted({length for _, length in shapes}),
    }


class Simulation:
    """Simulates steps over accumulation windows on a GPU. Blocks are recomputed as in
    epoch.choice."""

    def __init__(self, traces: Traces, epoch: Epoch, card: Card, rates: Rates):
        self.traces, self.epoch, self.card, self.rates = traces, epoch, card, rates
        self.shapes: dict[tuple, OnCard] = {}
        # {shape: (seconds of the micro-batch, seconds of the rest of the step)}
        self.seconds_of: dict[tuple, tuple] = {}

    def seconds(self, window: Window) -> tuple[float, float]:
        """Seconds of a step over the window, at the GPU's higher and lower rates."""
        found = [self.batch_seconds(batch)
                 for batch in window.micro_batches(self.epoch.micro_batch)]
        _, once = found[0]
        return tuple(once[at] + sum(each[at] for each, _ in found) for at in (0, 1))

    def batch_seconds(self, batch: MicroBatch) -> tuple:
        shape = shape_key(batch)
        if shape not in self.shapes:
            self.shapes[shape] = found = self.trace(batch)
            ends = {phase: both_ends(seconds)
                    for phase, seconds in by_phase(found.trace.ops, self.rates).items()}
            each = {phase: ends.pop(phase) for phase in ("forward", "backward")}
            self.seconds_of[shape] = tuple(
                tuple(map(sum, zip(*part.values(), strict=True))) for part in (each, ends))
        return self.seconds_of[shape]

    def trace(self, batch: MicroBatch) -> OnCard:
        (rows, length), depth = batch.ids_BL.shape, self.epoch.choice.recompute
        trace = self.traces.trace_batch(batch, depth, self.traces.kernel(self.card))
        return OnCard(self.card, Setting(length, rows, 1, str(depth)), depth, trace)

    def memory_row(self) -> dict:
        """The peaks over all simulated shapes, in GiB: allocated by torch, and on the whole device.
        """
        found = list(self.shapes.values())
        rows = [on_card.memory_row() for on_card in found]
        return {"blocks_recomputed": self.epoch.choice.recompute,
                "fits": all(on_card.fits for on_card in found),
                **{key: max(row[key] for row in rows) for key in ("allocated_gib", "device_gib")}}
