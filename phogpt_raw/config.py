"""Every number of a run in one flat, frozen dataclass: default < preset < flag.

The command line is built from the fields, so a field is a flag (`--micro-batch` or
`--micro_batch`), its trailing comment the help text, and there is no second list to keep in step.
"""

import argparse
import dataclasses
import inspect
import json
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.refusal import Refusal

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Config:
    # what
    model: str = "nano"  # nano, a folder, or a hub id such as vinai/PhoGPT-4B-Chat
    revision: str | None = None  # the hub repository's branch, tag or commit
    data: str | None = None  # training rows; default for nano: its bundled pairs
    val: str | None = None  # held-out rows; default for nano: its bundled ones
    hold_out: int = 0  # rows of --data kept out for validation where --val is not given
    template: str = "auto"  # auto, 7b5-instruct or 4b-chat: how a row becomes a prompt
    out: str | None = None  # run folder; default runs/<model>-NNN, a new number each time
    adapter: str | None = None  # go on from this adapter (its rank and targets) with new data
    dry_run: bool = False  # print the whole plan and train nothing
    # how long
    steps: int | None = None  # optimizer steps; or --epochs
    epochs: float | None = None  # passes over the data; or --steps (default: 3 epochs)
    # one optimizer step
    batch_size: int = 8  # rows an optimizer step sees
    micro_batch: int = 1  # rows that go through the model at once
    max_len: int = 1024  # tokens a row may have; a longer answer is cut, and said
    lr: float = 2e-4  # peak learning rate
    warmup: int = 10  # steps of linear warm-up
    lr_floor: float = 0.1  # where the cosine ends, as a share of the peak
    clip: float = 1.0  # largest gradient norm
    weight_decay: float = 0.0  # AdamW's decoupled decay; LoRA's B starts at zero and needs none
    optimizer: str = "paged_adamw_8bit"  # paged_adamw_8bit, or adamw (32-bit)
    seed: int = 0  # of data order and adapter init
    # adapters
    rank: int = 16  # LoRA rank
    alpha: float = 32  # LoRA alpha; updates are scaled by alpha / rank
    dropout: float = 0.0  # LoRA dropout
    targets: str = "Wqkv,out_proj,up_proj,down_proj"  # linear layers that get adapters
    # numbers and memory
    nf4: bool = True  # quantise the base to NF4; --no-nf4 keeps plain weights
    dtype: str = "auto"  # auto, fp16, bf16 or fp32: what activations are computed in
    recompute: str = "auto"  # blocks recomputed in backward: all, none, N, or as the card forces
    capture: bool = True  # on a GPU, run shapes that come again as CUDA graphs
    loss_mib: int = 256  # MiB that one chunk of logits may take, its transients included
    # looking and saving
    eval_every: int = 0  # steps between evaluations; 0: only before, and at the end
    eval_answers: int = 8  # held-out answers written at an evaluation, to see whether they stop
    answer_tokens: int = 96  # tokens such an answer may have
    save_every: int = 0  # steps between checkpoints, beside those at evaluations and at the end

    def __post_init__(self):
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):  # nan is neither
                raise Refusal(f"--{flag(name)} {value}: must be at least {low}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise Refusal(f"--{flag(name)} {getattr(self, name)}: choose from "
                              f"{', '.join(choices)}")
        for name in ("lr", "clip", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise Refusal(f"--{flag(name)} {getattr(self, name)}: must be positive")
        for name in ("lr_floor", "dropout"):
            if not 0 <= getattr(self, name) <= (1 if name == "lr_floor" else 0.99):
                raise Refusal(f"--{flag(name)} {getattr(self, name)}: must be from 0 to 1")
        if self.steps is not None and self.epochs is not None:
            raise Refusal("--steps and --epochs: give one of them")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise Refusal(f"--epochs {self.epochs}: must be positive")
        if not re.fullmatch(r"auto|all|none|\d+", self.recompute):
            raise Refusal(f"--recompute {self.recompute}: auto, all, none or a number of blocks")
        if self.val is not None and self.hold_out:
            raise Refusal("--val and --hold-out: give one of them")

    def target_names(self) -> list[str]:
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def blocks_to_recompute(self, blocks: int) -> int:
        """--recompute, where it is not auto, as a number of the model's `blocks`."""
        if self.recompute in ("all", "none"):
            return blocks if self.recompute == "all" else 0
        if int(self.recompute) > blocks:
            raise Refusal(f"--recompute {self.recompute}: the model has {blocks} blocks")
        return int(self.recompute)


LOWEST = dict(steps=1, batch_size=1, micro_batch=1, max_len=8, warmup=0, rank=1, loss_mib=1,
              eval_every=0, eval_answers=0, answer_tokens=1, save_every=0, hold_out=0, seed=0,
              weight_decay=0)
CHOICES = dict(template=("auto", "7b5-instruct", "4b-chat"), dtype=("auto", "fp16", "bf16", "fp32"),
               optimizer=("paged_adamw_8bit", "adamw"))


def flag(field: str) -> str:
    return field.replace("_", "-")


def comments() -> dict[str, str]:
    """Each field's trailing comment, which is its help text."""
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE)
    return dict(lines)


def field_type(field: dataclasses.Field) -> type:
    """int for `int` and for `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not type(None))
    return field.type


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refusal(f"{message}; see --help")


def parser(description: str) -> Parser:
    """Flags for every field, with - or _, plus --preset."""
    built = Parser(description=description, argument_default=argparse.SUPPRESS,
                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--preset", metavar="P", help=f"{', '.join(preset_names())} or a TOML file")
    for field in dataclasses.fields(Config):
        names = dict.fromkeys([f"--{flag(field.name)}", f"--{field.name}"])
        help_text = comments()[field.name].replace("%", "%%")
        if field.default is not None:
            help_text += f" (default {field.default})"
        kind = field_type(field)
        if kind is bool:
            built.add_argument(*names, action=argparse.BooleanOptionalAction, help=help_text)
            built.add_argument(f"--no_{field.name}", dest=field.name, action="store_false",
                               help=argparse.SUPPRESS)  # argparse makes --no-… alone
        else:
            built.add_argument(*names, type=kind, metavar=kind.__name__.upper(), help=help_text)
    return built


def from_command_line(arguments: list[str] | None, description: str) -> Config:
    """The Config of a command line; Refusal for whatever cannot be."""
    given = vars(parser(description).parse_args(arguments))
    preset = given.pop("preset", None)
    if preset is None and given.get("model", Config.model) == "nano":
        preset = "nano"  # the embedded base wants another learning rate than a 7B does
    return Config(**{**(read_preset(preset) if preset else {}), **given})


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(preset: str) -> dict:
    """The keys of presets/<preset>.toml, or of a TOML file; unknown keys are refused."""
    file = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not file.is_file():
        raise Refusal(f"--preset {preset}: no such preset; there is {', '.join(preset_names())}, "
                      f"or name a .toml file")
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise Refusal(f"{file}: not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in fields:
            raise Refusal(f"{file}: unknown key {key}; known are {', '.join(fields)}")
        kind = field_type(fields[key])
        if kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kind:
            raise Refusal(f"{file}: {key} = {value!r} should be {kind.__name__}")
    return values


def save(config: Config, file: Path) -> None:
    text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)
    file.write_text(text + "\n", "utf-8")
