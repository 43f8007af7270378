"""Bench of steps: this loop compared with transformers' Trainer, PEFT and bitsandbytes.

    python bench/peer.py --model 7b5 --work 1x512,1x1024,1x2048 --save
    python bench/peer.py --work 8x512 --dtype bf16 --cap 0 --loss-mib 1024

Each side is one process. Both sides load the same checkpoint of random weights and the same
adapters, and train on the same tokens. transformers' MPT has no biases, so the checkpoint's biases
are zero. Both sides therefore compute the same function. First both sides train --losses steps from
the same start, and their losses are compared. Then their steps are timed in turns: the Trainer,
this loop as CUDA graphs, this loop eagerly, then the Trainer again, and so on.

The Trainer is set up as its users set it up: gradient checkpointing, paged_adamw_8bit, mixed
precision, LoRA on all four linear layers of each block. The GPU needs memory for both sides at
once.
"""

import re
import statistics
import tempfile
from pathlib import Path

import torch

from bench import report, results
from bench.command_line import MOST_GIB, MOST_STEPS, as_in_train, within
from bench.process import Side
from bench.sides import start, write_random_checkpoint
from phogpt_raw.cards import DTYPES, this_card
from phogpt_raw.command_line import Parser
from phogpt_raw.config import Config
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig
from phogpt_raw.refusal import Refusal, exits_cleanly
from phogpt_raw.show.console import out


def adapter_weights(shape: ModelConfig, rank: int) -> int:
    """The number of LoRA weights on the four linear layers of all blocks."""
    d, wide = shape.d_model, shape.expansion_ratio * shape.d_model
    return shape.n_layers * rank * ((d + 3 * d) + (d + d) + 2 * (d + wide))


def compare(work: str, sides: dict[str, Side], options, cap_gib: float) -> dict:
    """A row of the result: the losses from the same start, and timed runs of both sides in turns.

    work: rows and tokens of a step, such as "1x512". cap_gib: GiB that torch may allocate; 0: no
    limit. If the Trainer needs more, it runs without a limit, and peer_fits is False.
    """
    micro_batch, seq_len = (int(part) for part in work.split("x"))
    order = {"micro_batch": micro_batch, "seq_len": seq_len, "recompute": options.recompute}
    ours, peer = sides["ours"], sides["peer"]
    row = {"micro_batch": micro_batch, "seq_len": seq_len, "recompute": options.recompute,
           "cap_gib": cap_gib or None, "peer_fits": True}

    captured = {**order, "path": "captured", "cap_gib": cap_gib}
    eager = {**order, "path": "eager", "cap_gib": cap_gib}
    theirs = {**order, "path": "eager", "cap_gib": cap_gib}
    found = peer.run(**theirs, count=2)
    if "out_of_memory" in found:
        row["peer_fits"], theirs["cap_gib"] = False, 0
    row["losses"] = {"captured": ours.run(**captured, count=options.losses).get("losses"),
                     "eager": ours.run(**eager, count=options.losses).get("losses"),
                     "peer": peer.run(**theirs, count=options.losses).get("losses")}
    row["pairs"] = []
    count = options.warmup + options.steps
    for _ in range(options.pairs):
        pair = {}
        for name, side, asked in (("peer", peer, theirs), ("ours", ours, captured),
                                  ("eager", ours, eager)):
            found = side.run(**asked, count=count)
            if "seconds" in found:
                found["step_s"] = statistics.median(found.pop("seconds")[options.warmup:])
            found.pop("losses", None)
            pair[name] = found
        row["pairs"].append(pair)
    return row


def summary(row: dict) -> dict:
    """The medians over row["pairs"]: seconds and GiB of each side, and the speedup of this loop.

    The result also has the largest difference between the losses of our captured steps and our
    eager steps, and the largest difference between the losses of the Trainer's steps and our eager
    steps. Losses of the same step are compared.
    """
    pairs = row["pairs"]
    found = {}
    for name in ("peer", "ours", "eager"):
        if all("step_s" in pair[name] for pair in pairs):
            for key in ("step_s", "allocated_gib", "reserved_gib"):
                found[f"{name}_{key}"] = statistics.median(pair[name][key] for pair in pairs)
    for name in ("ours", "eager"):
        if all("step_s" in pair[side] for pair in pairs for side in ("peer", name)):
            found[f"{name}_times_faster"] = statistics.median(
                pair["peer"]["step_s"] / pair[name]["step_s"] for pair in pairs)
    for name in ("captured", "peer"):
        if row["losses"]["eager"] and row["losses"][name]:
            found[f"{name}_loss_apart"] = max(
                abs(a - b) for a, b in zip(row["losses"]["eager"], row["losses"][name],
                                           strict=True))
    return found


def parse(arguments):
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="7b5", metavar="BASE",
                        help="7b5 or 4b: that shape with random weights (default 7b5)")
    parser.add_argument("--work", default="1x512,1x1024,1x2048", metavar="BxL,…",
                        help="rows x tokens of a step (default 1x512,1x1024,1x2048)")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"),
                        help="data type of activations (default fp16)")
    parser.add_argument("--cap", type=within(0, MOST_GIB, float), default=14.56, metavar="GIB",
                        help="the most memory to use; 0: all (default 14.56, as on a T4)")
    parser.add_argument("--recompute", default="none", metavar="all,none,N",
                        help="blocks that this loop recomputes (default none)")
    parser.add_argument("--rank", type=as_in_train("rank"), default=16, metavar="N",
                        help="LoRA rank (default 16)")
    parser.add_argument("--loss-mib", type=as_in_train("loss_mib"), default=Config.loss_mib,
                        metavar="N", help="most MiB for one chunk of logits (default "
                        f"{Config.loss_mib})")
    parser.add_argument("--losses", type=within(1, MOST_STEPS), default=50, metavar="N",
                        help="steps whose losses are compared (default 50)")
    parser.add_argument("--pairs", type=within(1, 1000), default=3, metavar="N",
                        help="number of times that both are measured, in turns (default 3)")
    parser.add_argument("--steps", type=within(1, MOST_STEPS), default=8, metavar="N",
                        help="timed steps in each turn (default 8)")
    parser.add_argument("--warmup", type=within(0, MOST_STEPS), default=4, metavar="N",
                        help="untimed steps before the timed ones (default 4)")
    parser.add_argument("--save", action="store_true", help="write the result to bench/results")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}(, ?[1-9]\d{0,6}x[1-9]\d{0,6})*", options.work):
        raise Refusal(f"--work {options.work}: rows x tokens, such as 1x512,8x512")
    if not re.fullmatch(r"all|none|\d+", options.recompute):
        raise Refusal(f"--recompute {options.recompute}: all, none or a number of blocks")
    # results.save reads these options; this bench has no flags for them
    options.attention, options.label, options.optimizer = "auto", None, Config.optimizer
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.model not in PUBLISHED:
        raise Refusal(f"--model {options.model}: must be 7b5 or 4b")
    card = this_card()
    if card.device == "cpu":
        raise Refusal("peer.py: the Trainer's paged optimizer needs a GPU, and there is none here")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / options.model
        folder.mkdir()
        out.print(f"writing random weights of {options.model}")
        write_random_checkpoint(folder, PUBLISHED[options.model])
        torch.cuda.empty_cache()
        sides = {name: start(name, folder, options) for name in ("ours", "peer")}
        pages = 2 * adapter_weights(PUBLISHED[options.model], options.rank) / 2**30
        beside = sides["ours"].context_gib + pages
        cap = options.cap and options.cap - beside
        if cap:
            out.print(f"cap: {options.cap:g} GiB less {beside:.2f} for CUDA's context and the "
                      f"optimizer's pages, which torch does not count")
        rows = []
        for work in options.work.split(","):
            row = compare(work, sides, options, cap)
            row["summary"] = summary(row)
            rows.append(row)
            out.print(f"{work}: " + ", ".join(f"{k} {v:.4g}" for k, v in row["summary"].items()))
        for side in sides.values():
            side.close()
    table = report.table(
        f"seconds a step, medians of {options.pairs} pairs of runs of {options.steps} steps, "
        f"{options.model}, {options.dtype}, rank {options.rank}",
        ["work", "peer", "GiB", "ours", "GiB", "faster", "eager", "faster", "losses apart"],
        caption="GiB allocated at the peak. faster: the peer's seconds divided by ours. losses "
                f"apart: largest difference to the eager losses in {options.losses} steps, of ours "
                "captured and of the peer. * the peer does not fit under the cap and ran without "
                "it")
    for row in rows:
        found = row["summary"]
        cells = [f"{found[k]:{spec}}" if k in found else "out of memory" for k, spec in (
            ("peer_step_s", ".3f"), ("peer_allocated_gib", ".2f"), ("ours_step_s", ".4f"),
            ("eager_allocated_gib", ".2f"), ("ours_times_faster", ".2f"), ("eager_step_s", ".4f"),
            ("eager_times_faster", ".2f"))]
        apart = [f"{found[k]:.1e}" for k in ("captured_loss_apart", "peer_loss_apart")
                 if k in found]
        table.add_row(f"{row['micro_batch']} x {row['seq_len']}",
                      cells[0] + ("" if row["peer_fits"] else "*"), *cells[1:], ", ".join(apart))
    out.print(table)
    if options.save:
        out.print(f"saved {results.save('peer', card, options, DTYPES[options.dtype], rows)}")


if __name__ == "__main__":
    main()
