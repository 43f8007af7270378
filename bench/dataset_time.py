"""For step_time.py --data: seconds per example of a file of rows, and hours of a run over the file.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.windows import Epoch, layout
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Window
from phogpt_raw.data.examples import load_examples
from phogpt_raw.data.prompt import Example
from phogpt_raw.model.phogpt import PUBLISHED
from phogpt_raw.model.weights import find_folder
from phogpt_raw.refusal import Refusal
from phogpt_raw.show.console import clock

# So many accumulation windows represent all windows of the epoch: MEASURED windows if steps are
# measured, SIMULATED windows if steps are simulated. A window is the examples of one step.
MEASURED, SIMULATED = 8, 64


@dataclass(frozen=True)
class Dataset:
    """The examples of --data, the name of the tokenizer that encoded them, and the config of a
    run over these examples."""

    examples: list[Example]
    tokenizer: str
    config: Config


def read(options) -> Dataset:
    """The examples of --data. Raises Refusal if the file cannot be used, or if the flags describe
    no possible run."""
    if len(options.micro_batch) > 1 or "," in options.recompute:
        raise Refusal("--data needs one value of --micro-batch and one of --recompute")
    config = Config(model=options.model, data=options.data, max_len=options.max_len,
                    epochs=options.epochs, micro_batch=options.micro_batch[0],
                    packing=options.packing, batch_tokens=options.batch_tokens,
                    recompute=options.recompute)
    return Dataset(*read_file(options, config), config)


def read_file(options, config: Config) -> tuple[list[Example], str]:
    """Return (the examples of --data, the name of the tokenizer that encoded them).

    Without --tokenizer, the tokenizer is the model's, or nano's for a shape with random weights.
    """
    named = options.tokenizer or ("nano" if options.model in PUBLISHED else options.model)
    return load_examples(tokenizer(named), config).train, named


def tokenizer(name: str):
    """The tokenizer of nano, of a folder or of a hub repository. No weights are fetched."""
    from transformers import PreTrainedTokenizerFast

    place = find_folder(name) if name == "nano" else name
    try:
        found = PreTrainedTokenizerFast.from_pretrained(place)
    except Exception as error:  # tokenizers has no more specific exception
        reason = str(error).strip().split("\n")[0]
        raise Refusal(f"--tokenizer {name}: cannot be read ({reason})") from None
    if found.eos_token is None:
        raise Refusal(f"--tokenizer {name}: names no token that ends an answer; check its "
                      f"tokenizer_config.json")
    return found


def estimate(options, dataset: Dataset, epoch: Epoch, most: int,
             seconds: Callable[[Window], tuple[float, ...] | None]) -> dict:
    """Estimate the time of a run over a file, from at most `most` of its accumulation windows.

    seconds(window) returns the seconds of a step, or None if the step does not fit in the GPU's
    memory. If a step does not fit, the estimate's times are None.
    """
    picked = epoch.some(most)
    taken = [seconds(window) for window in picked]
    examples = sum(len(window.examples) for window in picked)
    example_s = None if None in taken else [sum(column) / examples
                                         for column in zip(*taken, strict=True)]
    lengths = [len(e.ids) for e in dataset.examples]
    return {
        "data": options.data, "tokenizer": dataset.tokenizer, "examples": len(lengths),
        "micro_batch": epoch.micro_batch, "packing": dataset.config.packing,
        "batch_size": dataset.config.batch_size, "batch_tokens": dataset.config.batch_tokens,
        "epochs": options.epochs,
        "layout": layout(epoch.windows, epoch.micro_batch),
        "tokens_median": statistics.median(lengths),
        "tokens_longest": max(lengths), "example_s": example_s,
        "hours": example_s and [s * len(lengths) * options.epochs / 3600 for s in example_s],
    }


def line(estimate: dict) -> str:
    """An estimate as one line of text."""
    how = estimate["layout"]
    file = (f"{estimate['data']}: {estimate['examples']:,} examples, median "
            f"{estimate['tokens_median']:g} tokens, longest {estimate['tokens_longest']:,} "
            f"({estimate['tokenizer']}'s tokenizer), "
            f"examples per step {how['examples'] / how['steps']:.3g}, "
            f"rows per step {how['rows'] / how['steps']:.3g}: ")
    if estimate["example_s"] is None:
        return file + "out of memory; a shorter --max-len or a smaller --micro-batch fits"
    run = " to ".join(dict.fromkeys(clock(3600 * hours) for hours in estimate["hours"]))
    return file + (f"{span(estimate['example_s'])} s per example, {run} for "
                   f"{estimate['epochs']:g} epochs")


def span(values) -> str:
    """The text of one value, or of both ends of a range.

    >>> span([0.8594, 1.0275]), span([1411.2, 1953.4]), span([0.5, 0.5]), span([23.99])
    ('0.86 to 1.03', '1,411 to 1,953', '0.5', '24.0')
    """
    return " to ".join(dict.fromkeys(
        f"{v:,.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}" if v >= 1
        else f"{v:.2g}" for v in values))
