"""Pretrain `nano`, a small PhoGPT, on what `prepare` has written.

    python -m phogpt_raw.nano.recipe.prepare --articles articles.jsonl.gz --out DATA
    python -m phogpt_raw.nano.recipe.pretrain --data DATA --out BASE

Writes a folder as on the hub, and pretraining.json with how it came about. The surprise is what is
saved: not the last weights but those of the lowest held-out loss, since a few million tokens read
many times are learnt by heart.

Losses are in nats. B micro-batch, L window.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from phogpt_raw.cards import this_card, training_dtype
from phogpt_raw.model.checkpoint_format import (
    TOKENIZER_FILES,
    vinai_config,
    write_checkpoint,
    write_json,
)
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.nano.recipe.tokenizer import EOS
from phogpt_raw.refusal import Refusal, exits_cleanly

SAMPLES = [
    "### Câu hỏi: Hà Nội ở đâu?\n### Trả lời:",
    "### Câu hỏi: Cá voi là gì?\n### Trả lời:",
    "### Câu hỏi:\nLàm thế nào để trồng lúa?\n\n### Trả lời:",
    "Việt Nam là một",
]


@torch.no_grad()
def initialise(model: PhoGPT) -> None:
    """Normal 0.02, what writes into the residual stream divided by sqrt(2 * layers) (GPT-2)."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            weight.normal_(0.0, 0.02 / (math.sqrt(2 * model.config.n_layers) if residual else 1))


def window(stream: torch.Tensor, starts_B: torch.Tensor, length: int):
    """ids [B, L], doc [B, L] and targets [B, L] of windows that begin at `starts_B`.

    </s> belongs to the document that it ends; the next document's first token is not predicted
    from it. All of it stays on the stream's device.
    """
    chunk = stream[starts_B[:, None] + torch.arange(length + 1, device=stream.device)].long()
    ids_BL, targets_BL = chunk[:, :-1], chunk[:, 1:]
    ends_BL = ids_BL == EOS
    doc_BL = ends_BL.cumsum(1) - ends_BL.long()
    return ids_BL, doc_BL, targets_BL.masked_fill(ends_BL, -100)


def shuffled_starts(tokens: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """One epoch: windows side by side from a random offset, in random order."""
    offset = int(torch.randint(min(length, tokens - length), (), generator=generator))
    return offset + length * torch.randperm((tokens - 1 - offset) // length, generator=generator)


def loss_of(model: PhoGPT, ids_BL, doc_BL, targets_BL, reduction: str = "mean") -> torch.Tensor:
    logits = model.logits(model(ids_BL, doc_BL))
    return F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: PhoGPT, stream: torch.Tensor, length: int, batch: int, autocast) -> list[float]:
    """[nats in all, tokens predicted] over the stream, window by window (the last one short)."""
    total = torch.zeros(2, dtype=torch.float64, device=stream.device)
    whole = torch.arange(0, len(stream) - length, length, device=stream.device)
    rest = len(whole) * length
    groups = [(starts, length) for starts in whole.split(batch)]
    if len(stream) - 1 > rest:
        groups.append((torch.tensor([rest], device=stream.device), len(stream) - 1 - rest))
    for starts, size in groups:
        ids, doc, targets = window(stream, starts, size)
        with autocast():
            total[0] += loss_of(model, ids, doc, targets, reduction="sum")
        total[1] += (targets >= 0).sum()
    return total.tolist()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(args: argparse.Namespace) -> dict:
    """Pretrain and write the base; returns what pretraining.json holds."""
    data, device = Path(args.data), torch.device(args.device)
    counts, train_stream, heldout_stream = read_data(data, device)
    torch.manual_seed(args.seed)
    shape = ModelConfig(args.d_model, args.heads, args.layers, counts["vocab_size"],
                        counts["max_seq_len"], args.expansion_ratio)
    config = vinai_config(shape)
    model = PhoGPT(ModelConfig.from_json(config, where="--d-model, --heads"))  # checks the shape
    initialise(model)
    model.to(device)
    bf16 = device.type == "cuda" and training_dtype(this_card())[0] == torch.bfloat16
    report = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "arithmetic": "bf16 autocast, fp32 weights" if bf16 else "fp32",
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "out")},
        "corpus": counts,
    }
    print(f"{report['parameters']:,} parameters on {report['card']} in {report['arithmetic']}")

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    def heldout() -> dict:
        batch = max(1, args.batch_tokens // args.window)
        nats, tokens = evaluate(model, heldout_stream, args.window, batch, autocast)
        return {"nats_a_token": nats / tokens, "nats_a_byte": nats / counts["heldout_bytes"]}

    report |= {"tokens_seen": 0, "seconds": 0.0, "curve": []}
    if not args.random:
        report |= fit(model, train_stream, args, autocast, heldout)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    report["heldout_as_saved"] = heldout()  # of the weights rounded to bf16
    print(f"saved: held-out {report['heldout_as_saved']['nats_a_token']:.4f} nats a token")
    weights = ((name, weight.bfloat16()) for name, weight in model.state_dict().items())
    write_checkpoint(Path(args.out), config, weights, tokenizer=data)
    write_json(Path(args.out) / "pretraining.json", report)
    if not args.random:
        print_samples(model, Tokenizer.from_file(str(data / "tokenizer.json")))
    return report


def read_data(data: Path, device: torch.device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """corpus.json and the two token streams, on the device as int32."""
    for name in ("corpus.json", "train.bin", "heldout.bin", *TOKENIZER_FILES):
        if not (data / name).is_file():
            raise Refusal(f"--data {data}: {name} is missing; run "
                          f"python -m phogpt_raw.nano.recipe.prepare --out {data} first")
    counts = json.loads((data / "corpus.json").read_text())
    streams = [np.fromfile(data / name, dtype=np.uint16) for name in ("train.bin", "heldout.bin")]
    return counts, *(torch.from_numpy(s.astype(np.int32)).to(device) for s in streams)


def fit(model: PhoGPT, stream, args: argparse.Namespace, autocast, heldout) -> dict:
    """Train, and leave the weights of the lowest held-out loss in the model; returns the curve.

    The loop reads the loss only where it prints, so the host stays ahead of the GPU.
    """
    length, batch = args.window, args.batch_tokens // args.window
    if batch < 1 or length > model.config.max_seq_len or len(stream) <= 2 * length * batch:
        raise Refusal(
            f"--window {length} --batch-tokens {args.batch_tokens}: a batch needs one window, a "
            f"window at most {model.config.max_seq_len} tokens, and the {len(stream):,} training "
            "tokens two batches"
        )
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    loss_fn = torch.compile(loss_of) if args.compile else loss_of
    generator = torch.Generator().manual_seed(args.seed)
    an_epoch = (len(stream) - length) // length // batch  # fits from every offset
    steps = min(int(args.epochs * an_epoch), args.max_steps or sys.maxsize)
    quarters = {round(q * an_epoch / 4) for q in range(1, int(4 * args.epochs) + 1)} | {steps}
    curve, best, best_weights = [], math.inf, None
    running, counted = torch.zeros((), device=stream.device), 0
    begun = time.perf_counter()
    for step in range(steps):
        if step % an_epoch == 0:
            starts = shuffled_starts(len(stream), length, generator).to(stream.device)
        place = step % an_epoch * batch
        batch_of = window(stream, starts[place : place + batch], length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        with autocast():
            loss = loss_fn(model, *batch_of)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.detach()
        counted += 1
        if step + 1 in quarters or counted == 50:
            seconds = time.perf_counter() - begun
            line = f"step {step + 1}/{steps}  train {running.item() / counted:.4f}"
            if step + 1 in quarters:
                now = dict(step=step + 1, tokens=(step + 1) * batch * length)
                now |= dict(train=running.item() / counted, **heldout())
                curve.append(now)
                if now["nats_a_token"] < best:
                    best = now["nats_a_token"]
                    best_weights = {k: v.clone() for k, v in model.state_dict().items()}
                line += f"  held-out {now['nats_a_token']:.4f} ({now['nats_a_byte']:.4f} a byte)"
            print(f"{line}  {seconds:.0f} s", flush=True)
            running.zero_()
            counted = 0
    model.load_state_dict(best_weights)
    return {
        "tokens_seen": steps * batch * length,
        "seconds": round(time.perf_counter() - begun, 1),
        "kept_step": min(curve, key=lambda row: row["nats_a_token"])["step"],
        "curve": curve,
    }


def make_optimizer(model: PhoGPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, not biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)],
        lr=lr, betas=(0.9, 0.95), fused=model.head.is_cuda,
    )  # fmt: skip


@torch.no_grad()
def print_samples(model: PhoGPT, tokenizer: Tokenizer, new_tokens: int = 60) -> None:
    """A few continuations (temperature 0.7, the 40 likeliest tokens)."""
    for prompt in SAMPLES:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.head.device)
        for _ in range(new_tokens):
            likely = model.logits(model(ids)[0, -1]).float().topk(40)
            choice = torch.multinomial((likely.values / 0.7).softmax(0), 1)
            ids = torch.cat([ids, likely.indices[choice][None]], dim=1)
            if ids[0, -1] == EOS:
                break
        print(f"---\n{tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)}")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", required=True, help="folder that `prepare` wrote")
    flag("--out", required=True, help="folder for the base")
    flag("--epochs", type=float, default=8)
    flag("--max-steps", type=int, help="stop the schedule here, for a trial")
    flag("--d-model", type=int, default=256)
    flag("--layers", type=int, default=8)
    flag("--heads", type=int, default=8)
    flag("--expansion-ratio", type=int, default=4)
    flag("--lr", type=float, default=6e-3, help="peak learning rate")
    flag("--warmup", type=int, default=100, help="steps")
    flag("--weight-decay", type=float, default=0.1, help="of matrices")
    flag("--clip", type=float, default=1.0, help="norm of the gradient")
    flag("--batch-tokens", type=int, default=65536, help="a step")
    flag("--window", type=int, default=512, help="tokens of one row")
    flag("--seed", type=int, default=0)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--compile", action="store_true", help="torch.compile the loss")
    flag("--random", action="store_true", help="write the initial weights: the control")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
