"""For epoch.py on a GPU: run this loop and the Trainer in turns, and summarise the runs."""

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from bench.epoch_sides import write_examples
from bench.peer import adapter_weights
from bench.process import Side
from phogpt_raw.config import Config
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.show.console import out

WARM = 4  # the first 1/WARM of the Trainer's steps are warm-up; the later steps are steady


class Runs:
    """Runs this loop and the Trainer, one at a time, over one checkpoint in a temporary folder."""

    def __init__(self, options, config: Config, folder: Path, examples: list[Example]):
        self.options, self.folder, self.made = options, folder, 0
        self.config = replace(config, model=str(folder / "model"))
        self.pages = 2 * adapter_weights(PUBLISHED[options.model], options.rank) / 2**30
        write_examples(folder / "examples.json", examples)
        self.trainers: Side | None = None

    def start(self, name: str, config: Config) -> Side:
        """Start a new process with an empty cache of compiled kernels."""
        self.made += 1
        return Side(name, "bench.epoch_sides", name, json.dumps(asdict(config)),
                    str(self.folder / "examples.json"),
                    TRITON_CACHE_DIR=str(self.folder / f"triton-{self.made}"))

    def cap(self, side: Side) -> float:
        """GiB that torch may use: --cap minus CUDA's context and the optimizer's pages."""
        return self.options.cap and self.options.cap - side.context_gib - self.pages

    def ours(self) -> dict:
        """Do a run of one epoch and a run of --epochs epochs, each in a new process."""
        whole, steady = (self.run_ours(epochs) for epochs in (1.0, self.options.epochs))
        if "seconds" not in whole or "seconds" not in steady:
            return {"fits": False}
        return steady | {
            "fits": True, "whole_s": example_seconds(whole), "whole_seconds": whole["seconds"],
            "steady_s": example_seconds(steady, after=len(steady["seconds"]) - steady["steps"]),
            "allocated_gib": max(run["allocated_gib"] for run in (whole, steady)),
            "reserved_gib": max(run["reserved_gib"] for run in (whole, steady))}

    def run_ours(self, epochs: float) -> dict:
        run = self.folder / f"run-{self.made + 1}"
        side = self.start("ours", replace(self.config, out=str(run), epochs=epochs))
        found = side.run(cap_gib=self.cap(side), memory_gib=self.options.cap)
        side.close()
        return found

    def trainer(self, micro_batch: int) -> dict:
        """Do an epoch of the Trainer. The cap applies only if the Trainer trains one row at a time.
        If the epoch does not fit under the cap, it is repeated without the cap."""
        self.trainers = self.trainers or self.start("trainer", self.config)
        cap = self.cap(self.trainers) if micro_batch == 1 else 0
        found = self.trainers.run(cap_gib=cap, micro_batch=micro_batch)
        if cap and "out_of_memory" in found:
            found, cap = self.trainers.run(cap_gib=0, micro_batch=micro_batch), 0
        if "seconds" not in found:
            return {"fits": False}
        return found | {
            "fits": bool(cap) or not self.options.cap, "whole_s": example_seconds(found),
            "steady_s": example_seconds(found, after=len(found["seconds"]) // WARM)}

    def close(self) -> None:
        if self.trainers:
            self.trainers.close()


def example_seconds(run: dict, after: int = 0) -> float:
    """Mean seconds per example over the steps after the first `after`."""
    return sum(run["seconds"][after:]) / sum(run["step_examples"][after:])


def take(sides, trainers: list[int], pairs: int) -> dict[str, list[dict]]:
    """Do `pairs` runs of each side; return {name of a side: its runs}.

    Each run of the Trainer comes after a run of this loop. If `trainers` is empty, only this loop
    runs.
    """
    runs: dict[str, list[dict]] = {}
    for _ in range(pairs):
        for micro_batch in trainers or [None]:
            runs.setdefault("ours", []).append(sides.ours())
            say("ours", runs["ours"][-1])
            if micro_batch:
                name = f"trainer {micro_batch}"
                runs.setdefault(name, []).append(sides.trainer(micro_batch))
                say(name, runs[name][-1])
    return runs


def say(name: str, run: dict) -> None:
    out.print(f"{name}: " + (f"{run['steady_s']:.4g} s per example, whole {run['whole_s']:.4g}"
                             if "steady_s" in run else "out of memory"))


# The fields of a run that have one value for each step. A row of the result lacks these fields.
EACH_STEP = ("seconds", "whole_seconds", "step_examples")


def summary(runs: dict[str, list[dict]]) -> list[dict]:
    """A row for each side: median seconds, peak memory and speedup.

    The speedup is relative to the Trainer with one row at a time.
    """
    rows = []
    for name, those in runs.items():
        row = {"who": name.split()[0], "micro_batch": int(name.partition(" ")[2] or 1)}
        done = [run for run in those if "steady_s" in run]
        if done:
            row |= {k: v for k, v in done[-1].items() if k not in EACH_STEP}
            row |= {key: statistics.median(run[key] for run in done)
                    for key in ("whole_s", "steady_s")}
            row |= {key: max(run[key] for run in done)
                    for key in ("allocated_gib", "reserved_gib")}
        row["fits"] = all(run["fits"] for run in those)
        rows.append(row | {"runs": those})
    base = next((row.get("steady_s") for row in rows
                 if (row["who"], row["micro_batch"]) == ("trainer", 1)), None)
    for row in rows:
        if base and "steady_s" in row:
            row["times_faster"] = base / row["steady_s"]
    return rows
