"""Everything wired once: `wire` for a step (train.py, bench/ and simulate/ alike), `set_up` for a
run of train.py.

Errors are found before anything slow: tokenizer and rows, the run's folder and the adapters'
settings are checked before the base's weights are read.
"""

import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from phogpt_raw.cards import Card, dtype_name, known_card, this_card, training_dtype
from phogpt_raw.command_line import asked_by
from phogpt_raw.config import Config
from phogpt_raw.data.batches import Stream, TokenStream
from phogpt_raw.data.examples import Examples, load_examples, stand_ins
from phogpt_raw.data.packing import Packing
from phogpt_raw.files import expanded
from phogpt_raw.model.adapter_config import check_not_merged, read_adapter_config
from phogpt_raw.model.adapters import (
    Adapters,
    check_targets,
    load_adapters,
    new_adapters,
)
from phogpt_raw.model.base_identity import base_hash
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.model.weights import (
    PINNED_IDS,
    WITHOUT_WEIGHTS,
    base_on_meta,
    find_folder,
    read_config,
    read_model,
    read_tokenizer,
    shape_alone,
)
from phogpt_raw.refusal import Refusal
from phogpt_raw.training.evaluate import Score, evaluate
from phogpt_raw.training.graphs import GraphedModel, why_not
from phogpt_raw.training.limits import Limits
from phogpt_raw.training.loss import chunk_rows
from phogpt_raw.training.metrics import summary_writer
from phogpt_raw.training.optim import make_optimizer
from phogpt_raw.training.run import Run
from phogpt_raw.training.step import Training

EPOCHS = 3  # where neither --steps nor --epochs is given
PLANNED = 512  # steps whose rows decide the row lengths and what is captured


def make_scaler(dtype: torch.dtype, device: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16. In bf16 and fp32 the scale stays 1 and only the check matters: a step
    whose gradient is not finite is skipped.

    2^12 to begin with: torch's default of 2^16 overflows for the first steps of every run.
    """
    if device == "meta":
        return torch.amp.GradScaler("cuda", enabled=False)  # there is no value to check
    if dtype == torch.float16:
        return torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=200)
    return torch.amp.GradScaler(device, init_scale=1.0, growth_interval=2**30)


def wire(model: PhoGPT, adapters: Adapters, *, optimizer: str = Config.optimizer,
         lr: float = Config.lr, weight_decay: float = Config.weight_decay,
         clip: float = Config.clip, micro_batch: int = 1, loss_mib: int = Config.loss_mib,
         recompute: int = 0, graphs: bool = False) -> Training:
    """The parts of a step over a model with adapters; the model's head gives device and dtype."""
    limits = Limits(micro_batch, chunk_rows(model.config.vocab_size, loss_mib), recompute, graphs)
    return Training(
        model=model, adapters=adapters,
        optimizer=make_optimizer(adapters.flat, optimizer, lr, weight_decay),
        scaler=make_scaler(model.head.dtype, model.head.device.type), limits=limits, clip=clip,
        forward=forward_of(model, adapters, limits),
    )


def forward_of(model: PhoGPT, adapters: Adapters, limits: Limits) -> PhoGPT | GraphedModel:
    """The forward that a step calls: the model, or its CUDA graphs if the limits allow them."""
    return GraphedModel(model, adapters.flat, limits) if limits.graphs else model


@dataclass
class Job(Training):
    """A run of train.py: the parts of its steps, its data, its folder. `tokenizer` is None in a
    plan for a built-in shape, whose examples are stand-ins."""

    config: Config
    card: Card
    dtype_reason: str
    tokenizer: object
    examples: Examples
    stream: Stream
    run: Run
    not_captured: str | None  # the reason

    def evaluate(self) -> Score | None:
        """The adapters' score on the held-out rows, None where there are none."""
        if not self.examples.held_out:
            return None
        memory = nullcontext if self.forward is self.model else self.forward.memory
        return evaluate(self.model, self.tokenizer, self.examples.held_out, self.config,
                        self.limits, self.stream.packing, memory)

    def planned(self, start: int = 0) -> range:
        """The steps from `start` on, up to a limit; they decide row lengths and captures."""
        return range(start, min(self.run.steps, start + PLANNED))

    def pack(self, packing: Packing | None) -> None:
        """Use this layout of rows; only shapes that occur often enough become CUDA graphs."""
        self.stream.packing = packing
        if self.limits.graphs:
            self.forward.expected = Counter(
                shape for step in self.planned(self.run.state.step)
                for shape in self.stream.window(step).shapes(self.limits.micro_batch))


def with_own_adapter(config: Config) -> Config:
    """The config with the rank, alpha, dropout and targets of the adapter that --adapter names."""
    lora = read_adapter_config(expanded(config.adapter))
    targets = lora.target_modules
    targets = targets if isinstance(targets, str) else ",".join(sorted(targets))
    return replace(config, rank=lora.r, alpha=lora.lora_alpha, dropout=lora.lora_dropout,
                   targets=targets)


def check_asked(config: Config, shape: ModelConfig) -> None:
    """Raise Refusal for a --rank above the model's width, or for --targets or --recompute that the
    base does not have."""
    if config.rank > shape.d_model:
        raise Refusal(f"--rank {config.rank}: the model's matrices have {shape.d_model} columns, "
                      f"and a rank is below that; 8 to 64 is usual")
    if not config.adapter:
        with torch.device("meta"):
            check_targets(PhoGPT(shape), config.target_names())
    if config.recompute != "auto":
        config.blocks_to_recompute(shape.n_layers)


def make_stream(examples: Examples, config: Config, pad_id: int) -> Stream:
    """Windows of --batch-size examples or of --batch-tokens tokens; Refusal where an example is
    longer than such a window."""
    longest = max(examples.train, key=lambda e: len(e.ids))
    if config.batch_tokens and config.batch_tokens < len(longest.ids):
        raise Refusal(f"{longest.where}: {len(longest.ids)} tokens are more than --batch-tokens "
                      f"{config.batch_tokens}; raise it or lower --max-len")
    if config.batch_tokens:
        return TokenStream(examples.train, batch_tokens=config.batch_tokens, pad_id=pad_id,
                           seed=config.seed)
    return Stream(examples.train, batch_size=config.batch_size, pad_id=pad_id, seed=config.seed)


def set_up(config: Config, examples: Examples | None = None) -> Job:
    """All parts of a run that a Config describes; raises Refusal for settings that are not valid.

    `examples` are used in place of the config's files. How rows are packed and --recompute auto are
    not decided here: they need a simulated step (simulate/fit.py).
    """
    if config.tensorboard:
        summary_writer()
    if config.adapter:
        config = with_own_adapter(config)
    card = known_card(config.card) if config.card else this_card()
    dtype, dtype_reason = training_dtype(card, config.dtype, asked_by(config, "dtype"))
    shape = shape_alone(config.model, card, planned=config.dry_run)
    if shape and config.max_len > shape.max_seq_len:
        raise Refusal(f"--max-len {config.max_len}: {config.model} has rows of up to "
                      f"{shape.max_seq_len} tokens")
    folder = None if shape else find_folder(config.model, config.revision, files=WITHOUT_WEIGHTS)
    shape = shape or read_config(folder)
    if config.adapter and folder:
        check_not_merged(folder, expanded(config.adapter))
    check_asked(config, shape)
    tokenizer = folder and read_tokenizer(folder, shape)
    if examples is None:
        examples = load_examples(tokenizer, config) if tokenizer else stand_ins(config)
    stream = make_stream(examples, config, PINNED_IDS["pad"])
    if config.patience and not examples.held_out:
        raise Refusal(f"--patience {config.patience}: counts evaluations, and no row is held out; "
                      f"give --hold-out or --val, or leave it out")
    steps = config.steps or stream.steps(config.epochs or EPOCHS)
    run = Run(replace(config, dtype=dtype_name(dtype)), steps, examples)

    if config.dry_run or config.inspect:  # needs shapes alone
        model = base_on_meta(shape, dtype, nf4=config.nf4)
    else:
        folder = find_folder(config.model, config.revision)  # the weights too
        run.over(base_hash(folder))
        model = read_model(folder, nf4=config.nf4, dtype=dtype, device=torch.device(card.device),
                           nf4_cache=config.nf4_cache)
    base = config.base_reference()
    if config.adapter:
        adapters = load_adapters(model, expanded(config.adapter), base, config.revision)
    else:
        adapters = new_adapters(model, rank=config.rank, alpha=config.alpha,
                                dropout=config.dropout, targets=config.target_names(),
                                base=base, revision=config.revision, seed=config.seed)
    not_captured = why_not(model, card.device, config.capture)
    training = wire(model, adapters, optimizer=config.optimizer, lr=config.lr,
                    weight_decay=config.weight_decay, clip=config.clip,
                    micro_batch=config.micro_batch, loss_mib=config.loss_mib,
                    graphs=not_captured is None and not model.head.is_meta)
    torch.manual_seed(config.seed)  # dropout's; a resumed run restores its own
    random.seed(config.seed)  # so that the checkpoints of two processes are equal
    return Job(**vars(training), config=config, card=card, dtype_reason=dtype_reason,
               tokenizer=tokenizer, examples=examples, stream=stream, run=run,
               not_captured=not_captured)
