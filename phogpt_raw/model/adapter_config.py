"""Read and check an adapter's adapter_config.json. Read from its run how the adapter was trained.

PEFT accepts any content of adapter_config.json without checks. This program refuses a field that it
does not support, or with which its results would differ from PEFT's. The error names the field.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phogpt_raw.cards import DTYPES
from phogpt_raw.config import CHOICES, hub_id
from phogpt_raw.files import expanded, read_object
from phogpt_raw.limited import OverLimit, limited
from phogpt_raw.refusal import Refusal

# Fields that have no effect in this program. Some of these fields say how PEFT initialises the
# weights, but this program reads the weights from the adapter's file.
WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "runtime_config", "task_type",
}
SWITCHES = ("lora_bias", "use_dora", "use_rslora")
HONOURED = {
    *SWITCHES, "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "r",
    "rank_pattern", "revision", "target_modules",
}
# The values of init_lora_weights that do not change the base's weights. The other initialisations
# (PiSSA, OLoRA, CorDA, LoftQ) subtract the adapter's first values from the base. Such an adapter
# fits only this changed base, which differs from the base in the files.
PLAIN = (True, False, None, "gaussian", "orthogonal", "eva")
BIASES = ("none", "all", "lora_only")
HIGHEST_RANK, HIGHEST_ALPHA = 2**16, 2**20
MERGED = "merged_adapters"  # field of a merged checkpoint's config.json: hashes of its adapters


def read_adapter_config(folder: Path):
    """PEFT's LoraConfig of an adapter's folder. Raises Refusal that names the file and the field.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise Refusal(f"{file}: missing; {instead(folder)}")
    fields = read_object(file, "use another copy of the adapter")
    check(fields, file)
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises different errors for unexpected values
        raise Refusal(f"{file}: cannot be read ({' '.join(str(error).split())})") from None


def instead(folder: Path) -> str:
    """What to do about a folder that has no adapter."""
    if run_record(folder / "config.json"):
        if next(folder.glob("checkpoint-*"), None):
            return "this run has not ended; name one of its checkpoint-N folders"
        return "this run has saved no checkpoint; give its command again"
    if (folder / "config.json").is_file():
        return f"{folder} is a whole model; name it with --model"
    return "name a folder that a run has written, such as runs/nano-001"


def check(fields: dict, file: Path) -> None:
    """Raise Refusal for fields of an adapter_config.json that are not valid or not supported."""
    if fields.get("peft_type") != "LORA":
        raise Refusal(f"{file}: peft_type is {fields.get('peft_type')}; only LoRA is supported")
    for field in sorted(fields.keys() - WITHOUT_EFFECT - HONOURED):
        if fields[field]:
            raise Refusal(f"{file}: {field} is not supported, only LoRA, rsLoRA and DoRA over "
                          f"linear layers")
    how = fields.get("init_lora_weights")
    if not (isinstance(how, bool | str | None) and how in PLAIN):
        raise Refusal(f"{file}: init_lora_weights {how!r} changes the base's "
                      f"weights themselves; convert the adapter to plain LoRA with PEFT first "
                      f"(save_pretrained, path_initial_model_for_weight_conversion)")
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(fields.get(field), str | None):
            raise Refusal(f"{file}: {field} {fields[field]!r} is not text")
    for field in SWITCHES:
        if not isinstance(fields.get(field), bool | None):
            raise Refusal(f"{file}: {field} {fields[field]!r} is neither true nor false")
    if fields.get("bias", "none") not in BIASES:
        raise Refusal(f"{file}: bias {fields['bias']!r} must be one of {', '.join(BIASES)}")
    check_strengths(fields, file)
    check_layers(fields, file)
    check_time(fields, file)


def check_strengths(fields: dict, file: Path) -> None:
    """Raise Refusal if a rank, an alpha or the dropout has a wrong type or is out of range."""
    ranks = {"r": fields.get("r", 8)} | pattern(fields, "rank_pattern", file)
    for field, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
            raise Refusal(f"{file}: {field} {shortened(rank)} is not a whole number from 1 to "
                          f"{HIGHEST_RANK:,}")
    alphas = {"lora_alpha": fields.get("lora_alpha", 8)} | pattern(fields, "alpha_pattern", file)
    for field, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha <= HIGHEST_ALPHA:
            raise Refusal(f"{file}: {field} {shortened(alpha)} is not a positive number up to "
                          f"{HIGHEST_ALPHA:,}")
    dropout = fields.get("lora_dropout", 0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise Refusal(f"{file}: lora_dropout {shortened(dropout)} is not a number from 0 to 1")


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + " …"


def pattern(fields: dict, field: str, file: Path) -> dict:
    """The entries of rank_pattern or alpha_pattern. The field's name is put before each key, for
    error messages."""
    values = {} if fields.get(field) is None else fields[field]
    if not isinstance(values, dict):
        raise Refusal(f"{file}: {field} is not an object")
    for name in values:
        check_names(name, field, file)
    return {f"{field} {name}": value for name, value in values.items()}


def check_layers(fields: dict, file: Path) -> None:
    """Raise Refusal if a field that selects layers is not valid. Such a field contains names, a
    regular expression or block numbers."""
    if not fields.get("target_modules"):
        raise Refusal(f"{file}: target_modules names no layers")
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        check_names(fields.get(field), field, file)
    blocks = fields.get("layers_to_transform")
    for block in blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]:
        if type(block) is not int or block < 0:
            raise Refusal(f"{file}: layers_to_transform {shortened(block)} is not the number of a "
                          f"block")


def check_names(names, field: str, file: Path) -> None:
    """Raise Refusal unless `names` is a list of names, a regular expression or None."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise Refusal(f"{file}: {field} {shortened(names)} is not a regular expression "
                          f"({error})") from None
    elif names is not None and not (isinstance(names, list)
                                    and all(isinstance(name, str) for name in names)):
        raise Refusal(f"{file}: {field} {shortened(names)} is not a list of names")


def check_time(fields: dict, file: Path) -> None:
    """Raise Refusal if matching a layer's name with a regular expression takes too long. With
    some expressions, Python tries every way to divide the name into parts."""
    one_or_more = [fields.get(field) for field in ("target_modules", "exclude_modules")]
    expressions = [*(names for names in one_or_more if isinstance(names, str)),
                   *(fields.get("rank_pattern") or ()), *(fields.get("alpha_pattern") or ())]
    layers = fields.get("layers_pattern") or []
    expressions += [layers] if isinstance(layers, str) else layers
    try:
        if expressions:
            limited(match_all, expressions)
    except (OverLimit, ValueError) as error:
        raise Refusal(f"{file}: its regular expressions cannot be used: matching a layer's name "
                      f"{error}") from None


def match_all(expressions: list[str]) -> None:
    """Match each expression with the names of linear layers, in each form that PEFT uses."""
    for expression in expressions:
        for form in (expression, rf"(.*\.)?({expression})$", rf"(?:^|.*?\.){expression}\.(\d+)\."):
            for layer in ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"):
                re.fullmatch(form, f"transformer.blocks.0.{layer}")


@dataclass(frozen=True)
class Origin:
    """How an adapter was trained: the base, the prompt template and the precision."""

    base: str | None
    revision: str | None = None
    template: str = "auto"
    nf4: bool = True
    dtype: str = "auto"
    base_weights: str | None = None  # the result of base_hash for the base


def read_origin(folder: Path) -> Origin:
    """How the adapter in a folder was trained. The base's name comes from adapter_config.json. For
    the folder of a run or of a checkpoint, the other values come from the run's config.json.

    Raises Refusal if a recorded value is not valid.
    """
    lora = read_adapter_config(folder)
    base, revision = lora.base_model_name_or_path, lora.revision
    place = folder.resolve()
    if re.fullmatch(r"checkpoint-\d+", place.name):
        place = place.parent
    file = place / "config.json"
    recorded = run_record(file)
    if recorded is None:
        return Origin(base, revision)
    origin = Origin(base, revision or recorded.get("revision"), recorded["template"],
                    recorded.get("nf4", True), recorded.get("dtype", "auto"),
                    recorded.get("base_weights"))
    good = {"template": origin.template in CHOICES["template"], "nf4": type(origin.nf4) is bool,
            "dtype": origin.dtype in ("auto", *DTYPES),
            "revision": isinstance(origin.revision, str | None),
            "base_weights": isinstance(origin.base_weights, str | None)}
    for field, known in good.items():
        if not known:
            raise Refusal(f"{file}: {field} {getattr(origin, field)!r} is not a value that a "
                          f"run can have; correct it, or move the file away")
    return origin


def run_record(file: Path) -> dict | None:
    """The content of a run's config.json. None if `file` does not exist, or is a model's
    config.json. The folder of a run contains a config.json, but the folders of its checkpoints do
    not. Raises Refusal if the file is damaged or not complete."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and {"model_type", "architectures", "d_model"} & content.keys():
        return None
    if not isinstance(content, dict) or not {"model", "template", "rank"} <= content.keys():
        raise Refusal(f"{file}: is not a complete config.json of a run; restore it, or move it "
                      f"away and give --template")
    return content


class Base(NamedTuple):
    """A base model. named: the beginning of an error message, which says where the name of the base
    comes from."""

    model: str
    revision: str | None
    named: str


def chosen_base(folder: Path | None, made: Origin, model: str | None,
                revision: str | None) -> Base:
    """The base model to load: the base that --model names, else the base of the adapter in
    `folder`.

    --revision overrides the recorded revision. If --model names another base than the adapter, the
    recorded revision is not used.
    """
    if model:
        same = model == made.base and hub_id(model)
        return Base(model, revision or (made.revision if same else None), f"--model {model}")
    if not folder:
        return Base(made.base, revision, f"{made.base}")
    base = named_base(folder)
    if made.revision and not revision and not hub_id(base):
        raise Refusal(f"{folder}: its base is {base} on the hub, revision {made.revision}, but "
                      f"there is a folder of that name too; name one with --model")
    return Base(base, revision or made.revision, f"{folder}: its base {base}")


def named_base(folder: Path) -> str:
    """The base that an adapter names. Raises Refusal if the adapter names no base, or a folder that
    does not exist."""
    base = read_adapter_config(folder).base_model_name_or_path
    if not base:
        raise Refusal(f"{folder}: names no base model; name it with --model")
    there = base == "nano" or hub_id(base) or expanded(base).is_dir()
    if not there:
        raise Refusal(f"{folder}: its base is {base}, but no such folder exists; name its new "
                      f"folder with --model")
    return base


def adapter_hash(folder: Path) -> str:
    """The SHA-256 of an adapter's weight file, as a merged checkpoint's config.json records it."""
    file = next((file for name in ("adapter_model.safetensors", "adapter_model.bin")
                 if (file := folder / name).is_file()), None)
    if file is None:
        raise Refusal(f"{folder}: holds no adapter_model.safetensors")
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_not_merged(base: Path, adapter: Path) -> None:
    """Raise Refusal if the adapter is already merged into the checkpoint in the folder `base`."""
    merged = read_object(base / "config.json", "fetch it again").get(MERGED)
    if merged and adapter_hash(adapter) in merged:
        raise Refusal(f"--model {base}: the adapter {adapter} is already merged into it; leave out "
                      f"the adapter, or name the unmerged base")
