"""Config, a flat, frozen dataclass that holds every setting of a run and checks the values.

command_line.py makes a flag of each field. The trailing comment of a field is the flag's help text.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.files import expanded, write_text
from phogpt_raw.refusal import Refusal


@dataclass(frozen=True)
class Config:
    # model and data
    preset: str | None = None  # t4, v100, nano, none or a TOML file; default: by model and GPU
    model: str = "nano"  # nano, a folder or a hub id; with --dry-run also the shape 7b5 or 4b
    revision: str | None = None  # branch, tag or commit of the hub repository
    data: tuple[str, ...] | str | None = None  # file of training rows; may be given several times
    val: tuple[str, ...] | str | None = None  # file of held-out rows; may be given several times
    hold_out: float | None = None  # held-out rows: 32, or 5%; default: 5% of 40 or more rows
    map: str | None = None  # column of each field: response=tra_loi,prompt=cau_hoi
    strict: bool = False  # refuse a file with unusable rows; default: leave out up to 10% of it
    too_long: str | None = None  # cut, split or drop long rows; default: split texts, cut answers
    data_cache: str | None = None  # folder that stores token ids; makes later starts faster
    template: str = "auto"  # prompt template: auto, 7b5-instruct or 4b-chat
    out: str | None = None  # folder of the run; default: a new folder runs/<model>-NNN
    adapter: str | None = None  # start from this adapter, with its rank and targets
    dry_run: bool = False  # print settings and one example (none for 7b5 and 4b); train nothing
    inspect: int | None = None  # print N packed rows as the model reads them, and train nothing
    json: bool = False  # with --inspect: print each packed row as one line of JSON
    card: str | None = None  # with --dry-run: plan for this GPU: t4, v100, l4, a100 or h200
    # length of the run
    steps: int | None = None  # number of optimizer steps; replaces --epochs
    epochs: float | None = None  # passes over the rows, rounded up to whole steps; default: 3
    # one optimizer step
    batch_size: int = 8  # examples in one optimizer step
    batch_tokens: int | None = None  # maximum tokens in one optimizer step; replaces --batch-size
    micro_batch: int = 1  # rows that go through the model at once
    max_len: int = 1024  # maximum tokens in one example; a longer answer is cut
    packing: bool = True  # put several examples into one row: same result, less time
    pack_len: int | None = None  # maximum tokens in a packed row; a longer example raises it
    lr: float = 2e-4  # peak learning rate
    warmup: int | None = None  # steps of warm-up; default: 5, at most a tenth of all steps
    lr_floor: float = 0.1  # last learning rate divided by the peak learning rate
    clip: float = 1.0  # maximum gradient norm; a larger gradient is scaled down to it
    weight_decay: float = 0.0  # AdamW's weight decay; LoRA seldom needs any
    optimizer: str = "paged_adamw_8bit"  # paged_adamw_8bit or adamw (32-bit)
    seed: int = 0  # random seed for the order of rows and a new adapter's weights
    # adapters
    rank: int = 16  # LoRA rank
    alpha: float = 32  # LoRA alpha: updates are scaled by alpha / rank
    dropout: float = 0.0  # LoRA dropout
    targets: str = "Wqkv,out_proj,up_proj,down_proj"  # linear layers that get adapters
    # precision and memory
    nf4: bool = True  # store the base in 4 bits (NF4); with --no-nf4 in the data type of --dtype
    nf4_cache: str | None = None  # folder that stores the 4-bit base; makes later starts faster
    dtype: str = "auto"  # data type of activations: fp16, bf16, fp32; auto: depends on the GPU
    recompute: str = "auto"  # blocks to recompute: N, all or none; auto: as few as memory allows
    capture: bool = True  # on a GPU: use CUDA graphs for repeated micro-batch shapes (faster)
    loss_mib: int = 256  # maximum memory of one chunk of logits, in MiB
    # evaluation and saving
    eval_every: int = 50  # steps between evaluations; 0: evaluate only at the start and the end
    eval_answers: int = 8  # held-out questions that each evaluation answers; 0: none
    answer_tokens: int = 96  # maximum tokens in each of these answers
    patience: int = 0  # stop after N evaluations without a lower validation loss; 0: never
    save_every: int = 50  # steps between checkpoints; each evaluation saves one too; 0: only these
    keep: int = 2  # number of newest checkpoints to keep; the best one is also kept
    max_minutes: float | None = None  # save and stop after this time; the run can be resumed
    tensorboard: bool = False  # also write the values of metrics.jsonl for TensorBoard
    max_skipped: int = 20  # stop after N steps in a row with gradients that are not finite

    def __post_init__(self):
        for name in ("data", "val"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):  # a list of one name is stored as a str
                object.__setattr__(self, name, value[0] if len(value) == 1 else tuple(value))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses nan
                raise Refusal(f"--{flag(name)} {number_text(value)}: must be from {low:,} to "
                              f"{high:,}")
        for name, value in vars(self).items():
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise Refusal(f"--{flag(name)}: is empty; give a value, or leave it out")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise Refusal(f"--{flag(name)} {getattr(self, name)}: choose from "
                              f"{', '.join(filter(None, choices))}")
        for name, most in ABOVE_ZERO.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise Refusal(f"--{flag(name)} {number_text(value)}: must be above 0, and at most "
                              f"{most:,}")
        if self.steps is not None and self.epochs is not None:
            raise Refusal("--steps and --epochs: give one of them")
        if not re.fullmatch(r"auto|all|none|\d+", self.recompute):
            raise Refusal(f"--recompute {self.recompute}: auto, all, none or a number of blocks")
        check_nf4_cache(self.nf4_cache, nf4=self.nf4)
        if self.adapter and self.out and same_folder(self.adapter, self.out):
            raise Refusal(f"--adapter {self.adapter} --out {self.out}: the new run would "
                          f"overwrite the adapter that it starts from; name another --out, or "
                          f"leave out --adapter to resume that run")
        if self.val is not None and self.hold_out:
            raise Refusal("--val and --hold-out: give one of them")
        if self.hold_out and self.hold_out >= 1 and self.hold_out % 1:
            raise Refusal(f"--hold-out {self.hold_out}: must be a share below 1 or a whole number")
        if self.card and not self.dry_run and not self.inspect:
            raise Refusal(f"--card {self.card}: needs --dry-run; training uses this computer's GPU")
        if self.json and self.inspect is None:
            raise Refusal("--json: needs --inspect N; give both")
        if self.patience and not self.eval_every:
            raise Refusal("--patience: needs evaluations; set --eval-every above 0")

    def warmup_of(self, steps: int) -> int:
        """The number of warm-up steps in a run of `steps` steps."""
        return min(WARMUP, steps // 10) if self.warmup is None else self.warmup

    def target_names(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def base_name(self) -> str:
        """The name of the base in published files: its hub id, or its folder's name without the
        path."""
        return hub_id(self.model) or expanded(self.model).resolve().name

    def base_reference(self) -> str:
        """The name of the base in the adapter's files: nano, a hub id, or a folder's absolute path.
        The absolute path is valid in any working directory."""
        folder = expanded(self.model)
        return str(folder.absolute()) if self.model != "nano" and folder.is_dir() else self.model

    def blocks_to_recompute(self, blocks: int) -> int:
        """The number of blocks that --recompute requires. --recompute must not be auto here.

        blocks: the number of all blocks of the model.
        """
        if self.recompute in ("all", "none"):
            return blocks if self.recompute == "all" else 0
        if int(self.recompute) > blocks:
            raise Refusal(f"--recompute {self.recompute}: the model has {blocks} blocks")
        return int(self.recompute)


MANY = 10**9  # upper limit of settings that are counts
RANGES = dict(steps=(1, MANY), batch_size=(1, 10_000), batch_tokens=(1, 10_000_000),
              micro_batch=(1, 100_000), max_len=(8, 1_000_000), pack_len=(1, 1_000_000),
              warmup=(0, MANY), rank=(1, 65_536), loss_mib=(1, 1_000_000), eval_every=(0, MANY),
              eval_answers=(0, MANY), answer_tokens=(1, 1_000_000), save_every=(0, MANY),
              hold_out=(0, MANY), seed=(0, 2**32 - 1), weight_decay=(0, 100),
              max_skipped=(1, MANY), patience=(0, MANY), keep=(1, MANY), max_minutes=(0, MANY),
              inspect=(1, MANY), lr_floor=(0, 1), dropout=(0, 0.99))
ABOVE_ZERO = dict(lr=1e38, clip=MANY, alpha=1_000_000, epochs=1_000_000)
# Default number of warm-up steps. The learning rate is low in these steps, because AdamW's estimate
# of the second moment is still unreliable.
WARMUP = 5
CHOICES = dict(template=("auto", "7b5-instruct", "4b-chat"),
               too_long=(None, "cut", "split", "drop"), dtype=("auto", "fp16", "bf16", "fp32"),
               optimizer=("paged_adamw_8bit", "adamw"))


def same_folder(adapter: str, out: str) -> bool:
    """Whether the adapter is in the folder `out` or in one of its checkpoints."""
    folder, written = (Path(path).expanduser().resolve() for path in (adapter, out))
    return written in (folder, folder.parent)


def hub_id(model: str) -> str | None:
    """The hub id of a base; None if the base is nano or a folder."""
    local = model == "nano" or expanded(model).is_dir()
    return None if local or model.count("/") != 1 else model


def check_nf4_cache(folder: str | Path | None, *, nf4: bool) -> None:
    if folder == "":
        raise Refusal("--nf4-cache: is empty; name a folder")
    if folder is not None and not nf4:
        raise Refusal(f"--nf4-cache {folder}: stores NF4 weights; leave out this flag or --no-nf4")


def flag(field: str) -> str:
    return field.replace("_", "-")


def number_text(value: float) -> str:
    """The text of a flag's number. A whole number has no fraction, because few people type one.

    >>> number_text(-3.0), number_text(0.5), number_text(10**20)
    ('-3', '0.5', '100000000000000000000')
    """
    return str(value).removesuffix(".0")


def save(config: Config, file: Path, **more) -> None:
    """Write the settings of a run and the values in `more` to a JSON file."""
    text = json.dumps(dataclasses.asdict(config) | more, indent=2, ensure_ascii=False)
    write_text(file, text + "\n")
