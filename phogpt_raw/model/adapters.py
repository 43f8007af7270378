"""LoRA adapters: PEFT decides what they are, one flat buffer holds them.

PEFT injects the LoRA layers, names them and fixes the file format, so that an adapter trained here
is an adapter anywhere. What training touches is ours: every adapter weight is a view of one flat
fp32 buffer, every gradient a view of another, so clipping and the optimizer handle one tensor
instead of hundreds. And a layer that is plain LoRA runs `lora_linear` in place of PEFT's
forward; DoRA, dropout and the like run PEFT's.

The surprise: a name that the model lacks (`q_proj`, from Llama recipes) is no error to PEFT as long
as another one matches, and half the layers stay without adapters. Here it is one.
"""

import copy
from pathlib import Path
from types import MethodType

import torch
from torch import nn

from phogpt_raw.model.lora import lora_linear
from phogpt_raw.model.phogpt import PhoGPT
from phogpt_raw.refusal import Refusal

TARGETS = ("Wqkv", "out_proj", "up_proj", "down_proj")
ALIGNMENT = 256  # elements; the 8-bit optimizer's block, so that no block spans two adapters
PREFIX = "base_model.model."  # stock PEFT applies no key without it, and only warns


class Adapters:
    """The adapters of a model: `flat` is the one trainable parameter, fp32, `flat.grad` its twin.

    `views` are (name, view of flat); `count` is the number of adapter weights. Where the model
    computes in 16 bits, `working` is a copy of `flat` in these, made anew as each forward begins:
    one cast in place of one a layer and use.
    """

    def __init__(self, model: PhoGPT):
        self.model = model
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        starts, end = [], 0
        for _, p in named:
            starts.append(end)
            end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        device = named[0][1].device
        self.flat = nn.Parameter(torch.zeros(end, device=device))
        self.flat.grad = torch.zeros(end, device=device)
        self.working = None
        if model.head.dtype != torch.float32:
            self.working = torch.empty_like(self.flat, dtype=model.head.dtype)
            model.register_forward_pre_hook(self.cast)
        self.views = []
        for (name, p), start in zip(named, starts, strict=True):
            piece = slice(start, start + p.numel())
            view = self.flat.data[piece].view_as(p)
            p.data = view.copy_(p.data)
            p.grad = self.flat.grad[piece].view_as(p)
            if self.working is not None:
                p.compute_copy = self.working[piece].view_as(p)
            self.views.append((name, view))
        self.count = sum(p.numel() for _, p in named)
        self.cast()

    def cast(self, *_) -> None:
        if self.working is not None:
            self.working.copy_(self.flat.detach())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapters under PEFT's names, fp32."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {PREFIX + name: tensor for name, tensor in state.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor], where: str) -> None:
        """Copy `tensors` (PEFT's names) into the views; every name and shape must agree."""
        mine = self.tensors()
        for name in sorted(mine.keys() ^ tensors.keys()):
            word = "lacks" if name in mine else "holds an unknown"
            raise Refusal(f"{where}: {word} {name}; it was made for another model")
        for name, view in mine.items():
            if view.shape != tensors[name].shape:
                raise Refusal(f"{where}: {name} has shape {list(tensors[name].shape)}, this model "
                              f"needs {list(view.shape)}")
            view.copy_(tensors[name])
        self.cast()

    def save(self, folder: Path) -> None:
        """adapter_model.safetensors and adapter_config.json, as stock PEFT reads them."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(self.model.peft_config["default"])
        config.inference_mode = True
        if not isinstance(config.target_modules, str):  # a set, in an order of its own each time
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Take over the weights of an adapter folder of the same configuration."""
        from safetensors.torch import load_file

        file = Path(folder) / "adapter_model.safetensors"
        try:
            tensors = load_file(file)
        except FileNotFoundError:
            raise Refusal(f"{file}: missing; --adapter names a folder that a run has written") \
                from None
        except Exception as error:
            raise Refusal(f"{file}: cannot be read ({error})") from None
        self.load_tensors(tensors, str(file))


def new_adapters(
    model: PhoGPT,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: tuple[str, ...] = TARGETS,
    base: str | None = None,
    seed: int = 0,
) -> Adapters:
    """Inject fresh LoRA layers: A uniform (Kaiming), B zero, scaled by alpha / rank.

    `base` is what adapter_config.json names as the model below.
    """
    from peft import LoraConfig

    torch.manual_seed(seed)
    return inject(model, LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets),
        bias="none", task_type="CAUSAL_LM", base_model_name_or_path=base,
    ))


def load_adapters(model: PhoGPT, folder: str | Path, base: str | None = None) -> Adapters:
    """Inject the adapters of a folder, with its own rank, alpha and targets.

    `base`: what they name as the model below when saved again; None leaves what they name now.
    """
    config = read_config(Path(folder))
    config.inference_mode = False
    config.base_model_name_or_path = base or config.base_model_name_or_path
    adapters = inject(model, config)
    adapters.load(folder)
    return adapters


def named_base(folder: Path) -> str:
    """The base that an adapter folder names."""
    base = read_config(Path(folder)).base_model_name_or_path
    if not base:
        raise Refusal(f"{folder}: names no base model; say which with --model")
    return base


def read_config(folder: Path):
    from peft import LoraConfig, PeftConfig

    file = folder / "adapter_config.json"
    if not file.is_file():
        raise Refusal(f"{file}: missing; name a folder that a run has written, such as "
                      f"runs/nano-001")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise Refusal(f"{file}: cannot be read ({error})") from None
    if not isinstance(config, LoraConfig):
        raise Refusal(f"{file}: a {config.peft_type} adapter; only LoRA is supported")
    return config


def inject(model: PhoGPT, config) -> Adapters:
    from peft import inject_adapter_in_model

    check_targets(model, config.target_modules)
    if config.bias != "none" and model.head.dtype != torch.float32:
        raise Refusal(f"adapter_config.json: bias {config.bias!r} trains biases, which are frozen "
                      f"here in {str(model.head.dtype).removeprefix('torch.')}; use an adapter "
                      f"with bias \"none\", or --dtype fp32")
    inject_adapter_in_model(config, model)
    model.train(model.training)  # the new layers too: theirs would drop out in an eval model
    fuse(model)
    return Adapters(model)


def fuse(model: PhoGPT) -> None:
    """Put `lora_forward` in front of PEFT's own forward in LoRA layers over a linear."""
    from bitsandbytes import nn as bnb
    from peft.tuners.lora import Linear, Linear4bit

    for layer in model.modules():
        if (type(layer) in (Linear, Linear4bit)
                and type(layer.base_layer) in (nn.Linear, bnb.Linear4bit)):
            layer.forward = MethodType(lora_forward, layer)


def lora_forward(layer, x, *args, **kwargs):
    """The forward of a LoRA layer: one fused function while it is plain LoRA, else PEFT's own."""
    name = plain_adapter(layer)
    if name is None or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, layer.base_layer, A, B, layer.scaling[name])


def plain_adapter(layer) -> str | None:
    """The name of the one adapter that `layer` applies, if it is LoRA and nothing more; else None.

    Asked at each call: PEFT can disable, merge, exchange and add adapters at any time.
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
        and not any(p.requires_grad for p in layer.base_layer.parameters())  # bias="all"
    )
    return name if plain else None


def check_targets(model: PhoGPT, targets) -> None:
    if isinstance(targets, str):  # a regular expression, or all-linear: PEFT checks those itself
        return
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not targets:
        raise Refusal(f"--targets: names no linear layer; the model has {', '.join(sorted(names))}")
    for target in sorted(targets):
        if target.rsplit(".", 1)[-1] not in names:
            raise Refusal(f"--targets: the model has no linear layer {target}; it has "
                          f"{', '.join(sorted(names))}")
