"""A side of peer.py in its own process: this loop, or transformers' Trainer.

Both sides start from the same checkpoint of random weights and from the same adapters. This loop's
process starts first, and saves the initial values of the adapters in the checkpoint's folder.
peer.py runs this file once for each side.
"""

import tempfile
from pathlib import Path

import torch

from bench import command_line
from bench.command_line import Setting
from bench.measure import LR, Bench, context_gib
from bench.process import Side, now, serve
from bench.random_data import random_rows, random_tensors, window_of
from phogpt_raw.cards import DTYPES
from phogpt_raw.model.checkpoint_format import vinai_config, write_checkpoint
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import NANO

SHARDS = 8  # number of files of weights; for 7B5 each has 1.9 GB


def start(name: str, folder: Path, options) -> Side:
    """Start the process of the side `ours` or `peer` over the checkpoint in `folder`."""
    return Side(name, "bench.sides", name, "--model", str(folder), "--dtype", options.dtype,
                "--rank", str(options.rank), "--loss-mib", str(options.loss_mib))


class Ours:
    """train.py's training step, on the model of a checkpoint's folder. It runs as CUDA graphs or
    eagerly."""

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
        """Yield (loss, seconds) for each of `count` steps, starting from the initial adapters.

        path: "captured" runs the steps as CUDA graphs, "eager" runs them without graphs.
        """
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
    """transformers' Trainer, with PEFT's adapters over bitsandbytes' linear layers."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from peft import PeftModel, prepare_model_for_kbit_training

        self.dtype = dtype
        model = transformers_base(folder, dtype)
        model.config.use_cache = False
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        self.context_gib = context_gib()
        self.model = PeftModel.from_pretrained(model, folder / "adapters", is_trainable=True)
        self.first = {n: p.detach().clone() for n, p in self.model.named_parameters()
                      if p.requires_grad}

    def steps(self, micro_batch: int, seq_len: int, count: int, **_):
        from transformers import Trainer, TrainerCallback

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
                return torch.utils.data.SequentialSampler(rows)  # this loop's order of rows

            def compute_loss(self, *given, **named):
                loss = super().compute_loss(*given, **named)
                losses.append(loss.detach())
                return loss

        self.train(Watched, rows, Clock(), per_device_train_batch_size=micro_batch,
                   max_steps=count)
        yield from zip(losses, times, strict=True)

    def train(self, kind, rows: list[dict], clock, collator=None, **arguments) -> None:
        """Train with a Trainer of class `kind`, starting from the initial adapters.

        The Trainer has the settings that users usually choose. arguments: further
        TrainingArguments.
        """
        from transformers import TrainingArguments

        for name, p in self.model.named_parameters():
            if name in self.first:
                p.data.copy_(self.first[name])
        with tempfile.TemporaryDirectory() as folder:
            given = TrainingArguments(folder, **{
                "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0,
                "max_grad_norm": 1.0, "optim": "paged_adamw_8bit", "gradient_checkpointing": True,
                "logging_strategy": "no", "save_strategy": "no", "report_to": [],
                "disable_tqdm": True, "fp16": self.dtype == torch.float16,
                "bf16": self.dtype == torch.bfloat16, **arguments})
            trainer = kind(self.model, given, train_dataset=rows, data_collator=collator,
                           callbacks=[clock])
            if trainer.accelerator.scaler is not None:
                # with GradScaler's default scale, 2^16, the first steps would be skipped
                trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
            trainer.train()

    def release(self) -> None:
        self.model.zero_grad()


def transformers_base(folder: Path, dtype: torch.dtype):
    """transformers' MPT with bitsandbytes' NF4 linear layers, loaded as users usually do."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.MptForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": 0},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype))


def timed(side, **order) -> dict:
    """Run the steps of a side; return their losses and their seconds."""
    losses, seconds = zip(*side.steps(**order), strict=True)
    return {"losses": [float(x) for x in losses], "seconds": seconds}


def write_random_checkpoint(folder: Path, shape: ModelConfig, seed: int = 0) -> None:
    """Write a checkpoint of random weights with nano's tokenizer.

    This project and transformers' MPT read the same model from the checkpoint, because the
    checkpoint is adapted to transformers' MPT in two ways. transformers' MPT has no biases, so all
    biases in the checkpoint are zero. transformers' MPT accepts only the integer 0 for attn_pdrop,
    so the config has 0 in place of the 0.0 in VinAI's file.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = vinai_config(shape, attn_config={"attn_pdrop": 0})
    tensors = random_tensors(shape, seed=seed, device=device, zero_biases=True)
    write_checkpoint(folder, config, tensors, shards=SHARDS, kind="safetensors", tokenizer=NANO)


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("side", choices=("ours", "peer"))
    options = parser.parse_args()
    serve(lambda: (Ours(options) if options.side == "ours"
                   else Peer(Path(options.model), DTYPES[options.dtype])), timed)


if __name__ == "__main__":
    main()
