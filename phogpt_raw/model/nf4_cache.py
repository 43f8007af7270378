"""The quantised base kept in one file, so that the next start quantises nothing.

PhoGPT-7B5 in NF4 is 5.4 GB where its checkpoint is 15, and needs no arithmetic to load. The file is
a safetensors file of all parameters: norms, biases and the embedding in the compute dtype under
their names in the checkpoint, and for a linear's weight six tensors, `NAME.packed` and the fields
of `NF4Fields` (`NAME.scales`, …). Its metadata holds

- `key`: what the bits depend on, as JSON (`make_key`);
- `base`: where the checkpoint lay, which tells a stale cache from another base of the same name;
- `checksum`: XXH3-128 of the whole file, with zeros in the place of the checksum itself.

A file with another key is stale. One with another checksum, other tensors or other shapes is
damaged. Neither is used: it is said by name, and a new one is made.

The file is mapped, and each tensor copied from there to the device, on a CPU too: what happens to
the file later does not reach the model, and training never writes to it. A second thread computes
the checksum meanwhile, and no model is returned before both agree.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import nn

from phogpt_raw.cards import DTYPES, dtype_name
from phogpt_raw.files import UNFINISHED, whole_file
from phogpt_raw.messages import _
from phogpt_raw.model.nf4 import kept_in_nf4, linear_of, stored_shapes, stored_state
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.private_apis import NF4Fields, nf4_fields, nf4_state
from phogpt_raw.refusal import Refusal

FORMAT = 1  # of the file: a change of names or of the checksum makes all older files stale
HEAD = 2**16  # bytes at a weight file's beginning that tell it from another of its size
CHUNK = 2**26  # bytes that are copied to the host at once while writing
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class Damaged(Exception):
    """Why a cache cannot be used, in a few words."""


# -- what the bits depend on


def make_key(files: list[Path], dtype: torch.dtype, device: torch.device) -> dict:
    """What the quantised weights of `files` (config.json among them) depend on.

    A GPU and a CPU quantise a little differently: of 10,000 scales about 16 differ by one step.
    """
    return {
        "format": FORMAT,
        "source": [identity(file) for file in sorted(files)],
        "dtype": dtype_name(dtype),
        "device": torch.device(device).type,
        "bitsandbytes": version("bitsandbytes"),
    }


def identity(file: Path) -> list:
    """A file's name and what changes with its content, without reading all of it.

    In the hub's own cache a file is a link to a blob that is named by its content. Elsewhere: size,
    time of the last change and a hash of the first 64 KiB.
    """
    if file.is_symlink() and (blob := Path(os.readlink(file))).parent.name == "blobs":
        return [file.name, blob.name]
    with file.open("rb") as opened:
        head = xxhash.xxh3_128_hexdigest(opened.read(HEAD))
        stat = os.fstat(opened.fileno())
    return [file.name, stat.st_size, stat.st_mtime_ns, head]


def difference(old: dict, new: dict) -> str:
    """Why a cache with the key `old` does not serve where `new` is asked for."""
    changed = [entry[0] for entry in new["source"] if entry not in old.get("source", [])]
    if changed:
        return _("{files} of the base changed since", files=", ".join(changed))
    parts = [_("{what} {old}, now {new}", what=name, old=old.get(name), new=new[name])
             for name in new if name != "source" and old.get(name) != new[name]]
    return ", ".join(parts) or _("the base had more files")


# -- one file, written and read


def expected(phogpt: PhoGPT, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple]]:
    """(dtype, shape) of each tensor that the file of such a model holds, under its name there."""
    wanted = {}
    for name, parameter in phogpt.named_parameters():
        if kept_in_nf4(*owner(phogpt, name)):
            parts = stored_shapes(parameter.shape).items()
            wanted |= {f"{name}.{part}": kind for part, kind in parts}
        else:
            wanted[name] = dtype, tuple(parameter.shape)
    return wanted


def owner(phogpt: PhoGPT, name: str) -> tuple[nn.Module, str]:
    """The module of a parameter, and the parameter's name there."""
    path, kind = name.rsplit(".", 1)
    return phogpt.get_submodule(path), kind


def stored_tensors(phogpt: PhoGPT) -> dict[str, torch.Tensor]:
    """Every tensor of a quantised PhoGPT under its name in the file: the fp32 ones first, then 16
    bits, then bytes, so that each lies at a multiple of its own size."""
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
    """Write a quantised PhoGPT, as read_model returns it and without adapters; returns the bytes.

    `key` is make_key's for the checkpoint that phogpt came from, and `base` the place of that. The
    file is whole or not there: it is written beside under another name, flushed to the disk and
    renamed. What a killed write of the same base has left is removed first. At most 64 MiB are in
    host memory. Raises OSError where it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in family(file, re.escape(UNFINISHED)):
        left.unlink(missing_ok=True)
    tensors = stored_tensors(phogpt)
    # The checksum is the first entry, so that its zeros are the first of the header.
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
    """The beginning of a safetensors file whose tensors follow in this order: the length of the
    JSON in 8 bytes, then the JSON, padded so that the tensors begin at a multiple of 64. Metadata
    stand before all names, the checksum before all else: nothing can be taken for it."""
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
    """What stands before the tensors."""

    raw: bytes
    entries: dict[str, dict]  # of each tensor
    key: dict
    base: str
    checksum: str


def read_header(file: Path) -> Header:
    """The header of a file that `write` has written; raises Damaged."""
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
    except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or other JSON
        raise Damaged(_("damaged: its header cannot be read")) from None


def checksum(file: Path, head: Header) -> str:
    """The checksum of a file as it is, which `head.checksum` should be.

    Read into one small buffer and not through the map: faster, since no pages are mapped for it.
    """
    hasher = xxhash.xxh3_128(head.raw.replace(head.checksum.encode(), 32 * b"0", 1))
    buffer = memoryview(bytearray(2**20))
    with file.open("rb", buffering=0) as opened:
        opened.seek(len(head.raw))
        while size := opened.readinto(buffer):
            hasher.update(buffer[:size])
    return hasher.hexdigest()


def read(file: Path, key: dict, config: ModelConfig, device: torch.device) -> PhoGPT:
    """The PhoGPT that `write` has written with this key, on the device; raises Damaged."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        phogpt = PhoGPT(config)
    head = read_header(file)
    if head.key != key:
        raise Damaged(_("stale: {why}", why=difference(head.key, key)))
    wanted = expected(phogpt, DTYPES[key["dtype"]])
    with ThreadPoolExecutor(1) as second:
        computed = second.submit(checksum, file, head)
        try:
            with safe_open(file, framework="pt") as mapped:
                if missing := wanted.keys() - mapped.keys():
                    raise Damaged(_("damaged: tensor {name} is missing", name=min(missing)))
                tensors = {}
                for name in (name for name in head.entries if name in wanted):  # the file's order
                    tensor = mapped.get_tensor(name)
                    if (tensor.dtype, tuple(tensor.shape)) != wanted[name]:
                        raise Damaged(_("damaged: tensor {name} has another shape or dtype",
                                        name=name))
                    tensors[name] = tensor.to(device, copy=True)
        except SafetensorError as error:
            raise Damaged(_("damaged: {reason}", reason=str(error).splitlines()[0])) from None
        if computed.result() != head.checksum:
            raise Damaged(_("damaged: its checksum is another"))
    assemble(phogpt, tensors)
    return phogpt


def assemble(phogpt: PhoGPT, tensors: dict[str, torch.Tensor]) -> None:
    """Make the file's tensors the parameters of a PhoGPT on the meta device."""
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


# -- one base's file in a folder of caches


def family(file: Path, ending: str = "") -> list[Path]:
    """Files beside `file` of the same model, dtype and device, with any key; `ending` is a regular
    expression of what follows after .safetensors."""
    stem = file.stem.rpartition("-")[0]
    name = re.compile(re.escape(stem) + r"-[0-9a-f]{8}\.safetensors" + ending)
    try:
        return [other for other in sorted(file.parent.iterdir()) if name.fullmatch(other.name)]
    except OSError:  # nothing there, or nothing that may be seen
        return []


@dataclass(frozen=True)
class NF4Cache:
    """Where a base's NF4 weights are kept, whether they are there or not."""

    folder: Path  # of any number of caches
    name: str  # of the model
    base: str  # where its checkpoint lies
    key: dict

    @property
    def file(self) -> Path:
        """FOLDER/PhoGPT-4B-fp16-cuda-1a2b3c4d.safetensors, the last part a hash of the key."""
        digest = xxhash.xxh3_64_hexdigest(json.dumps(self.key, sort_keys=True).encode())[:8]
        parts = (self.name, self.key["dtype"], self.key["device"], digest)
        return self.folder / ("-".join(parts) + ".safetensors")

    def load(self, config: ModelConfig, device: torch.device) -> PhoGPT | None:
        """The model, not yet frozen; None where there is no whole cache with this key. Says which,
        on standard error."""
        if os.path.isfile(self.file):
            try:
                phogpt = read(self.file, self.key, config, device)
            except (Damaged, OSError) as reason:
                say_not_used(self.file, reason)
            else:
                say(_("base read from NF4 cache {file}", file=self.file))
                return phogpt
        for file, reason in self.stale():
            say_not_used(file, reason)
        return None

    def keep(self, phogpt: PhoGPT) -> None:
        """Write the model's file, then delete stale ones. A cache that cannot be written is said on
        standard error and ends no run."""
        try:
            size = write(phogpt, self.file, self.key, self.base)
        except (OSError, Refusal) as error:
            say(_("NF4 cache {file} cannot be written ({reason}); the run goes on without it",
                  file=self.file, reason=getattr(error, "strerror", None) or error))
            return
        say(_("NF4 cache written to {file} ({size})", file=self.file, size=human(size)))
        for file, _reason in self.stale():
            with suppress(OSError):
                file.unlink()

    def stale(self) -> Iterator[tuple[Path, str]]:
        """Files of the same base, dtype and device that no run like this one can use, and why."""
        for file in family(self.file):
            if file == self.file:
                continue
            try:
                head = read_header(file)
            except Damaged as reason:
                yield file, str(reason)
            except OSError:
                continue
            else:
                if head.base == self.base:
                    yield file, _("stale: {why}", why=difference(head.key, self.key))


def say_not_used(file: Path, reason) -> None:
    say(_("NF4 cache {file}: {reason}; it is made again from the checkpoint", file=file,
          reason=reason))


def say(line: str) -> None:
    """On standard error: generate.py's standard output is the answer alone."""
    print(line, file=sys.stderr)


def human(size: int) -> str:
    """Bytes as 5.4 GB or 31 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
