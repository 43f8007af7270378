"""Pretrain `nano`, a small PhoGPT, on the output of `prepare`.

    python -m phogpt_raw.nano.recipe.prepare --articles articles.jsonl.gz --out DATA
    python -m phogpt_raw.nano.recipe.pretrain --data DATA --out BASE

The program writes a folder with the same files as a base on the hub. It also writes
pretraining.json, with the settings and the learning curve. The weights are those with the lowest
held-out loss (loop.py says why). Losses are in nats.
"""

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from phogpt_raw.cards import this_card, training_dtype
from phogpt_raw.model.checkpoint_format import vinai_config, write_checkpoint, write_json
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.nano.recipe.evaluate import evaluate
from phogpt_raw.nano.recipe.loop import train_and_keep_best
from phogpt_raw.nano.recipe.stream import read_data
from phogpt_raw.nano.recipe.tokenizer import EOS
from phogpt_raw.refusal import exits_cleanly

SAMPLES = [
    "### Câu hỏi: Hà Nội ở đâu?\n### Trả lời:",
    "### Câu hỏi: Cá voi là gì?\n### Trả lời:",
    "### Câu hỏi:\nLàm thế nào để trồng lúa?\n\n### Trả lời:",
    "Việt Nam là một",
]


@torch.no_grad()
def initialise(model: PhoGPT) -> None:
    """Initialise the weights as in GPT-2 (Radford et al. 2019).

    Biases are set to 0, and the weights of norms to 1. The elements of each matrix are drawn from a
    normal distribution with a mean of 0 and a standard deviation of 0.02. Each layer has two
    matrices whose outputs are added to the residual stream. For these two, the standard deviation
    is 0.02 / sqrt(2 * layers).
    """
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif "norm" in name:
            weight.fill_(1.0)
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            weight.normal_(0.0, 0.02 / (math.sqrt(2 * model.config.n_layers) if residual else 1))


def pretrain(args: argparse.Namespace) -> dict:
    """Pretrain and write the base. Returns the content of pretraining.json."""
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

    def held_out_loss() -> dict:
        rows = max(1, args.batch_tokens // args.seq_len)
        nats, tokens = evaluate(model, heldout_stream, args.seq_len, rows, autocast)
        return {"nats_a_token": nats / tokens, "nats_a_byte": nats / counts["heldout_bytes"]}

    report |= {"tokens_seen": 0, "seconds": 0.0, "curve": []}
    if not args.random:
        report |= train_and_keep_best(model, train_stream, args, autocast, held_out_loss)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    report["heldout_as_saved"] = held_out_loss()  # with weights rounded to bf16
    print(f"saved: held-out {report['heldout_as_saved']['nats_a_token']:.4f} nats a token")
    weights = ((name, weight.bfloat16()) for name, weight in model.state_dict().items())
    write_checkpoint(Path(args.out), config, weights, tokenizer=data)
    write_json(Path(args.out) / "pretraining.json", report)
    if not args.random:
        print_samples(model, Tokenizer.from_file(str(data / "tokenizer.json")))
    return report


@torch.no_grad()
def print_samples(model: PhoGPT, tokenizer: Tokenizer, new_tokens: int = 60) -> None:
    """Print a few continuations, sampled at temperature 0.7 from the 40 likeliest tokens."""
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
    flag("--max-steps", type=int, help="end the schedule here, for a trial")
    flag("--d-model", type=int, default=256)
    flag("--layers", type=int, default=8)
    flag("--heads", type=int, default=8)
    flag("--expansion-ratio", type=int, default=4)
    flag("--lr", type=float, default=6e-3, help="peak learning rate")
    flag("--warmup", type=int, default=100, help="steps")
    flag("--weight-decay", type=float, default=0.1, help="on matrices only")
    flag("--clip", type=float, default=1.0, help="largest norm of the gradient")
    flag("--batch-tokens", type=int, default=65536, help="tokens of a step")
    flag("--seq-len", type=int, default=512, help="tokens of a row")
    flag("--seed", type=int, default=0)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--compile", action="store_true", help="torch.compile the loss")
    flag("--random", action="store_true", help="write the initial weights, as a control")
    pretrain(parser.parse_args(argv))


if __name__ == "__main__":
    main()
