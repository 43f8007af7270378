"""Bench of reading rows: the time and memory to read a file of rows and to plan the first epoch.

    python bench/data.py                60,000 generated rows, and one huge row
    python bench/data.py --tokenizer FOLDER

The file of many rows is read twice: first without a cache, then from the cache that the first
reading wrote. Each measurement runs in a separate process. The seconds include reading, checking
and encoding the rows, dividing them into training and held-out rows, and packing. The seconds do
not include the imports. `mib` is the peak memory of the whole process (ru_maxrss). `more_mib` is
this peak minus the peak before the first row is read, when the imports are done and the tokenizer
is loaded.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import dataset_time
from bench.command_line import within
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.data.examples import load_examples
from phogpt_raw.data.packing import choose_packing
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.simulate.fit import ROW
from phogpt_raw.training.setup import PLANNED, make_stream

WORDS = (
    "phở", "bún", "cơm", "nước", "ngon", "rất", "nhiều", "người", "thành", "phố", "Hà", "Nội",
    "sông", "núi", "ăn", "uống", "buổi", "sáng", "trưa", "chiều", "tối", "mùa", "hè", "đông",
    "lạnh", "nóng", "đẹp", "và", "của", "là", "có", "không", "được", "một", "những", "các", "với")
LONG = 40_000_000  # characters in the answer of the one long row


def write_rows(file: Path, rows: int) -> None:
    """Write different rows of random words. A question has about 150 characters, and an answer has
    about 400."""
    dice = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for n in range(rows):
            question = f"Câu {n}: {' '.join(dice.choices(WORDS, k=dice.randint(5, 60)))}?"
            answer = f"Dạ, {' '.join(dice.choices(WORDS, k=dice.randint(10, 160)))} ạ."
            lines.write(json.dumps({"prompt": question, "response": answer}, ensure_ascii=False)
                        + "\n")


def measured(file: str, cache: str, tokenizer: str) -> dict:
    """Load the rows and plan an epoch in this process; return seconds, MiB and counts."""
    found = dataset_time.tokenizer(tokenizer)
    config = Config(model="x/y", data=file, data_cache=cache, template="4b-chat", hold_out=0.05)
    before, start, cpu = peak_mib(), time.perf_counter(), time.process_time()
    try:
        examples = load_examples(found, config)
    except Refusal as refusal:
        return {"refused": str(refusal), "s": time.perf_counter() - start, "mib": peak_mib(),
                "more_mib": peak_mib() - before}
    loaded = time.perf_counter() - start
    stream = make_stream(examples, config, found.pad_token_id)
    windows = [stream.picked(step) for step in range(min(PLANNED, stream.steps(1)))]
    stream.packing = choose_packing(windows, max(len(e.ids) for e in examples.train), ROW)
    steps = sum(1 for step in range(stream.steps(1)) if stream.window(step).shapes(1))
    return {"s": time.perf_counter() - start, "loaded_s": loaded,
            "cpu_s": time.process_time() - cpu, "mib": peak_mib(),
            "more_mib": peak_mib() - before, "rows": len(examples.train) + len(examples.held_out),
            "tokens": sum(len(e.ids) for e in examples.train), "steps": steps}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(*arguments) -> dict:
    done = subprocess.run([sys.executable, "-m", "bench.data", "--measure", *map(str, arguments)],
                          stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=within(1, 10_000_000), default=60_000, metavar="N",
                        help="rows to generate (default 60000)")
    parser.add_argument("--tokenizer", default="nano", help="nano, a folder or a hub id")
    # in_a_process starts this program again with --measure
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measured(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, long = Path(folder) / "rows.jsonl", Path(folder) / "long.jsonl"
        write_rows(rows, options.rows)
        long.write_text(json.dumps({"prompt": "a", "response": "ạ" * LONG}, ensure_ascii=False),
                        "utf-8")
        for what, file in (("without a cache", rows), ("from the cache", rows),
                           ("one long row", long)):
            found = in_a_process(file, Path(folder) / "cache", options.tokenizer)
            print(f"{what}: {found.pop('s'):.2f} s, " + ", ".join(
                f"{name} {value:,.0f}" if isinstance(value, int | float) else f"{name}: {value}"
                for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
