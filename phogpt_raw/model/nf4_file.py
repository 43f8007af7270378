"""Write, check and read the file of a quantised base model.

It is a safetensors file of all parameters. Norms, biases and the embedding have the compute dtype
and their names from the checkpoint. The weight of a linear layer is stored as six tensors:
`NAME.packed` and the tensors of `NF4Fields` (`NAME.scales`, …). The metadata has three fields:

- `checksum`: XXH3-128 of the whole file, computed with zeros in place of the checksum itself.
- `key`: everything that the quantised weights depend on, as JSON (nf4_cache.py).
- `base`: the checkpoint's folder. It distinguishes a stale file of this base from a file of another
  base with the same name.

A file is damaged if its checksum does not match, or if a tensor is missing or has another shape or
dtype. A damaged file is not used.

`read` maps the file into memory and copies each tensor to the device. It also copies if the device
is the CPU. So later changes of the file do not change the model, and training never writes to the
file. A second thread computes the checksum at the same time. The model is returned only if the
checksum matches.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import nn

from phogpt_raw.cards import DTYPES
from phogpt_raw.files import whole_file
from phogpt_raw.messages import _
from phogpt_raw.model.nf4 import kept_in_nf4, linear_of, stored_shapes, stored_state
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.private_apis import NF4Fields, nf4_fields, nf4_state

CHUNK = 2**26  # bytes copied to the host at once while writing
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class Damaged(Exception):
    """A cache file cannot be used. The exception's text is a short reason."""


def expected(phogpt: PhoGPT, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple]]:
    """(dtype, shape) of each tensor that the file of this model contains, by the tensor's name.

    dtype: the compute dtype.
    """
    wanted = {}
    for name, parameter in phogpt.named_parameters():
        if kept_in_nf4(*owner(phogpt, name)):
            parts = stored_shapes(parameter.shape).items()
            wanted |= {f"{name}.{part}": kind for part, kind in parts}
        else:
            wanted[name] = dtype, tuple(parameter.shape)
    return wanted


def owner(phogpt: PhoGPT, name: str) -> tuple[nn.Module, str]:
    """The module that contains the parameter `name`, and the parameter's name in that module."""
    path, kind = name.rsplit(".", 1)
    return phogpt.get_submodule(path), kind


def stored_tensors(phogpt: PhoGPT) -> dict[str, torch.Tensor]:
    """Every tensor of a quantised PhoGPT, by its name in the file. fp32 tensors come first, then
    16-bit tensors, then uint8 tensors. So each tensor begins at a multiple of its element size."""
    tensors = {}
    for name, parameter in phogpt.named_parameters():
        if (state := nf4_state(parameter)) is None:
            tensors[name] = parameter.data
        else:
            fields = nf4_fields(state)
            for part in stored_shapes(fields.shape):
                tensors[f"{name}.{part}"] = getattr(fields, part, parameter.data)
    return dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))


def write(phogpt: PhoGPT, file: Path, key: dict, base: str = "") -> int:
    """Write a quantised PhoGPT without adapters. Returns the size of the file in bytes.

    key: the result of nf4_cache.make_key for the checkpoint. base: the checkpoint's folder. The
    file is written under a temporary name, flushed to the disk and renamed, so it is either
    complete or absent. At most 64 MiB of a GPU's tensors are in host memory at once. Raises OSError
    or Refusal if the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(phogpt)
    # The checksum comes first, so its zeros are the first 32 zeros of the header.
    head = header(tensors, {"checksum": 32 * "0", "key": json.dumps(key), "base": base})
    hasher = xxhash.xxh3_128(head)
    with whole_file(file) as unfinished, unfinished.open("xb") as opened:
        opened.write(head)
        for tensor in tensors.values():
            for part in tensor.contiguous().flatten().view(torch.uint8).split(CHUNK):
                part = part.cpu().numpy()
                hasher.update(part)
                opened.write(part)
        opened.seek(0)
        opened.write(head.replace(32 * b"0", hasher.hexdigest().encode(), 1))
        return opened.seek(0, os.SEEK_END)


def header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file with these tensors, in this order.

    It is the length of a JSON text in 8 bytes, then the JSON text. Spaces at the end of the text
    let the tensors begin at a multiple of 64 bytes. In the text, the metadata come before the
    tensors' names. So the checksum can come first, and no other text can be mistaken for the
    checksum.
    """
    entries, begin = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


class Header(NamedTuple):
    """The parts of a file's header, which precedes the tensors."""

    raw: bytes
    entries: dict[str, dict]  # dtype, shape and offsets of each tensor, by its name
    key: dict
    base: str
    checksum: str


def read_header(file: Path) -> Header:
    """The header of a file that `write` wrote. Raises Damaged if the header is not valid."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length < os.path.getsize(file):
            raise Damaged(_("damaged: its header is cut off"))
        text = opened.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        key = json.loads(metadata["key"])
        if not isinstance(key["source"], list):
            raise ValueError
        return Header(length.to_bytes(8, "little") + text, entries, key, metadata["base"],
                      metadata["checksum"])
    except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or unexpected JSON
        raise Damaged(_("damaged: its header cannot be read")) from None


def checksum(file: Path, head: Header) -> str:
    """The checksum of a file's content. In an undamaged file it equals `head.checksum`.

    The file is read into one small buffer, not through the memory map. This is faster, because no
    pages are mapped.
    """
    hasher = xxhash.xxh3_128(head.raw.replace(head.checksum.encode(), 32 * b"0", 1))
    buffer = memoryview(bytearray(2**20))
    with file.open("rb", buffering=0) as opened:
        opened.seek(len(head.raw))
        while size := opened.readinto(buffer):
            hasher.update(buffer[:size])
    return hasher.hexdigest()


def read(file: Path, head: Header, config: ModelConfig, device: torch.device) -> PhoGPT:
    """The PhoGPT that `write` wrote, on `device`, not yet frozen. Raises Damaged if the file is
    damaged."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        phogpt = PhoGPT(config)
    wanted = expected(phogpt, DTYPES[head.key["dtype"]])
    with ThreadPoolExecutor(1) as second:
        computed = second.submit(checksum, file, head)
        try:
            with safe_open(file, framework="pt") as mapped:
                if missing := wanted.keys() - mapped.keys():
                    raise Damaged(_("damaged: tensor {name} is missing", name=min(missing)))
                tensors = {}
                for name in (name for name in head.entries if name in wanted):  # in file order
                    tensor = mapped.get_tensor(name)
                    if (tensor.dtype, tuple(tensor.shape)) != wanted[name]:
                        raise Damaged(_("damaged: tensor {name} has another shape or dtype",
                                        name=name))
                    tensors[name] = tensor.to(device, copy=True)
        except SafetensorError as error:
            raise Damaged(_("damaged: {reason}", reason=str(error).splitlines()[0])) from None
        if computed.result() != head.checksum:
            raise Damaged(_("damaged: its checksum does not match"))
    assemble(phogpt, tensors)
    return phogpt


def assemble(phogpt: PhoGPT, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the parameters of a PhoGPT on the meta device by the tensors of the file."""
    dtype = tensors["transformer.wte.weight"].dtype
    for name, parameter in list(phogpt.named_parameters()):
        module, kind = owner(phogpt, name)
        if not kept_in_nf4(module, kind):
            module.register_parameter(kind, nn.Parameter(tensors[name], requires_grad=False))
            continue
        parts = {part: tensors[f"{name}.{part}"] for part in stored_shapes(parameter.shape)}
        packed = parts.pop("packed")
        state = stored_state(NF4Fields(**parts, shape=parameter.shape, dtype=dtype))
        phogpt.set_submodule(name.removesuffix(".weight"), linear_of(packed, state, module.bias))
