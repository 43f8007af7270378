"""Bench of decoding: tokens per second of the engine and of transformers' generate.

    python bench/decode.py --model 7b5 --save   measures both sides on a GPU
    python bench/decode.py --card t4,v100       the memory bound, without a GPU

Both sides load the same checkpoint of random weights in NF4, with an adapter on all four linear
layers of each block. They take turns, and each generates --new tokens greedily after random
prompts. transformers runs with its default settings, and again with its static cache. Tokens per
second count the tokens of all rows, but not the first token of a row. The time until the first
token is given separately; it is the time of reading the prompts.

A decoding step must read every weight, the adapter and the cache once. The bound is the shortest
possible time of such a step: the number of these bytes, divided by the rate at which the GPU copies
memory. For the GPUs of --card, only the bound is computed.
"""

import tempfile
from pathlib import Path

import torch

from bench import report, results
from bench.command_line import MOST_TOKENS, as_in_train, known_cards, several, within
from bench.peer import adapter_weights
from bench.process import Side, now
from bench.sides import write_random_checkpoint
from bench.simulated import check_fits
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.model.cache import cache_bytes
from phogpt_raw.model.nf4 import NF4_BYTES
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out
from phogpt_raw.simulate.rates import CONTEXT

NEW = 256
PEERS = {"transformers": None, "transformers, static cache": "static"}


def step_bytes(shape: ModelConfig, rank: int, rows: int, tokens: float) -> float:
    """The bytes that a decoding step must read for `rows` rows of `tokens` tokens each.

    A step reads the linear layers in NF4, the head and the adapter in 16 bits, and the keys and
    values.
    """
    return (NF4_BYTES * shape.linear_weights + 2 * shape.vocab_size * shape.d_model
            + 2 * adapter_weights(shape, rank)
            + cache_bytes(shape.n_layers, shape.d_model, rows, 1, 2) * tokens)


def copy_rate(size: int = 2**30) -> float:
    """The rate at which this GPU copies memory: bytes read plus bytes written, per second. The
    result is the highest rate of ten copies."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(10):
        began = now()
        target.copy_(source)
        times.append(now() - began)
    return 2 * size / min(times)


def bound_rows(options, shape: ModelConfig, bandwidth: tuple[float, float]) -> list[dict]:
    """A row of the result for each prompt length and batch size: tokens/s at the bound, and GiB.

    bandwidth: the GPU's lower and higher memory rate in bytes/s. tokens/s has one value for each of
    the two rates. GiB counts the model, its cache and CUDA's context.
    """
    rows = []
    for prompt in options.prompt:
        for batch in options.batch:
            read = step_bytes(shape, options.rank, batch, prompt + options.new / 2)
            cache = cache_bytes(shape.n_layers, shape.d_model, batch, prompt + options.new, 2)
            weights = step_bytes(shape, options.rank, batch, 0)
            rows.append({"who": "bound", "prompt": prompt, "rows": batch, "bytes": read,
                         "tokens_per_s": [batch * rate / read for rate in bandwidth],
                         "gib": (weights + cache + CONTEXT) / 2**30})
    return rows


def simulate(options) -> None:
    shape = PUBLISHED[options.model]
    for known in known_cards(options):
        rows = bound_rows(options, shape, known.rates.bandwidth)
        out.print(report.decode_bounds(rows, f"at most, on {known.card.name}: {options.model}, "
                                             f"NF4, rank {options.rank}"))
        if options.save:
            file = results.save("decode", known.card, options, torch.float16, rows,
                                source="simulated", new=options.new, sources=known.rates.source)
            out.print(f"saved {file}")


def measure(options) -> None:
    shape, card = PUBLISHED[options.model], this_card()
    if card.device == "cpu":
        raise Refusal("decode.py: measuring needs a GPU, and there is none here; --card t4 "
                      "computes the bound of a T4")
    rate = copy_rate()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / options.model
        out.print(f"writing random weights of {options.model}")
        write_random_checkpoint(folder, shape)
        torch.cuda.empty_cache()
        sides = {name: Side(name, "bench.decode_sides", name, str(folder), options.dtype,
                            str(options.rank))
                 for name in ("ours", *(["transformers"] if options.peers else []))}
        rows = []
        for prompt in options.prompt:
            forward = sides["ours"].run(forward=True, prompt=prompt, cap_gib=0)
            for batch in options.batch:
                made = turn(options, shape, sides, prompt, batch, rate)
                made[0]["forward_s"] = forward.get("forward_s")
                rows += made
                if options.save:  # saves now, because the next measurement can take minutes
                    file = results.save("decode", card, options, DTYPES[options.dtype], rows,
                                        new=options.new, copy_bytes_per_s=rate)
        for side in sides.values():
            side.close()
    out.print(report.decode(rows, f"measured on {card.name}: {options.model}, NF4, "
                                  f"{options.dtype}, rank {options.rank}, {options.new} tokens"))
    if options.save:
        out.print(f"saved {file}")


def turn(options, shape: ModelConfig, sides: dict[str, Side], prompt: int, batch: int,
         rate: float) -> list[dict]:
    """The rows of the result for this prompt length and batch size: one for each side, and
    this engine's row first."""
    order = {"prompt": prompt, "rows": batch, "new": options.new, "cap_gib": 0}
    common = {"prompt": prompt, "rows": batch}
    read = step_bytes(shape, options.rank, batch, prompt + options.new / 2)
    found = sides["ours"].run(**order)
    rows = [{"who": "ours", **common, **found, "bytes": read}]
    if "step_s" in found:
        rows[0] |= {"bytes_per_s": read / found["step_s"], "bound_s": read / rate,
                    "share_of_bound": read / rate / found["step_s"]}
        if options.kernels:
            seen = sides["ours"].run(kernels=True, prompt=prompt, rows=batch, cap_gib=0)
            rows[0]["kernels_s"] = dict(sorted(seen["kernels_s"].items(), key=lambda k: -k[1][0]))
            for name, (seconds, times) in list(rows[0]["kernels_s"].items())[:8]:
                out.print(f"  {1e3 * seconds:6.3f} ms  {times:4} x {name[:60]}", markup=False)
    for name in options.peers:
        found = sides["transformers"].run(**order, cache=PEERS[name])
        rows.append({"who": name, **common, **found})
        if "tokens_per_s" in found and "tokens_per_s" in rows[0]:
            rows[-1]["ours_times_faster"] = rows[0]["tokens_per_s"] / found["tokens_per_s"]
    for row in rows:
        rate_s = f"{row['tokens_per_s']:.1f} tokens/s" if "step_s" in row else "out of memory"
        out.print(f"prompt {prompt}, {batch} rows, {row['who']}: {rate_s}")
    return rows


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5", choices=PUBLISHED, help="shape of "
                        "the model; its weights are random (default 7b5)")
    parser.add_argument("--card", metavar="NAME,…", help="compute the bounds of these GPUs "
                        "(default t4,v100; on a computer with a GPU, its GPU is measured)")
    parser.add_argument("--prompt", type=several(1, MOST_TOKENS), default=[128], metavar="N,…",
                        help="tokens in a prompt (default 128)")
    parser.add_argument("--batch", type=several(1, 1000), default=[1, 8], metavar="N,…",
                        help="prompts that are answered together (default 1,8)")
    parser.add_argument("--new", type=within(2, MOST_TOKENS), default=NEW, metavar="N",
                        help=f"tokens to generate for each prompt (default {NEW})")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of activations (default fp16)")
    parser.add_argument("--rank", type=as_in_train("rank"), default=16, metavar="N",
                        help="LoRA rank (default 16)")
    parser.add_argument("--peers", default="shipped,static", metavar="shipped,static,none",
                        help="transformers with its default settings (shipped), with its static "
                        "cache, or not at all (default shipped,static)")
    parser.add_argument("--kernels", action="store_true",
                        help="print the slowest kernels of this engine")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    names = dict(zip(("shipped", "static"), PEERS, strict=True))
    asked = [] if options.peers == "none" else options.peers.split(",")
    if not set(asked) <= set(names):
        raise Refusal(f"--peers {options.peers}: must be shipped, static or none")
    options.peers = [names[name] for name in asked]
    check_fits(options, options.prompt)
    if not options.card and not torch.cuda.is_available():
        options.card = "t4,v100"
    known_cards(options)
    # results.save reads these options; this bench has no flags for them
    options.attention, options.optimizer = "auto", Config.optimizer
    options.label = None if options.new == NEW else f"{options.new}-tokens"
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    (simulate if options.card else measure)(options)


if __name__ == "__main__":
    main()
