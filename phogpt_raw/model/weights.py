"""A checkpoint becomes an NF4 model, one tensor at a time, and every key is accounted for.

Linear weights are quantised to NF4 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314) from the dtype that they are stored in; embedding, norms and biases are cast to
the compute dtype. transformers' MPT loads PhoGPT without its 193 biases and only reports it; here a
key that is missing, unknown or of another shape is an error that names it.

Files are memory-mapped, so what a load holds in anonymous host memory is one tensor, not a shard.
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
WITHOUT_WEIGHTS = ["*.json", "*.jinja"]  # of a hub repository: config and tokenizer
FILES = [*WITHOUT_WEIGHTS, "*.safetensors", "*.bin"]  # never its code
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # some writers store both
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
    """A frozen PhoGPT and its tokenizer; `model` is `nano`, a folder or a hub id.

    `dtype` is the compute dtype (default fp32 on the CPU, fp16 elsewhere). nf4=False keeps plain
    weights in it. `nf4_cache` is a folder that keeps the quantised weights after a first load; from
    then on they are read from there (nf4_cache.py). Raises Refusal if the folder, the config, a
    file or a key is not valid.
    """
    check_nf4_cache(nf4_cache, nf4=nf4)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    folder = find_folder(model, revision)
    phogpt = read_model(folder, nf4=nf4, dtype=dtype, device=device, nf4_cache=nf4_cache)
    return phogpt, read_tokenizer(folder, phogpt.config)


def shape_alone(model: str | None, card: Card, *, planned: bool) -> ModelConfig | None:
    """The built-in shape that --model 7b5 or 4b names, for a plan without any file of the base;
    None for a base with files. Raises Refusal where there is no plan for it."""
    if model not in PUBLISHED or expanded(model).is_dir():
        return None
    if not planned:
        raise Refusal(f"--model {model}: is a shape without weights, for --dry-run; otherwise name "
                      f"a folder or a hub id such as vinai/PhoGPT-4B-Chat")
    if card.device == "cpu":
        raise Refusal(f"--model {model} --dry-run: plans for a GPU, and there is none here; name "
                      f"one, such as --card t4")
    return PUBLISHED[model]


def find_folder(model: str, revision: str | None = None, files: list[str] = FILES,
                named: str | None = None) -> Path:
    """The folder of `nano`, of a path, or of a hub repository, whose `files` are fetched or found
    in the cache; Refusal that begins with `named` (default: --model) where there is none."""
    named = named or f"--model {model}"
    local = NANO if model == "nano" else expanded(model)
    if local.is_dir():
        if revision:
            raise Refusal(f"--revision {revision}: is for a repository of the hub; {model} is on "
                          f"this computer and has none")
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
        raise Refusal(f"{named}: it has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise Refusal(
            f"{named}: no such repository on the hub (or private: then set HF_TOKEN){meant(model)}"
        ) from None
    except hub.HFValidationError as error:
        raise Refusal(f"{named}: no such folder, and not a hub id ({error})") from None
    except (hub.HTTPError, hub.LocalEntryNotFoundError, OSError) as error:  # proxy's: HTTPError
        raise Refusal(
            f"{named}: no such folder, and the hub does not answer "
            f"({type(error).__name__}); fetch it once while online, or name a folder{meant(model)}"
        ) from None


def meant(model: str) -> str:
    """A question after a base that cannot be found: the known one whose name is spelled like it.

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
    """The tokenizer of a model folder, its special tokens checked against PhoGPT's ids.

    PreTrainedTokenizerFast rather than AutoTokenizer: that one first parses config.json with
    transformers' own MPT class, which refuses VinAI's `attn_pdrop: 0.0`.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise Refusal(f"{folder / 'tokenizer.json'}: missing; copy the base's tokenizer files")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises nothing more special
        raise Refusal(f"{folder}: its tokenizer.json, or another tokenizer file, cannot be read "
                      f"({error}); fetch them again") from None
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in PINNED_IDS}
    if ids != PINNED_IDS:
        raise Refusal(f"{folder}: the tokenizer's special token ids {ids} are not PhoGPT's "
                      f"{PINNED_IDS}; copy the base's tokenizer files")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise Refusal(f"{folder / 'tokenizer_config.json'}: model_max_length is no number; fetch "
                      f"it again")
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise Refusal(f"{folder}: the tokenizer has a token of id {highest}, the embedding only "
                      f"{config.vocab_size} rows: they are not of one model")
    return tokenizer


def read_model(folder: Path, *, nf4: bool, dtype: torch.dtype, device: torch.device,
               nf4_cache: str | Path | None = None) -> PhoGPT:
    """The frozen PhoGPT of a model folder: from its cache where `nf4_cache` holds a whole one, else
    from the checkpoint, and then the cache is made."""
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
    """The place of a model folder's NF4 weights in the folder `caches`, whether they exist there or
    not."""
    key = make_key([folder / "config.json", *list_files(folder)], dtype, device)
    base = folder.resolve()
    if base.parent.name == "snapshots":  # …/models--vinai--PhoGPT-4B/snapshots/0a1b…
        base = base.parents[1]
    name = "nano" if folder == NANO else base.name.split("--")[-1]
    return NF4Cache(expanded(caches), name, str(base), key)


def read_checkpoint(folder: Path, config: ModelConfig, *, nf4: bool, dtype: torch.dtype,
                    device: torch.device) -> PhoGPT:
    """Build on the meta device, then fill each parameter as its tensor is read."""
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
    """(name, tensor, file) of each tensor of a model folder, not yet read; Refusal where they are
    not exactly those of `shapes`: each of them once, and no other."""
    wanted, heads, embedding = dict(shapes), [], None
    for name, tensor, file in iterate(list_files(folder)):
        shape = wanted.pop(name, None)
        if name == HEAD:
            heads.append((tensor, file))
            continue
        if shape is None:
            raise Refusal(f"{file}: tensor {name} " + (
                "is there twice" if name in shapes else
                "is not part of PhoGPT as config.json describes it; wrong config, or renamed keys"))
        if tensor.shape != shape:
            raise Refusal(f"{file}: tensor {name} has shape {list(tensor.shape)}, config.json "
                          f"asks for {list(shape)}")
        if name == EMBEDDING:
            embedding = tensor
        yield name, tensor, file
    for head, file in heads:
        if embedding is not None and not torch.equal(head, embedding):
            raise Refusal(f"{file}: tensor {HEAD} differs from {EMBEDDING}; PhoGPT's head is "
                          f"its embedding")
    if wanted:
        biases = sum(name.endswith(".bias") for name in wanted)
        hint = "; PhoGPT has biases: was it saved by transformers' own MPT?" if biases else ""
        raise Refusal(
            f"{folder}: {len(wanted)} tensors are missing ({biases} of them biases), the first is "
            f"{next(iter(wanted))}{hint}"
        )


def list_files(folder: Path) -> list[Path]:
    """Weight files of a folder, safetensors before .bin; an index's shards must all be there."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{end}.index.json"
        if index.is_file():
            return [shard(folder, name, index) for name in shard_names(index)]
        if (folder / f"{stem}.{end}").is_file():
            return [folder / f"{stem}.{end}"]
    raise Refusal(f"{folder}: no weights (model.safetensors, pytorch_model.bin or an index of "
                  f"shards)")


def shard_names(index: Path) -> list[str]:
    """The names of the shards that an index lists; Refusal for what is no index."""
    listed = read_object(index, "fetch it again").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise Refusal(f"{index}: its weight_map does not say which tensor is in which file; fetch "
                      f"it again")
    for tensor, name in listed.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise Refusal(f"{index}: {tensor} is in {str(name)[:80]!r}, which is no name of a file "
                          f"beside it; fetch it again")
    return sorted(set(listed.values()))


def shard(folder: Path, name: str, index: Path) -> Path:
    """The file of a shard. Raises Refusal where it is missing, or a link to somewhere else than the
    hub's cache, which keeps the content of its files in blobs/."""
    file = folder / name
    if not file.is_file():
        raise Refusal(f"{file}: this shard is missing, {index.name} names it")
    there = file.resolve().parent
    if there not in (folder.resolve(), folder.resolve().parent.parent / "blobs"):
        raise Refusal(f"{file}: is a link to another folder, {there}; copy the file, or name that "
                      f"folder")
    return file


def iterate(files: list[Path]) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """(name, tensor, file) of each tensor, mapped from the file and not yet read."""
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
        except Exception as error:  # each reader raises other errors for a damaged file
            reason = str(error).strip().split("\n")[0]
            raise Refusal(f"{file}: cannot be read ({reason}); {os.path.getsize(file)} bytes: "
                          f"truncated? fetch it again") from None


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """A .bin file's tensors, memory-mapped; weights only, so that no code in it can run."""
    with open(file, "rb") as opened:
        if opened.read(2) != b"PK":
            raise Refusal(f"{file}: not the zip that torch.save writes since torch 1.6; fetch it "
                          f"again (is it a git-lfs pointer?), or load and save it with a new torch")
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # torch's error text advises to run the code
        raise Refusal(f"{file}: holds more than tensors, maybe code that would run on loading; "
                      f"use safetensors or another source") from None


def place(phogpt: PhoGPT, name: str, tensor: torch.Tensor, *, nf4, dtype, device):
    """Put one tensor into the parameter of its name: a block's linear weight as NF4, the others in
    `dtype`.

    Raises Refusal where it holds inf, nan or what `dtype` cannot hold: every loss would be nan.
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
        there = there.to(dtype, copy=there is tensor)  # not a view of the mapped file
        module.register_parameter(kind, nn.Parameter(there, requires_grad=False))


def base_on_meta(shape: ModelConfig, dtype: torch.dtype, *, nf4: bool = True) -> PhoGPT:
    """The module tree of a loaded checkpoint on the meta device, without its values."""
    make_scale_code()  # on the CPU, before the first weight on the meta device
    meta = torch.device("meta")
    with meta:
        phogpt = PhoGPT(shape)
    for name, p in dict(phogpt.named_parameters()).items():
        stored = torch.empty(p.shape, dtype=torch.bfloat16, device=meta)
        place(phogpt, name, stored, nf4=nf4, dtype=dtype, device=meta)
    return frozen(phogpt, nf4=nf4, device=meta)


def check_finite(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise Refusal where `dtype` cannot hold the values of a tensor."""
    check_values(tensor, name, torch.finfo(dtype).max, dtype_name(dtype), "take another dtype")


def check_values(tensor: torch.Tensor, name: str, limit: float, kind: str, remedy: str) -> None:
    """Raise Refusal where a tensor holds NaN, infinity, or more than the `limit` of a `kind`."""
    if tensor.is_meta or not tensor.is_floating_point():
        return
    low, high = (float(end) for end in tensor.aminmax())
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise Refusal(f"tensor {name} holds NaN or infinite values: the file is damaged; fetch it "
                      f"again, or take an earlier checkpoint")
    if largest > limit:
        raise Refusal(f"tensor {name} holds values up to {largest:.3g}, and {kind} ends at "
                      f"{limit:.3g}; {remedy}")


def frozen(phogpt: PhoGPT, *, nf4: bool, device) -> PhoGPT:
    """A model whose every parameter has been placed, ready for adapters."""
    phogpt.slopes_H = phogpt.slopes_H.to(device)
    # PEFT decides by this flag whether a linear gets its 4-bit layer.
    phogpt.is_loaded_in_4bit = nf4
    return phogpt.requires_grad_(False).eval()
