"""Build all objects of a training step or of a whole run.

`wire` builds the objects of a step, for train.py, bench/ and simulate/. `set_up` builds a run of
train.py. Errors are reported before slow work starts. The tokenizer, the rows, the run's folder and
the adapters' settings are checked before the base's weights are read.
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

EPOCHS = 3  # number of epochs if neither --steps nor --epochs is given
# The row lengths and the captured shapes are chosen from the rows of at most this number of steps.
PLANNED = 512


def make_scaler(dtype: torch.dtype, device: str) -> torch.amp.GradScaler:
    """Create the GradScaler. It skips a step whose gradient is not finite.

    In fp16 it also scales the loss. The scale starts at 2^12, because torch's default of 2^16
    overflows in the first steps of every run. In bf16 and fp32 the scale stays 1.
    """
    if device == "meta":
        return torch.amp.GradScaler("cuda", enabled=False)  # meta tensors have no values
    if dtype == torch.float16:
        return torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=200)
    return torch.amp.GradScaler(device, init_scale=1.0, growth_interval=2**30)


def wire(model: PhoGPT, adapters: Adapters, *, optimizer: str = Config.optimizer,
         lr: float = Config.lr, weight_decay: float = Config.weight_decay,
         clip: float = Config.clip, micro_batch: int = 1, loss_mib: int = Config.loss_mib,
         recompute: int = 0, graphs: bool = False) -> Training:
    """Build the objects of a training step for a model with adapters.

    Device and dtype are those of the model's head. loss_mib: MiB for the logits of one chunk.
    """
    limits = Limits(micro_batch, chunk_rows(model.config.vocab_size, loss_mib), recompute, graphs)
    return Training(
        model=model, adapters=adapters,
        optimizer=make_optimizer(adapters.flat, optimizer, lr, weight_decay),
        scaler=make_scaler(model.head.dtype, model.head.device.type), limits=limits, clip=clip,
        forward=forward_of(model, adapters, limits),
    )


def forward_of(model: PhoGPT, adapters: Adapters, limits: Limits) -> PhoGPT | GraphedModel:
    """The object that a step calls for its forward: the model, or a GraphedModel that wraps it."""
    return GraphedModel(model, adapters.flat, limits) if limits.graphs else model


@dataclass
class Job(Training):
    """A run of train.py: the objects of a step, the data and the run's folder.

    tokenizer: None in a plan for a built-in model shape. The examples are then placeholders.
    """

    config: Config
    card: Card
    dtype_reason: str
    tokenizer: object
    examples: Examples
    stream: Stream
    run: Run
    not_captured: str | None  # why CUDA graphs are off; None if they are on

    def evaluate(self) -> Score | None:
        """The adapters' score on the held-out rows; None if no rows are held out."""
        if not self.examples.held_out:
            return None
        memory = nullcontext if self.forward is self.model else self.forward.memory
        return evaluate(self.model, self.tokenizer, self.examples.held_out, self.config,
                        self.limits, self.stream.packing, memory)

    def planned(self, start: int = 0) -> range:
        """At most PLANNED steps from `start` on. Row lengths and captured shapes depend on these
        steps."""
        return range(start, min(self.run.steps, start + PLANNED))

    def pack(self, packing: Packing | None) -> None:
        """Set how rows are packed, and count the shapes of the micro-batches in the planned steps.

        Only shapes that occur often enough become CUDA graphs.
        """
        self.stream.packing = packing
        if self.limits.graphs:
            self.forward.expected = Counter(
                shape for step in self.planned(self.run.state.step)
                for shape in self.stream.window(step).shapes(self.limits.micro_batch))


def with_own_adapter(config: Config) -> Config:
    """A copy of the config with the rank, alpha, dropout and targets of the --adapter folder."""
    lora = read_adapter_config(expanded(config.adapter))
    targets = lora.target_modules
    targets = targets if isinstance(targets, str) else ",".join(sorted(targets))
    return replace(config, rank=lora.r, alpha=lora.lora_alpha, dropout=lora.lora_dropout,
                   targets=targets)


def check_asked(config: Config, shape: ModelConfig) -> None:
    """Raise Refusal if --rank is larger than the model's width, if --targets names a layer that
    the base does not have, or if --recompute is larger than the number of blocks."""
    if config.rank > shape.d_model:
        raise Refusal(f"--rank {config.rank}: the model's matrices have {shape.d_model} columns, "
                      f"and a rank cannot be larger; 8 to 64 is usual")
    if not config.adapter:
        with torch.device("meta"):
            check_targets(PhoGPT(shape), config.target_names())
    if config.recompute != "auto":
        config.blocks_to_recompute(shape.n_layers)


def steps_known(config: Config, tokenizer) -> bool:
    """Whether the number of steps is known. The plan of a shape has no tokenizer. Without --data it
    also has no rows, so only --steps gives the number."""
    return bool(tokenizer or config.data or config.steps)


def check_warmup(config: Config, steps: int) -> None:
    """Raise Refusal if the warm-up is not shorter than the run."""
    if config.warmup and config.warmup >= steps:
        raise Refusal(f"--warmup {config.warmup}: must be below the run's number of steps, which "
                      f"is {steps:,}; lower --warmup, or raise --steps or --epochs")


def make_stream(examples: Examples, config: Config, pad_id: int) -> Stream:
    """The stream of accumulation windows: each has --batch-size examples, or at most --batch-tokens
    tokens. Raises Refusal if an example has more than --batch-tokens tokens."""
    longest = max(examples.train, key=lambda e: len(e.ids))
    if config.batch_tokens and config.batch_tokens < len(longest.ids):
        raise Refusal(f"{longest.where}: {len(longest.ids):,} tokens are more than --batch-tokens "
                      f"{config.batch_tokens}; raise --batch-tokens or lower --max-len")
    if config.batch_tokens:
        return TokenStream(examples.train, batch_tokens=config.batch_tokens, pad_id=pad_id,
                           seed=config.seed)
    return Stream(examples.train, batch_size=config.batch_size, pad_id=pad_id, seed=config.seed)


def set_up(config: Config, examples: Examples | None = None) -> Job:
    """Build the run that a Config describes. Raises Refusal if a setting is not valid.

    examples: used instead of the config's data files. The packing of rows and the number of
    recomputed blocks are not chosen here. simulate/fit.py chooses them from a simulated step.
    """
    if config.tensorboard:
        summary_writer()
    if config.adapter:
        config = with_own_adapter(config)
    card = known_card(config.card) if config.card else this_card()
    dtype, dtype_reason = training_dtype(card, config.dtype, asked_by(config, "dtype"))
    shape = shape_alone(config.model, card, planned=config.dry_run)
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
        raise Refusal(f"--patience {config.patience}: needs held-out rows, and there are none; "
                      f"give --hold-out or --val, or omit --patience")
    steps = config.steps or stream.steps(config.epochs or EPOCHS)
    if steps_known(config, tokenizer):
        check_warmup(config, steps)
    run = Run(replace(config, dtype=dtype_name(dtype)), steps, examples)

    if config.dry_run or config.inspect:  # only shapes are needed
        model = base_on_meta(shape, dtype, nf4=config.nf4)
    else:
        folder = find_folder(config.model, config.revision)  # now with the weights
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
    torch.manual_seed(config.seed)  # for dropout; a resumed run restores its saved state
    random.seed(config.seed)  # so that the checkpoints of two processes are equal
    return Job(**vars(training), config=config, card=card, dtype_reason=dtype_reason,
               tokenizer=tokenizer, examples=examples, stream=stream, run=run,
               not_captured=not_captured)
