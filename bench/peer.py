"""The same work through transformers' Trainer + PEFT + bitsandbytes and through this loop.

    python bench/peer.py --model 7b5 --work 1x512,1x1024,1x2048 --save
    python bench/peer.py --model 7b5 --work 8x512 --dtype bf16 --cap 0 --loss-mib 1024 --save

One process a side, both from one checkpoint of random weights whose biases are zero (transformers'
MPT has none, so that both compute the same function), from the same adapters, on the same tokens.
They take turns: a run of the peer, a run of ours, again. Before that both train for a number of
steps from the same start, and the losses are held against each other.

The peer is set up as its users do it: gradient checkpointing, paged_adamw_8bit, mixed precision,
LoRA on all four linears. Needs a GPU with room for both at once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

from phogpt_raw.cards import DTYPES
from phogpt_raw.config import Config
from phogpt_raw.console import out
from phogpt_raw.meter import device_gib
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig, PhoGPT
from phogpt_raw.refusal import Refusal, exits_cleanly

LR = 1e-4


class Ours:
    """This loop, its micro-steps captured or eager, over a checkpoint folder."""

    def __init__(self, options):
        self.bench = harness.Bench(options)
        self.adapters = self.bench.adapters
        self.model = self.bench.model.train()
        self.first = self.adapters.flat.detach().clone()
        start = Path(options.model) / "adapters"
        if not start.exists():
            self.adapters.save(start)
        self.adapters.load(start)

    def steps(self, micro_batch: int, seq_len: int, count: int, path: str, recompute: str):
        """(loss, seconds) of each of `count` steps, from the first adapters on."""
        bench = self.bench
        self.adapters.flat.data.copy_(self.first)
        bench.optimizer = harness.make_optimizer(self.adapters.flat, Config.optimizer, LR, 0.0)
        bench.scaler = harness.make_scaler(bench.dtype, bench.card.device)
        bench.begin(harness.Setting(seq_len, micro_batch, 1, recompute), capture=path == "captured")
        for step in range(count):
            rows = harness.tokens(self.model.config.vocab_size, micro_batch, seq_len, step)
            window = harness.window(rows, micro_batch)
            begun = now()
            loss = bench.run(window).loss
            yield loss, now() - begun

    def release(self) -> None:
        self.bench.forward = None


class Peer:
    """transformers' Trainer over PEFT's layers over bitsandbytes' linears."""

    def __init__(self, options):
        import transformers
        from peft import PeftModel, prepare_model_for_kbit_training

        transformers.logging.set_verbosity_error()
        self.dtype = DTYPES[options.dtype]
        self.folder = Path(options.model)
        model = transformers.MptForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, device_map={"": 0},
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype))
        model.config.use_cache = False
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        self.model = PeftModel.from_pretrained(model, self.folder / "adapters", is_trainable=True)
        self.first = {n: p.detach().clone() for n, p in self.model.named_parameters()
                      if p.requires_grad}

    def steps(self, micro_batch: int, seq_len: int, count: int, **_):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        for name, p in self.model.named_parameters():
            if name in self.first:
                p.data.copy_(self.first[name])
        vocabulary = self.model.config.vocab_size
        losses, times = [], []

        rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * seq_len}
                for step in range(count)
                for ids in harness.tokens(vocabulary, micro_batch, seq_len, step)]

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.begun = now()

            def on_step_end(self, *_, **__):
                times.append(now() - self.begun)

        class Watched(Trainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(rows)  # in our order

            def compute_loss(self, *given, **named):
                loss = super().compute_loss(*given, **named)
                losses.append(loss.detach())
                return loss

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=micro_batch, max_steps=count,
                learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
                optim="paged_adamw_8bit", gradient_checkpointing=True, logging_strategy="no",
                save_strategy="no", report_to=[], disable_tqdm=True,
                fp16=self.dtype == torch.float16, bf16=self.dtype == torch.bfloat16)
            trainer = Watched(self.model, arguments, train_dataset=rows, callbacks=[Clock()])
            if trainer.accelerator.scaler is not None:  # as ours: 2^16 skips the first steps
                trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
            trainer.train()
        yield from zip(losses, times, strict=True)

    def release(self) -> None:
        self.model.zero_grad()


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def serve(options) -> None:
    """One side: a JSON order a line on standard input, its answer on standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    side = {"ours": Ours, "peer": Peer}[options.side](options)
    print(json.dumps({"beside_gib": harness.context_gib()}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        harness.hold_to(order.pop("cap_gib"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            losses, seconds = zip(*side.steps(**order), strict=True)
            answer = {"losses": [float(x) for x in losses], "seconds": seconds,
                      "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                      "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
        except torch.OutOfMemoryError:
            answer = {"out_of_memory": True}
        side.release()
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, folder: Path, options):
        command = [sys.executable, __file__, "--side", name, "--model", str(folder), "--dtype",
                   options.dtype, "--rank", str(options.rank), "--loss-mib", str(options.loss_mib),
                   "--cap", "0"]  # set with each order
        self.name = name
        before = device_gib()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.context_gib = self.read()["beside_gib"] - before

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Refusal(f"peer.py: the process of {self.name} ended; its error stands above")
        return json.loads(line)

    def run(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def write_checkpoint(folder: Path, shape: ModelConfig, seed: int = 0) -> None:
    """Random weights that VinAI's readers and transformers' agree on: all biases are zero."""
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dice = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        phogpt = PhoGPT(shape)
    shards: dict[str, dict] = {}
    for name, p in phogpt.named_parameters():
        if name.endswith("bias"):
            tensor = torch.zeros(p.shape, dtype=torch.bfloat16)
        elif p.dim() == 1:
            tensor = torch.ones(p.shape, dtype=torch.bfloat16)
        else:
            noise = torch.randn(p.shape, generator=dice, dtype=torch.bfloat16, device=device)
            tensor = (0.02 * noise).cpu()
        part = name.split(".")[2] if ".blocks." in name else "ends"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, named in shards.items() for n in named}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "mpt", "architectures": ["MptForCausalLM"], "no_bias": False,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        **{field: getattr(shape, field) for field in (
            "d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "expansion_ratio")},
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8,
                        "attn_pdrop": 0, "clip_qkv": None, "softmax_scale": None},
    }))


def adapter_weights(shape: ModelConfig, rank: int) -> int:
    """LoRA's numbers on the four linears of every block."""
    d, wide = shape.d_model, shape.expansion_ratio * shape.d_model
    return shape.n_layers * rank * ((d + 3 * d) + (d + d) + 2 * (d + wide))


def compare(work: str, sides: dict[str, Side], options, cap_gib: float) -> dict:
    """Losses from one start, then alternating pairs of timed runs; a row of the result."""
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
    """Medians over the pairs: seconds and GiB of each, and how many times faster ours is."""
    pairs = row["pairs"]
    told = {}
    for name in ("peer", "ours", "eager"):
        if all("step_s" in pair[name] for pair in pairs):
            for key in ("step_s", "allocated_gib", "reserved_gib"):
                told[f"{name}_{key}"] = statistics.median(pair[name][key] for pair in pairs)
    for name in ("ours", "eager"):
        if all("step_s" in pair[side] for pair in pairs for side in ("peer", name)):
            told[f"{name}_times_faster"] = statistics.median(
                pair["peer"]["step_s"] / pair[name]["step_s"] for pair in pairs)
    for name in ("captured", "peer"):
        if row["losses"]["eager"] and row["losses"][name]:
            told[f"{name}_loss_apart"] = max(
                abs(a - b) for a, b in zip(row["losses"]["eager"], row["losses"][name],
                                           strict=True))
    return told


def parse(arguments):
    parser = harness.Parser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b5", help="7b5 or 4b: that shape, random weights")
    parser.add_argument("--work", default="1x512,1x1024,1x2048", metavar="BxL,…")
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--cap", type=float, default=14.56, metavar="GIB",
                        help="the card's usable memory; 0: all there is (default 14.56, a T4)")
    parser.add_argument("--recompute", default="none", metavar="all,none,N", help="of ours")
    parser.add_argument("--rank", type=harness.count, default=16)
    parser.add_argument("--loss-mib", "--loss_mib", type=harness.count, default=Config.loss_mib)
    parser.add_argument("--losses", type=harness.count, default=50, help="steps whose losses are "
                        "compared")
    parser.add_argument("--pairs", type=harness.count, default=3)
    parser.add_argument("--steps", type=harness.count, default=8, help="timed steps a run")
    parser.add_argument("--warmup", type=harness.count, default=4)
    parser.add_argument("--save", action="store_true", help="write a JSON to bench/results")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.optimizer = Config.optimizer
    options.attention = "auto"
    return options


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.side:
        return serve(options)
    if options.model not in PUBLISHED:
        raise Refusal(f"--model {options.model}: 7b5 or 4b")
    card = harness.this_card()
    if card.device == "cpu":
        raise Refusal("peer.py: the Trainer's paged optimizer needs a GPU, here is none")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / options.model
        folder.mkdir()
        out.print(f"writing random weights of {options.model}")
        write_checkpoint(folder, PUBLISHED[options.model])
        torch.cuda.empty_cache()
        sides = {name: Side(name, folder, options) for name in ("ours", "peer")}
        pages = 2 * adapter_weights(PUBLISHED[options.model], options.rank) / 2**30
        beside = sides["ours"].context_gib + pages
        cap = options.cap and options.cap - beside
        if cap:
            out.print(f"cap: {options.cap:g} GiB less {beside:.2f} for CUDA's context and the "
                      f"optimizer's pages, which torch does not see")
        rows = []
        for work in options.work.split(","):
            row = compare(work, sides, options, cap)
            row["summary"] = summary(row)
            rows.append(row)
            out.print(f"{work}: " + ", ".join(f"{k} {v:.4g}" for k, v in row["summary"].items()))
        for side in sides.values():
            side.close()
    table = harness.table(
        f"seconds a step, medians of {options.pairs} pairs of runs of {options.steps} steps, "
        f"{options.model}, {options.dtype}, rank {options.rank}",
        ["work", "peer", "GiB", "ours", "GiB", "faster", "eager", "faster", "losses apart"],
        caption="GiB allocated at the peak. faster: the peer's seconds over ours, in turns. losses "
                f"apart: captured, peer against eager, at most over {options.losses} steps. * the "
                "peer does not fit under the cap and ran without")
    for row in rows:
        told = row["summary"]
        cells = [f"{told[k]:{form}}" if k in told else "out of memory" for k, form in (
            ("peer_step_s", ".3f"), ("peer_allocated_gib", ".2f"), ("ours_step_s", ".4f"),
            ("eager_allocated_gib", ".2f"), ("ours_times_faster", ".2f"), ("eager_step_s", ".4f"),
            ("eager_times_faster", ".2f"))]
        apart = [f"{told[k]:.1e}" for k in ("captured_loss_apart", "peer_loss_apart") if k in told]
        table.add_row(f"{row['micro_batch']} x {row['seq_len']}",
                      cells[0] + ("" if row["peer_fits"] else "*"), *cells[1:], ", ".join(apart))
    out.print(table)
    if options.save:
        out.print(f"saved {harness.save('peer', card, options, rows)}")


if __name__ == "__main__":
    main()
