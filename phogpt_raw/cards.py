"""Find the GPU of a run, and choose the dtype of its computation.

`torch.cuda.is_bf16_supported()` returns True on a T4 and a V100, although these GPUs only emulate
bf16. So this module uses the compute capability: GPUs from 8.0 (Ampere) on have bf16 in hardware.
"""

from contextlib import suppress
from dataclasses import dataclass

import torch

from phogpt_raw.messages import _
from phogpt_raw.refusal import Refusal

GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Card:
    """A GPU, or the CPU. memory_gib is the memory that a process can use; it is 0 for the CPU."""

    name: str
    device: str
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0


# The GPUs that --card can name. This computer need not have these GPUs. The last value is the
# memory in GiB that a process can use. simulate/rates.py names the sources of these values.
KNOWN_CARDS = {
    "t4": Card("Tesla T4", "cuda", (7, 5), 14.56),
    "v100": Card("Tesla V100-SXM2-16GB", "cuda", (7, 0), 15.77),
    "l4": Card("NVIDIA L4", "cuda", (8, 9), 22.0),
    "a100": Card("NVIDIA A100-SXM4-40GB", "cuda", (8, 0), 39.4),
    "h200": Card("NVIDIA H200", "cuda", (9, 0), 139.8),
}


def known_card(name: str) -> Card:
    """Return the card with this short name. Raises Refusal for an unknown name."""
    if name.lower() not in KNOWN_CARDS:
        raise Refusal(f"--card {name}: choose from {', '.join(KNOWN_CARDS)}")
    return KNOWN_CARDS[name.lower()]


def this_card() -> Card:
    """Return the first visible GPU, or the CPU if there is no GPU.

    Raises Refusal if this build of torch does not run on the GPU.
    """
    if not torch.cuda.is_available():
        return Card("CPU", "cpu")
    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    built_for = torch.cuda.get_arch_list()
    if built_for and not any(runs_on(built, arch) for built in built_for):
        raise Refusal(
            f"{properties.name} is {arch}, but torch {torch.__version__} is built for "
            f"{' '.join(built_for)}; on a V100, install with -c constraints-v100.txt"
        )
    return Card(
        properties.name,
        "cuda",
        (properties.major, properties.minor),
        properties.total_memory / GIB,
    )


def runs_on(built: str, arch: str) -> bool:
    """Return whether code that was built for `built`, such as sm_70, runs on a GPU of `arch`.

    Code that was built for one version does not run on GPUs of a lower version. Machine code (sm)
    runs only on GPUs whose major version is that of the code. PTX (compute) runs on GPUs of every
    higher version, because the driver can compile PTX for a newer GPU.
    """
    kind, b = built.split("_")
    b, a = int(b.rstrip("af")), int(arch.split("_")[1])
    return b <= a and (kind == "compute" or b // 10 == a // 10)


def training_dtype(card: Card, asked: str = "auto",
                   by: str = "--dtype") -> tuple[torch.dtype, str]:
    """Choose the compute dtype on `card`. Returns the dtype, and the reason as a text for the user.

    `asked` is the requested dtype, or auto. `by` is the flag or the preset that requests it.
    Raises Refusal if the card cannot compute in the requested dtype.
    """
    bf16 = card.capability >= (8, 0)
    if asked != "auto":
        if asked == "bf16" and card.device == "cuda" and not bf16:
            raise Refusal(f"{by} asks for bf16, which {card.name} (compute capability "
                          f"{capability(card)}) only emulates; give --dtype auto")
        if asked == "fp16" and card.device == "cpu":
            raise Refusal(f"{by} asks for fp16, but this computer has no GPU, and its CPU computes "
                          f"in fp32 or bf16; give --dtype auto, or plan for another card with "
                          f"train.py --dry-run --card t4")
        return DTYPES[asked], _("set by {flag}", flag=by)
    if card.device == "cpu":
        return torch.float32, _("the fastest type on a CPU")
    if bf16:
        return torch.bfloat16, _("compute capability {version} has bf16 in hardware",
                                 version=capability(card))
    return torch.float16, _("compute capability {version} has no bf16 (bf16 needs 8.0)",
                            version=capability(card))


def recorded_dtype(card: Card, asked: str, recorded: str) -> torch.dtype:
    """Return the compute dtype for a trained adapter on `card`.

    `asked` is the dtype of the flag, and `recorded` is the dtype of the training run. The result is
    `asked` if it is not auto. Otherwise the result is `recorded` if the card can compute in this
    dtype. Otherwise the result is the card's default.
    """
    if asked == "auto" and recorded != "auto":
        with suppress(Refusal):
            return training_dtype(card, recorded)[0]
    return training_dtype(card, asked)[0]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype: fp32, fp16 or bf16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def capability(card: Card) -> str:
    """Return the compute capability as NVIDIA writes it, such as "7.5"."""
    return ".".join(map(str, card.capability))
