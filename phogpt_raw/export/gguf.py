"""Write a merged model, or an adapter alone, in llama.cpp's file format with the `gguf` package.

llama.cpp supports PhoGPT as the architecture `mpt`, and its biases since February 2024 (pull
request 5638). llama.cpp always scales attention by 1 / sqrt(K), so a config with a different scale
is refused here. Tensors are converted while they are written, some rows at a time.

D hidden, H heads, K head width, R rank, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from phogpt_raw.export.merge import Merger
from phogpt_raw.model.phogpt import ModelConfig
from phogpt_raw.model.weights import PINNED_IDS, check_values
from phogpt_raw.refusal import Refusal

KINDS = ("f32", "f16", "q8_0", "q4_0")
# The regular expressions by which PhoGPT's and nano's tokenizers split text before BPE. Both match
# the same characters as the regular expression that llama.cpp uses for BLOOM.
PATTERNS = (" ?[^(\\s|[.,!?…。，、।۔،])]+", " ?[^\\s.,!?()|…。，、।۔،]+")
# The largest value that each type can store. For a quantised type it is the largest integer times
# the largest scale, because a block of values has one scale in fp16.
LARGEST = {"F32": torch.finfo(torch.float32).max, "F16": 65504, "Q8_0": 127 * 65504,
           "Q4_0": 8 * 65504}
CHUNK = 2**23  # elements that are converted at once


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise Refusal("--gguf and --lora-gguf need the package gguf: pip install -c "
                      "constraints.txt -e '.[gguf]'") from None
    return gguf


class Rows:
    """A tensor of a GGUF file that is computed while it is written. GGUFWriter uses it as an array.

    make: a function that returns the tensor in PyTorch. kind: the tensor's type in the file, one of
    KINDS.
    """

    def __init__(self, name: str, shape: torch.Size, make: Callable[[], torch.Tensor], kind: str):
        gguf = import_gguf()
        self.name, self.shape, self.make = name, shape, make
        self.type = gguf.GGMLQuantizationType[kind.upper()]
        self.stored = tuple(shape)  # for a quantised type, the shape in bytes
        if kind.startswith("q"):
            self.stored = gguf.quant_shape_to_byte_shape(tuple(shape), self.type)
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        self.nbytes = shape.numel() // block * size

    def tofile(self, file) -> None:
        quantise = import_gguf().quants.quantize
        tensor = self.make()
        check_values(tensor, self.name, LARGEST[self.type.name], self.type.name, "use --gguf f32")
        rows = max(1, CHUNK * self.shape[0] // self.shape.numel())
        for start in range(0, len(tensor), rows):
            part = np.ascontiguousarray(tensor[start : start + rows].float().cpu().numpy())
            quantise(part, self.type).tofile(file)


def model_tensors(merger: Merger, kind: str) -> Iterator[Rows]:
    """Yield the tensors of the merged model, under llama.cpp's names. Vectors stay in fp32.

    The embedding is also the head, so a quantised model stores it in 8 bits. In llama.cpp's own
    quantised files too, the embedding has more bits than the blocks.
    """
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, merger.config.n_layers)
    for name, tensor in merger.tensors.items():
        stored = "f32" if tensor.dim() == 1 else kind
        if name == "transformer.wte.weight" and kind == "q4_0":
            stored = "q8_0"
        if stored.startswith("q") and tensor.shape[-1] % 32:
            raise Refusal(f"--gguf {kind}: {name} has rows of {tensor.shape[-1]}, not a multiple "
                          f"of 32; use f16")
        yield Rows(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.shape,
                   lambda name=name: merger.merged(name), stored)


def write_model(merger: Merger, file: Path, kind: str, *, name: str, chat_template: str,
                progress=lambda tensors: tensors) -> None:
    """Write model.gguf. name: the model's name in the file. kind: one of KINDS."""
    gguf = import_gguf()
    check_model(merger)
    writer = gguf.GGUFWriter(file, "mpt")
    writer.add_name(name)
    writer.add_languages(["vi"])
    writer.add_file_type({"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}[kind])
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, merger.config)
    add_tokenizer(writer, merger.tokenizer, merger.config.vocab_size)
    writer.add_chat_template(chat_template)
    write(writer, list(model_tensors(merger, kind)), progress)


def check_model(merger: Merger) -> None:
    """Raise Refusal for a model with which llama.cpp would give other results than PyTorch, and no
    error.

    No weights are read.
    """
    check_supported(merger.config)
    check_tokenizer(merger.tokenizer, f"{merger.folder}/tokenizer.json")


def check_supported(config: ModelConfig) -> None:
    width = config.d_model // config.n_heads
    if config.softmax_scale is not None and abs(config.softmax_scale * width**0.5 - 1) > 1e-6:
        raise Refusal(f"config.json: softmax_scale {config.softmax_scale}: llama.cpp always uses "
                      f"1 / sqrt({width})")


def add_shape(writer, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.expansion_ratio * config.d_model)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(float(config.alibi_bias_max))
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(float(config.clip_qkv))


def add_tokenizer(writer, content: dict, size: int) -> None:
    """Add the tokens of a tokenizer.json, up to `size`, the number of rows of the embedding.

    Ids without a token in the tokenizer become unused tokens.
    """
    gguf = import_gguf()
    tokens = [f"[PAD{n}]" for n in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, n in content["model"]["vocab"].items():
        tokens[n], types[n] = text, gguf.TokenType.NORMAL
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = (gguf.TokenType.CONTROL if token["special"]
                              else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("bloom")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in content["model"]["merges"]])
    writer.add_bos_token_id(PINNED_IDS["bos"])
    writer.add_eos_token_id(PINNED_IDS["eos"])
    writer.add_unk_token_id(PINNED_IDS["unk"])
    writer.add_pad_token_id(PINNED_IDS["pad"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def check_tokenizer(content: dict, where: str) -> None:
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    pattern = steps[0].get("pattern", {}).get("Regex") if steps else None
    found = {"model": content["model"].get("type"), "normalizer": content.get("normalizer"),
             "pattern": pattern}
    if found["model"] != "BPE" or found["normalizer"] or pattern not in PATTERNS:
        raise Refusal(f"{where}: is not byte-level BPE with BLOOM's pattern, as PhoGPT's tokenizer "
                      f"is ({found}); llama.cpp would split text differently")


def write_adapter(merger: Merger, file: Path, kind: str = "f16") -> None:
    """Write adapter.gguf, which llama.cpp loads over a GGUF of the base.

    llama.cpp scales a layer's update by alpha / R. If a layer has another scale, because of rsLoRA
    or of its own alpha, its B is multiplied by the ratio of its scale to alpha / R. Raises Refusal
    for an adapter that is not plain LoRA.
    """
    gguf = import_gguf()
    check_plain(merger)
    alpha = merger.adapters.model.peft_config["default"].lora_alpha
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, merger.config.n_layers)
    writer = gguf.GGUFWriter(file, "mpt")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    rows = []
    for path, layer in merger.layers.items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        for adapter in layer.lora_A:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            A, B = balanced(A.detach(), B.detach() * (layer.scaling[adapter] * len(A) / alpha))
            rows += [Rows(f"{name}.lora_a", A.shape, lambda A=A: A, kind),
                     Rows(f"{name}.lora_b", B.shape, lambda B=B: B, kind)]
    write(writer, rows)


def balanced(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, scaled by opposite powers of two so that their largest values are about equal.

    Their product does not change. Without this scaling, the values of a small B would be lost in
    fp16.
    """
    largest_A, largest_B = (float(part.abs().max()) for part in (A, B))
    if not largest_A or not largest_B:
        return A, B
    shift = round(math.log2(largest_A / largest_B) / 2)
    return torch.ldexp(A, torch.tensor(-shift)), torch.ldexp(B, torch.tensor(shift))


def check_plain(merger: Merger) -> None:
    variants = sorted({type(variant).__name__ for layer in merger.layers.values()
                       for variant in layer.lora_variant.values()})
    if variants:
        raise Refusal(f"--lora-gguf: llama.cpp has plain LoRA only, not {', '.join(variants)}; use "
                      f"--gguf, which merges it")
    if merger.biases or any(name.endswith("lora_B.bias") for name in merger.adapters.tensors()):
        raise Refusal("--lora-gguf: the adapter has trained biases, which llama.cpp's LoRA cannot "
                      "hold; use --gguf, which merges them")


def write(writer, rows: list[Rows], progress=lambda tensors: tensors) -> None:
    for row in rows:
        quantised = row.type.name.startswith("Q")
        writer.add_tensor_info(row.name, row.stored, np.dtype(np.uint8 if quantised else
                                                              np.float32),
                               row.nbytes, raw_dtype=row.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for row in progress(rows):
        writer.write_tensor_data(row)
    writer.close()
