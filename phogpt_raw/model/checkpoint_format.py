"""Write a checkpoint in the format of VinAI's PhoGPT checkpoints.

A folder contains config.json, the weights and the tokenizer's files. config.json is an MPT config
with VinAI's fields. The weights have llm-foundry's names. There is no `lm_head.weight`, because the
head is tied to the embedding. The weights are in one file, or in several files (shards) with an
index. `model.weights` reads this format.

`write_checkpoint` takes the tensors one by one and holds at most one shard in host memory.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from phogpt_raw.files import save_tensors
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.refusal import Refusal

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "chat_template.jinja")
STEMS = {"bin": "pytorch_model", "safetensors": "model"}


def vinai_config(shape: ModelConfig, **overrides) -> dict:
    """The content of config.json, with VinAI's fields and the values of `shape`.

    overrides: fields to replace or add. `attn_config` is merged field by field. As in VinAI's file,
    learned_pos_emb is true. MPT ignores this field if the model uses ALiBi.
    """
    config = {
        "architectures": ["MPTForCausalLM"],
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": shape.alibi_bias_max,
            "attn_impl": "torch",
            "attn_pdrop": 0.0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": shape.clip_qkv,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": shape.softmax_scale,
        },
        "auto_map": {
            "AutoConfig": "configuration_mpt.MPTConfig",
            "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
        },
        "d_model": shape.d_model,
        "emb_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "expansion_ratio": shape.expansion_ratio,
        "init_config": {
            "emb_init_std": None,
            "emb_init_uniform_lim": None,
            "fan_mode": "fan_in",
            "init_div_is_residual": True,
            "init_gain": 0.0,
            "init_nonlinearity": "relu",
            "init_std": None,
            "name": "kaiming_normal_",
            "verbose": 0,
        },
        "init_device": "cpu",
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": shape.max_seq_len,
        "model_type": "mpt",
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "no_bias": shape.no_bias,
        "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
        "use_cache": False,
        "verbose": 0,
        "vocab_size": shape.vocab_size,
    }
    if shape.layer_norm_epsilon != ModelConfig.layer_norm_epsilon:  # VinAI's file lacks this field
        config["layer_norm_epsilon"] = shape.layer_norm_epsilon
    attention = {**config["attn_config"], **overrides.get("attn_config", {})}
    return {**config, **overrides, "attn_config": attention}


def write_checkpoint(
    folder: Path,
    config: dict,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    shards: int = 1,
    kind: str = "bin",
    tokenizer: Path | None = None,
) -> None:
    """Write config.json and the weights, and copy the tokenizer's files from the folder
    `tokenizer`.

    `tensors` are all parameters of the PhoGPT that `config` describes, in any order, on any device
    and in the dtype to be stored. `tensors` is read only once. The tensors go to `shards` files
    of about equal size, in their given order. A shard stays in host memory until it is complete, so
    a single file needs memory for all tensors. `kind` is "bin" (torch.save) or "safetensors".

    Files of the same name are replaced. Other files in the folder stay. The index and config.json
    are written last, so an interrupted write cannot be read as a checkpoint.

    Raises ValueError if a tensor is missing, is given twice, has another shape or is not a
    parameter of the model. Raises ValueError also if there are too few tensors for `shards` files.
    Raises Refusal if `config` is not PhoGPT's or a tokenizer file is missing.
    """
    for name in TOKENIZER_FILES if tokenizer else ():
        if not (tokenizer / name).is_file():
            raise Refusal(f"{tokenizer / name}: missing; copy the base's tokenizer files")
    shapes = parameter_shapes(ModelConfig.from_json(config))
    folder.mkdir(parents=True, exist_ok=True)
    files, total_bytes = {}, 0
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    for number, shard in enumerate(split(checked(pairs, shapes), shapes, shards)):
        file = file_name(kind, number, shards)
        save(folder / file, shard)
        files |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # enumerate refers to this shard while the next shard is filled
    if number + 1 != shards:
        raise ValueError(f"{shards} shards: the tensors fill only {number + 1}; use fewer shards")
    if shards > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
        write_json(folder / f"{STEMS[kind]}.{kind}.index.json", index)
    if tokenizer:
        for name in (*TOKENIZER_FILES, *OPTIONAL_TOKENIZER_FILES):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    write_json(folder / "config.json", config)


def parameter_shapes(shape: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter by its name in the checkpoint, without allocating weights."""
    with torch.device("meta"):
        model = PhoGPT(shape)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def checked(
    pairs: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the pairs. Raises ValueError if their names and shapes are not those of `shapes`."""
    missing = dict(shapes)
    for name, tensor in pairs:
        shape = missing.pop(name, None)
        if shape is None:
            raise ValueError(f"tensor {name} is given twice or is not in config.json's model")
        if tensor.shape != shape:
            raise ValueError(f"tensor {name}: shape {list(tensor.shape)}, not {list(shape)}")
        yield name, tensor
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {next(iter(missing))}")


def split(
    pairs: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, torch.Size], shards: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields `shards` groups of consecutive tensors, of about equal size, on the host.

    Group n (n = 0, 1, …) ends as soon as groups 0 to n together have at least (n + 1) / shards of
    all elements.
    """
    total = sum(shape.numel() for shape in shapes.values())
    group, number, seen = {}, 0, 0
    for name, tensor in pairs:
        group[name] = on_host(tensor)
        seen += tensor.numel()
        if number + 1 < shards and seen * shards >= (number + 1) * total:
            yield group
            group, number = {}, number + 1
    if group:
        yield group


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous. It is never a view of a larger storage, because torch.save
    would write the whole storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def file_name(kind: str, number: int, shards: int) -> str:
    part = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
    return f"{STEMS[kind]}{part}.{kind}"


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors to a .bin or .safetensors file."""
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_tensors(file, tensors)


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
