"""A side of epoch.py in its own process: an epoch by train.py's loop, or by the Trainer.

Both sides read the same token ids, and start from the same checkpoint and the same adapters. Both
record the time at the end of each step, after the GPU has finished. A step's time begins at the end
of the previous step, so it includes reading the rows. The first step's time begins at the start of
the loop. The time of writing the adapter at the end is not counted.
"""

import json
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from bench.measure import context_gib
from bench.process import now, serve
from bench.sides import Peer
from bench.windows import all_train, layout
from phogpt_raw.cards import DTYPES
from phogpt_raw.config import Config
from phogpt_raw.data.prompt import IGNORED, Example
from phogpt_raw.model.weights import PINNED_IDS
from phogpt_raw.private_apis import free_matmul_workspaces
from phogpt_raw.simulate.fit import choose
from phogpt_raw.training.metrics import Metrics
from phogpt_raw.training.setup import set_up
from phogpt_raw.training.shutdown import GracefulShutdown


class Ours:
    """train.py's loop over given examples."""

    def __init__(self, config: Config, examples: list[Example]):
        self.job = set_up(config, all_train(examples))
        # If the optimizer's pages are on the GPU now, context_gib includes them. turns.py subtracts
        # both context_gib and the pages from the cap, so the cap is then too small by their size.
        self.context_gib = context_gib() if self.job.card.device == "cuda" else 0.0
        start = Path(config.model) / "adapters"
        if not start.exists():
            self.job.adapters.save(start)

    def run(self, memory_gib: float) -> dict:
        """Run train.py's loop; return the measurements of its steps and the layout of its last
        epoch.

        memory_gib: the run is planned for a GPU with this memory; 0: for this GPU's own memory.
        """
        from train import train  # works because this process starts in the repository's root

        job = self.job
        if memory_gib:
            job.card = replace(job.card, memory_gib=memory_gib)
        began = time.perf_counter()
        choice = choose(job)
        job.pack(choice.packing)
        job.limits.recompute = choice.recompute
        chosen_s = time.perf_counter() - began

        with job.run.begun(job), GracefulShutdown() as shutdown:
            clock = Clock()
            train(job, Metrics(job.run.folder, job.run.state, job), clock, shutdown)

        steps, epoch = job.run.steps, job.stream.steps(1)
        windows = [job.stream.window(step) for step in range(steps - epoch, steps)]
        return {
            **layout(windows, job.limits.micro_batch), **clock.peaks(),
            "seconds": clock.seconds(),
            "step_examples": [len(job.stream.picked(step)) for step in range(steps)],
            "blocks_recomputed": choice.recompute, "graphs": job.limits.graphs,
            "choose_s": chosen_s, "skipped": job.run.state.skipped,
        }

    def release(self) -> None:
        self.job.forward = self.job.model
        if self.job.card.device == "cuda":
            free_matmul_workspaces()


class Clock:
    """Takes the place of train.py's progress display. It records the time at the end of each step,
    and the peak memory."""

    def __init__(self):
        self.ends, self.gib, self.reserved = [time.perf_counter()], [], []

    def step(self, row, _seconds: float) -> None:  # the loss was read, so the GPU has finished
        self.ends.append(time.perf_counter())
        if row.peak_gib is not None:
            self.gib.append(row.peak_gib)
            self.reserved.append(torch.cuda.max_memory_reserved() / 2**30)

    def evaluation(self, score) -> None:
        assert score is None, "nothing is held out"

    def seconds(self) -> list[float]:
        return durations(self.ends)

    def peaks(self) -> dict:
        """Peak GiB of the run; {} on a CPU. As in metrics.jsonl, the allocated GiB include the
        activations that CUDA graphs keep for backward."""
        if not self.gib:
            return {}
        return {"allocated_gib": max(self.gib), "reserved_gib": max(self.reserved)}


def durations(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in pairwise(ends)]


class TrainersEpoch(Peer):
    """transformers' Trainer. Each row is padded to the length of the longest row in its
    micro-batch."""

    def __init__(self, config: Config, examples: list[Example]):
        super().__init__(Path(config.model), DTYPES[config.dtype])
        self.rows = [trainer_row(e) for e in examples]
        self.batch_size = config.batch_size

    def run(self, micro_batch: int) -> dict:
        """Train one epoch with at least `batch_size` examples a step; return its measurements.

        If a micro-batch has several rows, rows of similar length are grouped.
        """
        from transformers import Trainer, TrainerCallback

        class Ends(TrainerCallback):
            def on_step_end(self, *_, **__):
                ends.append(now())

        accumulate = -(-self.batch_size // micro_batch)
        pad, ends = Padding(), [now()]
        self.train(Trainer, self.rows, Ends(), pad, per_device_train_batch_size=micro_batch,
                   gradient_accumulation_steps=accumulate, num_train_epochs=1,
                   train_sampling_strategy="random" if micro_batch == 1 else "group_by_length")
        examples = len(self.rows)
        seconds = durations(ends)
        in_steps = [min(micro_batch * accumulate, examples - first)
                    for first in range(0, examples, micro_batch * accumulate)]
        assert len(in_steps) == len(seconds)
        return {
            "steps": len(seconds), "examples": examples, "rows": examples, "examples_a_row": 1.0,
            "fill": sum(len(row["input_ids"]) for row in self.rows) / pad.tokens,
            "row_lengths": sorted(pad.lengths), "seconds": seconds, "step_examples": in_steps,
        }


def trainer_row(example: Example) -> dict:
    """An example in transformers' format.

    labels[i] is token i if this token carries loss, and otherwise IGNORED. transformers' model
    shifts the labels by one position itself.
    """
    return {"input_ids": example.ids, "labels": [IGNORED, *example.targets[:-1]]}


class Padding:
    """A collator that pads each row at its end to the length of the longest row. It also counts
    the tokens, padding included."""

    def __init__(self):
        self.tokens, self.lengths = 0, set()

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        self.tokens += length * len(rows)
        self.lengths.add(length)

        def padded(lists, value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in lists])

        return {"input_ids": padded([row["input_ids"] for row in rows], PINNED_IDS["pad"]),
                "labels": padded([row["labels"] for row in rows], IGNORED),
                "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0)}


def write_examples(file: Path, examples: list[Example]) -> None:
    file.write_text(json.dumps([(e.ids, e.targets, e.where) for e in examples]))


def read_examples(file: Path) -> list[Example]:
    return [Example(ids, targets, where=where) for ids, targets, where
            in json.loads(file.read_text())]


def main() -> None:
    """The arguments are `ours` or `trainer`, the fields of a Config as JSON, and the path of a file
    that write_examples wrote."""
    name, fields, file = sys.argv[1:]
    config, examples = Config(**json.loads(fields)), read_examples(Path(file))
    kind = {"ours": Ours, "trainer": TrainersEpoch}[name]
    serve(lambda: kind(config, examples), kind.run)


if __name__ == "__main__":
    main()
