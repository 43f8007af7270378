"""A side of the comparison in peer.py: this loop, or transformers' Trainer, in its own process.

Both train from one checkpoint of random weights and from the same adapters, whose first values are
saved beside it by the side that comes first. peer.py starts this file, once a side.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import command_line
from bench.command_line import Setting
from bench.measure import LR, Bench, context_gib, limit_torch_to
from bench.meter import device_gib
from bench.random_data import random_rows, random_tensors, window_of
from phogpt_raw.cards import DTYPES
from phogpt_raw.model.checkpoint_format import vinai_config, write_checkpoint
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.refusal import Refusal

SHARDS = 8  # of 1.9 GB each for 7B5


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, folder: Path, options):
        command = [sys.executable, "-m", "bench.sides", name, "--model", str(folder),
                   "--dtype", options.dtype, "--rank", str(options.rank),
                   "--loss-mib", str(options.loss_mib)]
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


class Ours:
    """This loop, its micro-batches captured or eager, over a checkpoint folder."""

    def __init__(self, options):
        self.bench = Bench(options)
        self.bench.model.train()
        self.context_gib = self.bench.context_gib
        adapters = self.bench.adapters
        self.first = adapters.flat.detach().clone()
        start = Path(options.model) / "adapters"
        if not start.exists():
            adapters.save(start)
        adapters.load(start)

    def steps(self, micro_batch: int, seq_len: int, count: int, path: str, recompute: str):
        """(loss, seconds) of each of `count` steps, from the first adapters on."""
        bench, vocabulary = self.bench, self.bench.model.config.vocab_size
        bench.adapters.flat.data.copy_(self.first)
        bench.adapters.cast()
        bench.restart()
        bench.begin(Setting(seq_len, micro_batch, 1, recompute), capture=path == "captured")
        for step in range(count):
            window = window_of(random_rows(vocabulary, micro_batch, seq_len, step))
            started = now()
            loss = bench.run(window).loss
            yield loss, now() - started

    def release(self) -> None:
        self.bench.release()


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
        self.context_gib = context_gib()
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
                for ids in random_rows(vocabulary, micro_batch, seq_len, step)]

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
    """A JSON order a line on standard input, its answer on standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    side = {"ours": Ours, "peer": Peer}[options.side](options)
    print(json.dumps({"beside_gib": side.context_gib}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        limit_torch_to(order.pop("cap_gib"))
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


def write_random_checkpoint(folder: Path, shape: ModelConfig, seed: int = 0) -> None:
    """Random weights that our reader and transformers' MPT read alike.

    transformers' MPT has no biases, so all are zero. It accepts only the integer 0 for attn_pdrop,
    where VinAI's file has 0.0.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = vinai_config(shape, attn_config={"attn_pdrop": 0})
    tensors = random_tensors(shape, seed=seed, device=device, zero_biases=True)
    write_checkpoint(folder, config, tensors, shards=SHARDS, kind="safetensors")


if __name__ == "__main__":
    parser = command_line.parser(__doc__)
    parser.add_argument("side", choices=("ours", "peer"))
    serve(parser.parse_args())
