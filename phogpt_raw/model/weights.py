"""Load a checkpoint as an NF4 model, one tensor at a time, and check every key.

The weights of linear layers are quantised to NF4 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314), directly from the checkpoint's dtype. Embedding, norms and biases are cast to the
compute dtype. transformers' MPT loads PhoGPT without its 193 biases and prints only a warning.
Here a missing key, an unknown key or a wrong shape is an error that names the key.

Files are memory-mapped, so only one tensor at a time is copied to host memory, not a whole shard.
"""

import difflib
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from phogpt_raw.cards import Card, dtype_name
from phogpt_raw.config import check_nf4_cache
from phogpt_raw.files import expanded, read_object
from phogpt_raw.messages import _
from phogpt_raw.model.nf4 import kept_in_nf4, nf4_linear
from phogpt_raw.model.nf4_cache import NF4Cache, make_key
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig, PhoGPT
from phogpt_raw.private_apis import make_scale_code
from phogpt_raw.refusal import Refusal

KNOWN = ("nano", "vinai/PhoGPT-7B5", "vinai/PhoGPT-7B5-Instruct", "vinai/PhoGPT-4B",
         "vinai/PhoGPT-4B-Chat")
NANO = Path(__file__).parents[1] / "nano" / "base"
WITHOUT_WEIGHTS = ["*.json", "*.jinja"]  # files of a hub repository: config and tokenizer
FILES = [*WITHOUT_WEIGHTS, "*.safetensors", "*.bin"]  # never the repository's code
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # equal tensors; a file may have both
PINNED_IDS = dict(unk=0, bos=1, eos=2, pad=3)


def load_base(
    model: str,
    *,
    nf4: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    nf4_cache: str | Path | None = None,
) -> tuple[PhoGPT, "PreTrainedTokenizerFast"]:  # noqa: F821
    """A frozen PhoGPT and its tokenizer. `model` is `nano`, a folder or a hub id.

    `dtype` is the compute dtype: by default fp32 on a CPU, else fp16. With nf4=False the weights
    are not quantised, and have this dtype. `nf4_cache` is a folder for quantised weights. The first
    load writes these weights into the folder, and later loads read them from it (nf4_cache.py).
    Raises Refusal if the folder, the config, a file or a key is not valid.
    """
    check_nf4_cache(nf4_cache, nf4=nf4)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    folder = find_folder(model, revision)
    phogpt = read_model(folder, nf4=nf4, dtype=dtype, device=device, nf4_cache=nf4_cache)
    return phogpt, read_tokenizer(folder, phogpt.config)


def shape_alone(model: str | None, card: Card, *, planned: bool) -> ModelConfig | None:
    """The built-in shape that --model 7b5 or 4b names. With it, --dry-run needs no files of the
    base. None if `model` names a base with files.

    planned: whether --dry-run was given. Raises Refusal for a built-in shape without --dry-run, or
    on a CPU.
    """
    if model not in PUBLISHED or expanded(model).is_dir():
        return None
    if not planned:
        raise Refusal(f"--model {model}: is a shape without weights, for --dry-run; otherwise name "
                      f"a folder or a hub id such as vinai/PhoGPT-4B-Chat")
    if card.device == "cpu":
        raise Refusal(f"--model {model} --dry-run: plans for a GPU, but there is none here; name "
                      f"one, such as --card t4")
    return PUBLISHED[model]


def find_folder(model: str, revision: str | None = None, files: list[str] = FILES,
                named: str | None = None) -> Path:
    """The folder of a model. `model` is `nano`, a path or the id of a hub repository. The `files`
    of a repository are downloaded, or found in the hub's cache.

    Raises Refusal if there is no such folder. Its message begins with `named` (default: --model).
    """
    named = named or f"--model {model}"
    local = NANO if model == "nano" else expanded(model)
    if local.is_dir():
        if revision:
            raise Refusal(f"--revision {revision}: is for a repository of the hub; {model} is a "
                          f"local folder and has no revisions")
        return local
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise Refusal(f"{named}: no such folder, and not a hub id such as vinai/PhoGPT-4B"
                      + meant(model))
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except hub.GatedRepoError:
        raise Refusal(
            f"{named}: the repository is gated; accept its terms on "
            f"https://huggingface.co/{model} and set HF_TOKEN to a token of that account"
        ) from None
    except hub.RevisionNotFoundError:
        raise Refusal(f"{named}: the repository has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise Refusal(
            f"{named}: no such repository on the hub (if it is private, set HF_TOKEN){meant(model)}"
        ) from None
    except hub.HFValidationError as error:
        raise Refusal(f"{named}: no such folder, and not a hub id ({error})") from None
    except (hub.HTTPError, hub.LocalEntryNotFoundError, OSError) as error:  # proxies: HTTPError
        raise Refusal(
            f"{named}: no such folder, and the hub does not answer "
            f"({type(error).__name__}); fetch it once while online, or name a folder{meant(model)}"
        ) from None


def meant(model: str) -> str:
    """A question for the end of an error message about an unknown base. It names the known base
    with the most similar name. Without a similar name, the text is empty.

    >>> meant("PhoGPT-4B-Chat"), meant("vinai/phogpt_7b5")
    ('; did you mean vinai/PhoGPT-4B-Chat?', '; did you mean vinai/PhoGPT-7B5?')
    >>> meant("nanoo"), meant("gpt2")
    ('; did you mean nano?', '')
    """
    names = {name: base for base in KNOWN
             for name in (base.lower().removeprefix("vinai/"),
                          base.lower().removeprefix("vinai/phogpt-"))}
    asked = model.rpartition("/")[2].lower().replace("_", "-")
    near = difflib.get_close_matches(asked, names, 1, 0.8)
    return f"; did you mean {names[near[0]]}?" if near and names[near[0]] != model else ""


def read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise Refusal(f"{folder}: holds an adapter, not a model; name it with --adapter")
    if not path.is_file():
        raise Refusal(f"{path}: missing; a model folder holds config.json beside the weights")
    return ModelConfig.from_json(read_object(path, "fetch it again"), str(path))


def read_tokenizer(folder: Path, config: ModelConfig):
    """The tokenizer of a model's folder. Its special tokens must have PhoGPT's ids.

    This function uses PreTrainedTokenizerFast, not AutoTokenizer. AutoTokenizer first parses
    config.json with transformers' own MPT class, which refuses VinAI's `attn_pdrop: 0.0`.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise Refusal(f"{folder / 'tokenizer.json'}: missing; copy the base's tokenizer files")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers has no more specific error
        raise Refusal(f"{folder}: its tokenizer.json, or another tokenizer file, cannot be read "
                      f"({error}); fetch them again") from None
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in PINNED_IDS}
    if ids != PINNED_IDS:
        raise Refusal(f"{folder}: the tokenizer's special token ids {ids} are not PhoGPT's "
                      f"{PINNED_IDS}; copy the base's tokenizer files")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise Refusal(f"{folder / 'tokenizer_config.json'}: model_max_length is not a number; "
                      f"fetch it again")
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise Refusal(f"{folder}: the tokenizer has a token of id {highest}, but the embedding "
                      f"has only {config.vocab_size} rows; they belong to different models")
    return tokenizer


def read_model(folder: Path, *, nf4: bool, dtype: torch.dtype, device: torch.device,
               nf4_cache: str | Path | None = None) -> PhoGPT:
    """The frozen PhoGPT of a model's folder. If the folder `nf4_cache` has a valid cache file for
    it, the model is read from this file. Else it is read from the checkpoint, and the cache file is
    written."""
    check_nf4_cache(nf4_cache, nf4=nf4)
    config = read_config(folder)
    cache = nf4_cache and find_cache(folder, nf4_cache, dtype=dtype, device=device)
    phogpt = cache.load(config, device) if cache else None
    if phogpt is None:
        phogpt = read_checkpoint(folder, config, nf4=nf4, dtype=dtype, device=device)
        if cache:
            cache.keep(phogpt)
    return frozen(phogpt, nf4=nf4, device=device)


def find_cache(folder: Path, caches: str | Path, *, dtype: torch.dtype,
               device: torch.device) -> NF4Cache:
    """The cache file of a model's NF4 weights in the folder `caches`. The file may not exist yet.
    """
    key = make_key([folder / "config.json", *list_files(folder)], dtype, device)
    base = folder.resolve()
    if base.parent.name == "snapshots":  # …/models--vinai--PhoGPT-4B/snapshots/0a1b…
        base = base.parents[1]
    name = "nano" if folder == NANO else base.name.split("--")[-1]
    return NF4Cache(expanded(caches), name, str(base), key)


def read_checkpoint(folder: Path, config: ModelConfig, *, nf4: bool, dtype: torch.dtype,
                    device: torch.device) -> PhoGPT:
    """The PhoGPT of a checkpoint. It is built on the meta device. Each parameter is filled when its
    tensor is read."""
    with torch.device("meta"):
        phogpt = PhoGPT(config)
    shapes = {name: p.shape for name, p in phogpt.named_parameters()}
    what = _("quantising the base") if nf4 else _("reading the base")
    for name, tensor, file in tqdm(accounted(folder, shapes), desc=what, total=len(shapes),
                                   unit=" tensors", leave=False, disable=None):
        try:
            place(phogpt, name, tensor, nf4=nf4, dtype=dtype, device=device)
        except Refusal as refusal:
            raise Refusal(f"{file}: {refusal}") from None
    return phogpt


def accounted(folder: Path, shapes: dict[str, torch.Size]
              ) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yields (name, tensor, file) for each tensor in a model's folder. The tensors are mapped, not
    yet read.

    Raises Refusal unless each name in `shapes` occurs once, with its shape, and no other name
    occurs. Only lm_head.weight may occur too, if it equals the embedding.
    """
    wanted, heads, embedding = dict(shapes), [], None
    for name, tensor, file in iterate(list_files(folder)):
        shape = wanted.pop(name, None)
        if name == HEAD:
            heads.append((tensor, file))
            continue
        if shape is None:
            raise Refusal(f"{file}: tensor {name} " + (
                "occurs twice" if name in shapes else
                "is not part of PhoGPT as config.json describes it; wrong config, or renamed keys"))
        if tensor.shape != shape:
            raise Refusal(f"{file}: tensor {name} has shape {list(tensor.shape)}, config.json "
                          f"requires {list(shape)}")
        if name == EMBEDDING:
            embedding = tensor
        yield name, tensor, file
    for head, file in heads:
        if embedding is not None and not torch.equal(head, embedding):
            raise Refusal(f"{file}: tensor {HEAD} differs from {EMBEDDING}; PhoGPT's head is "
                          f"its embedding")
    if wanted:
        biases = sum(name.endswith(".bias") for name in wanted)
        hint = "; was it saved by transformers' MPT, which drops biases?" if biases else ""
        raise Refusal(
            f"{folder}: {len(wanted)} tensors are missing ({biases} of them biases), the first is "
            f"{next(iter(wanted))}{hint}"
        )


def list_files(folder: Path) -> list[Path]:
    """The weight files of a folder. safetensors files are preferred to .bin files. If there is an
    index, all its shards must exist."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{end}.index.json"
        if index.is_file():
            return [shard(folder, name, index) for name in shard_names(index)]
        if (folder / f"{stem}.{end}").is_file():
            return [folder / f"{stem}.{end}"]
    raise Refusal(f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of "
                  f"shards)")


def shard_names(index: Path) -> list[str]:
    """The names of the shards that an index lists. Raises Refusal if the file is not a valid index.
    """
    listed = read_object(index, "fetch it again").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise Refusal(f"{index}: its weight_map does not say which tensor is in which file; fetch "
                      f"it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise Refusal(f"{index}: {tensor} is in {str(name)[:80]!r}, which is not the name of a "
                          f"file in the same folder; fetch the index again")
    return sorted(set(listed.values()))


def shard(folder: Path, name: str, index: Path) -> Path:
    """The file of a shard. Raises Refusal if it is missing or is a link to another folder. A link
    to blobs/ is allowed, because the hub's cache stores the content of its files there."""
    file = folder / name
    if not file.is_file():
        raise Refusal(f"{file}: this shard is missing, but {index.name} names it")
    there = file.resolve().parent
    if there not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise Refusal(f"{file}: is a link to another folder, {there}; copy the file, or name that "
                      f"folder")
    return file


def iterate(files: list[Path]) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Yields (name, tensor, file) for each tensor. The tensors are mapped, not yet read."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict, it has no __iter__)
                        yield name, tensors.get_tensor(name), file
            else:
                yield from ((name, tensor, file) for name, tensor in read_bin(file).items())
        except Refusal:
            raise
        except Exception as error:  # the readers raise different errors for a damaged file
            reason = str(error).strip().split("\n")[0]
            raise Refusal(f"{file}: cannot be read ({reason}); {os.path.getsize(file)} bytes: "
                          f"truncated? fetch it again") from None


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """The memory-mapped tensors of a .bin file. Only weights are loaded, so no code in the file can
    run."""
    with open(file, "rb") as opened:
        if opened.read(2) != b"PK":
            raise Refusal(f"{file}: not the zip that torch.save writes since torch 1.6; fetch it "
                          f"again (is it a git-lfs pointer?), or load and save it with a new torch")
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises to run the code in the file
        raise Refusal(f"{file}: holds more than tensors, maybe code that would run on loading; "
                      f"use safetensors or another source") from None


def place(phogpt: PhoGPT, name: str, tensor: torch.Tensor, *, nf4, dtype, device):
    """Store one tensor in the parameter `name` of the model. With `nf4`, the weights of linear
    layers are stored in NF4. All other tensors are stored in `dtype`.

    Raises Refusal if the tensor contains inf, nan or a value that is too large for `dtype`. With
    such values every loss would be nan.
    """
    path, kind = name.rsplit(".", 1)
    module = phogpt.get_submodule(path)
    if not tensor.is_floating_point():
        raise Refusal(f"tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, not "
                      f"as floating-point numbers; name a checkpoint that is not quantised")
    there = tensor.to(device)  # checked and cast on the device, not on the host
    check_finite(there, name, dtype)
    if nf4 and kept_in_nf4(module, kind):
        parent, child = path.rsplit(".", 1)
        linear = nf4_linear(there, dtype, device, bias=module.bias)
        setattr(phogpt.get_submodule(parent), child, linear)
    else:
        there = there.to(dtype, copy=there is tensor)  # a copy, never a view of the mapped file
        module.register_parameter(kind, nn.Parameter(there, requires_grad=False))


def base_on_meta(shape: ModelConfig, dtype: torch.dtype, *, nf4: bool = True) -> PhoGPT:
    """A PhoGPT with the modules of a loaded checkpoint, on the meta device, so without values."""
    make_scale_code()  # must run on the CPU before a weight is quantised on the meta device
    meta = torch.device("meta")
    with meta:
        phogpt = PhoGPT(shape)
    for name, p in dict(phogpt.named_parameters()).items():
        stored = torch.empty(p.shape, dtype=torch.bfloat16, device=meta)
        place(phogpt, name, stored, nf4=nf4, dtype=dtype, device=meta)
    return frozen(phogpt, nf4=nf4, device=meta)


def check_finite(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise Refusal if a tensor contains NaN, infinity or a value that is too large for `dtype`."""
    check_values(tensor, name, torch.finfo(dtype).max, dtype_name(dtype), "use another dtype")


def check_values(tensor: torch.Tensor, name: str, limit: float, kind: str, remedy: str) -> None:
    """Raise Refusal if a tensor contains NaN, infinity or a value larger than `limit`.

    kind: the number format whose largest value is `limit`. remedy: the end of the message.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return
    low, high = (float(end) for end in tensor.aminmax())
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise Refusal(f"tensor {name} holds NaN or infinite values: the file is damaged; fetch it "
                      f"again, or use an earlier checkpoint")
    if largest > limit:
        raise Refusal(f"tensor {name} holds values up to {largest:.3g}, but the largest value of "
                      f"{kind} is {limit:.3g}; {remedy}")


def frozen(phogpt: PhoGPT, *, nf4: bool, device) -> PhoGPT:
    """Freeze a model whose parameters are all loaded, and set its evaluation mode. It is then ready
    for adapters."""
    phogpt.slopes_H = phogpt.slopes_H.to(device)
    # If this flag is set, PEFT uses its LoRA layer for 4-bit linear layers.
    phogpt.is_loaded_in_4bit = nf4
    return phogpt.requires_grad_(False).eval()
