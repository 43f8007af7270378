"""What an adapter's folder says of itself: PEFT's configuration, checked, and how its run was made.

PEFT reads whatever stands in adapter_config.json and takes it as it is. What this program would
compute otherwise than PEFT, or not at all, is refused here by name.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from phogpt_raw.cards import DTYPES
from phogpt_raw.config import CHOICES, hub_id
from phogpt_raw.refusal import Refusal

# Fields that must be unset: they change the base, or what an adapter computes.
UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "layer_replication",
    "loftq_config", "megatron_config", "modules_to_save", "monteclora_config",
    "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)
# Initialisations that leave the base's weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ)
# subtract what they put into the adapter, and the base that they leave is not the one in the files.
PLAIN = (True, False, "gaussian", "orthogonal", "eva")
HIGHEST_RANK = 2**16


def read_adapter_config(folder: Path):
    """PEFT's LoraConfig of an adapter folder; raises Refusal naming the file and the field."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise Refusal(f"{file}: missing; name a folder that a run has written, such as "
                      f"runs/nano-001")
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever an unexpected value leads PEFT to
        raise Refusal(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, LoraConfig):
        raise Refusal(f"{file}: a {config.peft_type} adapter; only LoRA is supported")
    check(config, file)
    return config


def check(config, file: Path) -> None:
    """Raise Refusal for a LoraConfig that cannot be used as it is meant."""
    for field in UNSUPPORTED:
        if getattr(config, field, None):
            raise Refusal(f"{file}: {field} is not supported, only LoRA, rsLoRA and DoRA over "
                          f"linear layers")
    if config.init_lora_weights not in PLAIN:
        raise Refusal(f"{file}: init_lora_weights {config.init_lora_weights!r} changes the base's "
                      f"weights themselves; convert the adapter to plain LoRA with PEFT first "
                      f"(save_pretrained, path_initial_model_for_weight_conversion)")
    base = config.base_model_name_or_path
    if not isinstance(base, str | None):
        raise Refusal(f"{file}: base_model_name_or_path {base!r} is not text")
    ranks = {"r": config.r} | pattern(config, "rank_pattern", file)
    for field, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
            raise Refusal(f"{file}: {field} {rank!r} is not a whole number from 1 to "
                          f"{HIGHEST_RANK:,}")
    alphas = {"lora_alpha": config.lora_alpha} | pattern(config, "alpha_pattern", file)
    for field, alpha in alphas.items():
        if type(alpha) not in (int, float) or not (alpha > 0 and math.isfinite(alpha)):
            raise Refusal(f"{file}: {field} {alpha!r} is not a positive number")
    dropout = config.lora_dropout
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise Refusal(f"{file}: lora_dropout {dropout!r} is not a number from 0 to 1")
    check_names(config.target_modules, file)


def pattern(config, field: str, file: Path) -> dict:
    """rank_pattern or alpha_pattern, its keys with the field's name before them."""
    values = getattr(config, field) or {}
    if not isinstance(values, dict):
        raise Refusal(f"{file}: {field} is not an object")
    for name in values:
        check_names(name, file)
    return {f"{field} {name}": value for name, value in values.items()}


def check_names(targets, file: Path) -> None:
    """Targets are names, or a regular expression."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise Refusal(f"{file}: {targets!r} is not a regular expression ({error})") from None
    elif not all(isinstance(target, str) for target in targets or ()):
        raise Refusal(f"{file}: target_modules holds something else than names")


@dataclass(frozen=True)
class Origin:
    """How an adapter was made: over which base, in which template, over which weights."""

    base: str | None
    revision: str | None = None
    template: str = "auto"
    nf4: bool = True
    dtype: str = "auto"


def read_origin(folder: Path) -> Origin:
    """Of the folder of a run or of a checkpoint, as the run's config.json records it; of another
    adapter's folder, what its adapter_config.json names.

    Raises Refusal for a recorded value that no run can have.
    """
    lora = read_adapter_config(folder)
    base, revision = lora.base_model_name_or_path, lora.revision
    absolute = folder.absolute()
    for file in (absolute / "config.json", absolute.parent / "config.json"):
        if recorded := run_record(file):
            break
    else:
        return Origin(base, revision)
    origin = Origin(base, revision or recorded.get("revision"), recorded.get("template", "auto"),
                    recorded.get("nf4", True), recorded.get("dtype", "auto"))
    good = {"template": origin.template in CHOICES["template"], "nf4": type(origin.nf4) is bool,
            "dtype": origin.dtype in ("auto", *DTYPES),
            "revision": isinstance(origin.revision, str | None)}
    for field, known in good.items():
        if not known:
            raise Refusal(f"{file}: {field} {getattr(origin, field)!r} is none that a run can "
                          f"have; correct it, or move the file away")
    return origin


def run_record(file: Path) -> dict | None:
    """The content of a run's config.json, None of a model's or of none; the run's folder, not a
    checkpoint, has one."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_run = isinstance(content, dict) and {"model", "template", "rank"} <= content.keys()
    return content if is_run else None


def chosen_base(folder: Path | None, made: Origin, model: str | None,
                revision: str | None) -> tuple[str, str | None]:
    """(base, revision) below the adapter of `folder`, if there is one: those of the flags --model
    and --revision, else those with which it was made. A base of --model has no recorded revision.
    """
    if model:
        return model, revision
    return named_base(folder) if folder else made.base, revision or made.revision


def named_base(folder: Path) -> str:
    """The base that an adapter names; Refusal where that is a folder which is not there."""
    base = read_adapter_config(folder).base_model_name_or_path
    if not base:
        raise Refusal(f"{folder}: names no base model; say which with --model")
    there = base == "nano" or hub_id(base) or Path(base).expanduser().is_dir()
    if not there:
        raise Refusal(f"{folder}: its base is {base}, and no such folder is there; say with "
                      f"--model where it is now")
    return base
