"""LoRA adapters: PEFT defines them, and one flat buffer stores them.

PEFT injects the LoRA layers, names them and defines the file format. So any program that uses PEFT
can load an adapter that was trained here. The training itself uses this project's code. All adapter
weights are views of one flat buffer (flat.py). A layer with plain LoRA runs `lora_linear` in place
of PEFT's forward. A layer with dropout, DoRA or another variant runs PEFT's forward.

Recipes for Llama name target layers such as `q_proj`, which PhoGPT does not have. PEFT ignores an
unknown target if another target matches. With the usual targets for Llama, only `up_proj` and
`down_proj` match, so half of PhoGPT's linear layers get no adapter. Here an unknown target is an
error.
"""

import copy
import re
import warnings
from pathlib import Path
from types import MethodType

import torch
from torch import nn

from phogpt_raw.files import save_tensors
from phogpt_raw.model.adapter_config import read_adapter_config
from phogpt_raw.model.flat import FlatBuffer, on_host
from phogpt_raw.model.lora import lora_linear
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.private_apis import held_by
from phogpt_raw.refusal import Refusal

TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # stock PEFT ignores a key without this prefix, with a warning


class Adapters(FlatBuffer):
    """The adapters of a model in a FlatBuffer, and their files in PEFT's format.

    All parameters of `model` that require a gradient are adapters. trainable=False is for decoding:
    the adapters then require no gradient, and no gradient buffer is allocated.
    """

    def __init__(self, model: PhoGPT, trainable: bool = True):
        self.model = model
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        super().__init__(named, model.head.dtype, trainable)
        self.named = None  # the result of `tensors`, computed only once

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapters' weights by their PEFT names. They are fp32 views of the flat buffer."""
        from peft import get_peft_model_state_dict

        if self.named is None:
            state = get_peft_model_state_dict(self.model, dict(self.views),
                                              save_embedding_layers=False)
            self.named = {PREFIX + name: tensor for name, tensor in state.items()}
        return self.named

    def on_host(self) -> dict[str, torch.Tensor]:
        """A copy of `tensors()` in host memory, made with one copy of the flat buffer. On a GPU the
        copy is asynchronous: synchronize before you read the values."""
        flat = on_host(self.flat.detach())
        return {name: flat.as_strided(view.shape, view.stride(), view.storage_offset())
                for name, view in self.tensors().items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor], where: str) -> None:
        """Copy `tensors`, which have PEFT's names, into the flat buffer.

        Every name and shape must match, and every value must be finite. Otherwise a Refusal is
        raised, whose message begins with `where` and names the tensor.
        """
        own = self.tensors()
        for name in sorted(own.keys() ^ tensors.keys()):
            problem = "lacks tensor" if name in own else "holds unknown tensor"
            raise Refusal(f"{where}: {problem} {name}; the adapter was made for another model")
        for name, view in own.items():
            if view.shape != tensors[name].shape:
                raise Refusal(f"{where}: {name} has shape {list(tensors[name].shape)}, this model "
                              f"needs {list(view.shape)}")
            if not tensors[name].is_floating_point():
                raise Refusal(f"{where}: {name} is stored as {tensors[name].dtype}, not as "
                              f"floating-point numbers")
            if not tensors[name].isfinite().all():
                raise Refusal(f"{where}: {name} holds NaN or infinite values: its training "
                              f"diverged, or the file is damaged; use an earlier checkpoint")
            view.copy_(tensors[name])
        self.cast()

    def save(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Write adapter_model.safetensors and adapter_config.json, as stock PEFT reads them.

        tensors: the result of an earlier `on_host`. By default the current weights are written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous()
                   for name, tensor in (tensors or self.tensors()).items()}
        save_tensors(folder / "adapter_model.safetensors", tensors)
        config = copy.copy(self.model.peft_config["default"])
        config.inference_mode = True
        if not isinstance(config.target_modules, str):  # a set, whose order differs from run to run
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the weights from the folder of an adapter with the same configuration.

        Raises Refusal if the file is missing or damaged, or if its tensors do not match the
        configuration.
        """
        tensors, file = read_tensors(Path(folder))
        self.load_tensors(tensors, str(file))


def read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """Returns (weights, their file) of the adapter in a folder. The weights have PEFT's names and
    are on the CPU."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    older = file.with_suffix(".bin")  # written by PEFT before 0.6
    try:
        if older.is_file() and not file.is_file():
            file = older
            return torch.load(file, map_location="cpu", weights_only=True), file
        return load_file(file), file
    except FileNotFoundError:
        raise Refusal(f"{file}: missing; give --adapter the folder of a run") \
            from None
    except Exception as error:
        raise Refusal(f"{file}: cannot be read ({error})") from None


def new_adapters(
    model: PhoGPT,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] = TARGETS,
    base: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Adapters:
    """Inject new LoRA layers. In each layer, the matrix A is random (Kaiming uniform), the matrix B
    is zero, and their product B A is scaled by alpha / rank.

    adapter_config.json records `base` and `revision` as the base model's name and revision.
    """
    from peft import LoraConfig

    check_targets(model, targets)
    torch.manual_seed(seed)
    return inject(model, LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets),
        bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base,
        revision=revision,
    ))


def load_adapters(model: PhoGPT, folder: str | Path, base: str | None = None,
                  revision: str | None = None, trainable: bool = True) -> Adapters:
    """Inject the adapters of a folder. Their rank, alpha and targets come from its
    adapter_config.json.

    `base`, `revision`: the base model's name and revision to record when the adapters are saved
    again. Without `base` the recorded name and revision do not change. trainable=False is for
    decoding: no memory is allocated for gradients.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors, file = read_tensors(folder)
    where = str(folder / "adapter_config.json")
    check_size(config, model, tensors, where)
    config.inference_mode = False
    config.init_lora_weights = True  # PEFT's default; the file's weights replace its values next
    if base:
        config.base_model_name_or_path, config.revision = base, revision
    adapters = inject(model, config, trainable, where)
    check_patterns(config, model, where)
    adapters.load_tensors(tensors, str(file))
    return adapters


def check_size(config, model: PhoGPT, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raise Refusal if an adapter's configuration names a higher rank than its weights have, or a
    block that the base does not have. This check runs before anything is allocated."""
    stored = max((tensor.shape[0] for name, tensor in tensors.items()
                  if "lora_A" in name and tensor.dim()), default=0)
    for rank in (config.r, *config.rank_pattern.values()):
        if stored and rank > stored:
            raise Refusal(f"{where}: rank {rank}, but the highest rank of its weights is "
                          f"{stored}; use another copy of the adapter")
    chosen, last = config.layers_to_transform, model.config.n_layers - 1
    for block in [chosen] if isinstance(chosen, int) else chosen or []:
        if block > last:
            raise Refusal(f"{where}: layers_to_transform {block}, but the base's blocks are 0 to "
                          f"{last}; the adapter was made for another model")


def check_patterns(config, model: PhoGPT, where: str) -> None:
    """Raise Refusal if rank_pattern or alpha_pattern names a layer without an adapter. PEFT ignores
    such an entry with a warning, and the adapter then differs from its configuration."""
    adapted = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    for field in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({name})$", layer) for layer in adapted):
                raise Refusal(f"{where}: {field} names {name}, but no layer of that name has an "
                              f"adapter; correct the entry, or remove it")


def inject(model: PhoGPT, config, trainable: bool = True,
           where: str = "adapter_config.json") -> Adapters:
    """Inject the LoRA layers that PEFT's `config` describes into the model.

    Raises Refusal if the model has none of the targets, or if a bias would be trained in 16 bits.
    The message begins with `where`.
    """
    from peft import inject_adapter_in_model

    if config.bias != "none" and model.head.dtype != torch.float32:
        raise Refusal(f"{where}: bias {config.bias!r} trains biases, but biases are frozen "
                      f"in {str(model.head.dtype).removeprefix('torch.')}; use an adapter "
                      f"with bias \"none\", or --dtype fp32")
    try:
        with warnings.catch_warnings(action="ignore"):  # check_patterns raises errors instead
            inject_adapter_in_model(config, model)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise Refusal(f"{where}: its layers do not match this base ({said[:200]})") from None
    model.train(model.training)  # new layers are in training mode at first, with dropout
    fuse(model)
    return Adapters(model, trainable)


def fuse(model: PhoGPT) -> None:
    """Replace PEFT's forward by `lora_forward` in each LoRA layer over a linear layer."""
    from bitsandbytes import nn as bnb
    from peft.tuners.lora import Linear, Linear4bit

    for layer in model.modules():
        if (type(layer) in (Linear, Linear4bit)
                and type(layer.base_layer) in (nn.Linear, bnb.Linear4bit)):
            layer.forward = MethodType(lora_forward, layer)


def lora_forward(layer, x, *args, **kwargs):
    """The forward of a LoRA layer. It runs `lora_linear` if the layer is plain LoRA, else PEFT's
    own forward."""
    name = plain_adapter(layer)
    if name is None or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, layer.base_layer, A, B, layer.scaling[name])


def plain_adapter(layer) -> str | None:
    """The name of the active adapter of `layer`, if exactly one adapter is active and it is plain
    LoRA. Else None.

    `lora_forward` checks this at each call, because PEFT can disable, merge, replace and add
    adapters at any time.
    """
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name = active[0]
    plain = (
        name in layer.lora_A
        and name not in layer.lora_variant  # DoRA and other variants
        and not layer.lora_bias[name]
        and isinstance(layer.lora_dropout[name], nn.Identity)
        # With bias="all", the base layer's bias requires a gradient.
        and not any(p.requires_grad for p in layer.base_layer.parameters())
    )
    return name if plain else None


def base_and_adapter(layer: nn.Module) -> tuple[nn.Module, str | None] | None:
    """(base layer, name of the active adapter) of a linear layer with or without LoRA. The name is
    None if the layer has no LoRA, or if its adapters are disabled.

    Returns None if an adapter is merged, or if the layer computes anything but its base layer plus
    one plain LoRA adapter.
    """
    if not hasattr(layer, "lora_A"):
        return layer, None
    adapter = plain_adapter(layer)
    if layer.merged or (adapter is None and not layer.disable_adapters):
        return None
    return layer.base_layer, adapter


def check_targets(model: PhoGPT, targets) -> None:
    if isinstance(targets, str):  # PEFT itself checks a regular expression or "all-linear"
        return
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not targets:
        raise Refusal(f"--targets: names no linear layer; the model has {', '.join(sorted(names))}")
    for target in sorted(targets):
        if target.rsplit(".", 1)[-1] not in names:
            raise Refusal(f"--targets: the model has no linear layer {target}; it has "
                          f"{', '.join(sorted(names))}")


def same_base(model: PhoGPT) -> PhoGPT:
    """A second model that shares the frozen weights of `model`, for another adapter.

    Its modules are new, so an adapter that is injected into one model is not in the other. Its
    parameters and buffers are the same tensors as in `model`. `model` must not have adapters yet.
    """
    shared = {id(value): value for module in model.modules() for value in held_by(module)}
    return copy.deepcopy(model, shared)
