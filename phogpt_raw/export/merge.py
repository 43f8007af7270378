"""Merge an adapter into the base's weights, one tensor at a time.

PEFT's code does the merging, so rsLoRA, DoRA and different ranks per layer are merged as PEFT
defines them. PEFT merges into modules. The model is therefore built with weights that take no
memory, and then the weights of one layer at a time are put into it and merged. Because the base's
files are memory-mapped, host memory holds only one layer in fp32, its update, and the file of
weights that is being written.

O output features, D input features.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from phogpt_raw.config import hub_id
from phogpt_raw.files import read_object
from phogpt_raw.model.adapter_config import MERGED, adapter_hash
from phogpt_raw.model.adapters import PREFIX, Adapters, load_adapters
from phogpt_raw.model.checkpoint_format import parameter_shapes, write_checkpoint, write_json
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.model.weights import (
    PINNED_IDS,
    accounted,
    check_finite,
    read_config,
)
from phogpt_raw.refusal import Refusal

SHARD = 2 * 2**30  # approximate bytes of a file of weights; host memory holds one file
ADAPTER_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")


class Merger:
    """Merges an adapter into the tensors of a base.

    folder: the folder of the base. adapter: the folder of the adapter, or None. config: the base's
    config. tensors: {name: tensor} of the base, memory-mapped and as stored; the files are opened
    at the first use. tokenizer: the content of tokenizer.json. adapters: the adapter's weights, or
    None.

    Raises Refusal if the base lacks a tensor, if the adapter is for another model, or if the
    adapter has weights that cannot be merged.
    """

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.folder, self.config, self.adapter = folder, read_config(folder), adapter
        self.adapters, self.layers, self.biases = None, {}, {}
        if adapter:
            self.adapters, self.layers = adapted_skeleton(self.config, adapter)
            self.biases = trained_biases(self.adapters)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return mapped_tensors(self.folder)

    @cached_property
    def tokenizer(self) -> dict:
        return read_object(self.folder / "tokenizer.json", "fetch it again")

    def merged(self, name: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor `name` with the adapter's update, in fp32.

        If the adapter does not change this tensor, it is returned as stored. weight [O, D]: used in
        place of the base's own weight.
        """
        stored = self.tensors[name] if weight is None else weight
        path, kind = name.rsplit(".", 1)
        layer = self.layers.get(path)
        if name in self.biases:
            stored = self.biases[name]
        if layer is None or (kind == "bias" and not any(layer.lora_bias.values())):
            return stored
        base = layer.get_base_layer()
        zeros = base.weight, base.bias
        base.weight, base.bias = (part if part is None else nn.Parameter(part.data, False)
                                  for part in zeros)
        setattr(base, kind, nn.Parameter(stored.float(), False))
        try:
            layer.merge(safe_merge=True)
            return getattr(base, kind).data
        except ValueError as error:  # a merged value is not finite
            raise Refusal(f"{path}: {error}") from None
        finally:
            layer.merged_adapters.clear()
            base.weight, base.bias = zeros

    def all_merged(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor in `dtype`) in the checkpoint's order.

        Raises Refusal if `dtype` cannot hold a value.
        """
        for name in self.tensors:
            tensor = self.merged(name)
            check_finite(tensor, name, dtype)
            yield name, tensor.to(dtype)


def mapped_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a base, in the order of the model's parameters. The tensors are
    memory-mapped."""
    shapes = parameter_shapes(read_config(folder))
    found = {name: tensor for name, tensor, _ in accounted(folder, shapes)}
    return {name: found[name] for name in shapes}


def adapted_skeleton(config, adapter: Path) -> tuple[Adapters, dict[str, nn.Module]]:
    """Return (the adapter's weights, {name of a linear: its LoRA layer}).

    Only the linears that the adapter changes are included. The base weights of these layers are
    zeros that take no memory.
    """
    with torch.device("meta"):
        model = PhoGPT(config)
    for name, parameter in list(model.named_parameters()):
        path, kind = name.rsplit(".", 1)
        zeros = torch.zeros(1).expand(parameter.shape)
        model.get_submodule(path).register_parameter(kind, nn.Parameter(zeros, False))
    adapters = load_adapters(model, adapter, trainable=False)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name in adapters.tensors():
        if not name.endswith((".bias", *ADAPTER_PARTS)):
            raise Refusal(f"{adapter}: {name} is not LoRA over a linear; it cannot be merged")
    return adapters, layers


def trained_biases(adapters: Adapters) -> dict[str, torch.Tensor]:
    """{name in the checkpoint: tensor} of the base's biases that were trained too."""
    return {name.removeprefix(PREFIX).replace(".base_layer", ""): tensor
            for name, tensor in adapters.tensors().items()
            if name.endswith(".bias") and "lora_" not in name}


def stored_dtype(merger: Merger) -> torch.dtype:
    """The dtype in which the base is stored, if it has 16 bits. Otherwise bf16, in which PhoGPT is
    published."""
    dtype = next(tensor.dtype for name, tensor in merger.tensors.items() if name.endswith("weight"))
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def write_merged(merger: Merger, folder: Path, dtype: torch.dtype, base: str,
                 progress=lambda tensors: tensors, chat_template: str | None = None) -> None:
    """Write a checkpoint in PhoGPT's format.

    The checkpoint consists of safetensors files of at most about SHARD bytes, the tokenizer's
    files, and a config that both VinAI's and transformers' MPT can read.

    base: the base as the user named it. If it is a hub id, the config names this repository as the
    place of the model's code. chat_template: the template of the training, in Jinja. It replaces
    the tokenizer's own template.
    """
    size = dtype.itemsize * sum(tensor.numel() for tensor in merger.tensors.values())
    config = merged_config(merger.folder, base, dtype)
    if merger.adapter:
        config[MERGED] = [*config.get(MERGED, []), adapter_hash(merger.adapter)]
    write_checkpoint(folder, config,
                     progress(merger.all_merged(dtype)), shards=-(-size // SHARD),
                     kind="safetensors", tokenizer=merger.folder)
    tokenizer = folder / "tokenizer_config.json"
    if chat_template:
        settings = read_object(tokenizer, "fetch it again") if tokenizer.is_file() else {}
        write_json(tokenizer, settings | {"chat_template": chat_template})
        # transformers would use the template of this file, not of tokenizer_config.json.
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    generation = {"bos_token_id": PINNED_IDS["bos"], "eos_token_id": PINNED_IDS["eos"],
                  "pad_token_id": PINNED_IDS["pad"], "use_cache": True}
    write_json(folder / "generation_config.json", generation)


def merged_config(folder: Path, base: str, dtype: torch.dtype) -> dict:
    """The base's config.json with five changes for a merged checkpoint.

    - torch_dtype is `dtype`.
    - attn_pdrop is the integer 0. VinAI's file has 0.0, which transformers does not accept.
    - use_cache is true. With false, transformers would read the whole text again for each token.
    - auto_map names the base's repository on the hub, because its code is not in the folder. If the
      base is not from the hub, auto_map is removed.
    - _name_or_path is removed. It is a path of the machine that wrote the base.
    """
    config = read_object(folder / "config.json", "fetch it again")
    config["attn_config"] = (config.get("attn_config") or {}) | {"attn_pdrop": 0}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    config.pop("_name_or_path", None)
    code = config.pop("auto_map", None)
    if code and hub_id(base):
        config["auto_map"] = {kind: f"{base}--{place.split('--')[-1]}"
                              for kind, place in code.items()}
    return config
