"""The GPU of a run: its memory, its compute capability, and the dtype in which it computes, with
the reason.

`torch.cuda.is_bf16_supported()` says yes on a T4 and a V100, because it counts emulation. The
compute capability decides instead: bf16 has hardware from 8.0 (Ampere) on.
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
    """A device as the run sees it; memory_gib is what a process can use, 0 for the CPU."""

    name: str
    device: str
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0


# The cards that --card can name, as a run would see them. They need not be in this computer. The
# memory is what a process can use; the sources are in simulate/rates.py.
KNOWN_CARDS = {
    "t4": Card("Tesla T4", "cuda", (7, 5), 14.56),
    "v100": Card("Tesla V100-SXM2-16GB", "cuda", (7, 0), 15.77),
    "l4": Card("NVIDIA L4", "cuda", (8, 9), 22.0),
    "a100": Card("NVIDIA A100-SXM4-40GB", "cuda", (8, 0), 39.4),
    "h200": Card("NVIDIA H200", "cuda", (9, 0), 139.8),
}


def known_card(name: str) -> Card:
    """A card by its short name; Refusal for one that is not in the list."""
    if name.lower() not in KNOWN_CARDS:
        raise Refusal(f"--card {name}: choose from {', '.join(KNOWN_CARDS)}")
    return KNOWN_CARDS[name.lower()]


def this_card() -> Card:
    """The first visible GPU, or the CPU."""
    if not torch.cuda.is_available():
        return Card("CPU", "cpu")
    properties = torch.cuda.get_device_properties(0)
    arch = f"sm_{properties.major}{properties.minor}"
    built_for = torch.cuda.get_arch_list()
    if built_for and not any(runs_on(built, arch) for built in built_for):
        raise Refusal(
            f"{properties.name} is {arch}, this torch {torch.__version__} is built for "
            f"{' '.join(built_for)}; for a V100 install with -c constraints-v100.txt"
        )
    return Card(
        properties.name,
        "cuda",
        (properties.major, properties.minor),
        properties.total_memory / GIB,
    )


def runs_on(built: str, arch: str) -> bool:
    """Machine code runs on its own major generation, from its minor version on; PTX also later."""
    kind, b = built.split("_")
    b, a = int(b.rstrip("af")), int(arch.split("_")[1])
    return b <= a and (kind == "compute" or b // 10 == a // 10)


def training_dtype(card: Card, asked: str = "auto",
                   by: str = "--dtype") -> tuple[torch.dtype, str]:
    """The compute dtype on `card`, and the reason for it, which is shown. `by`: what asks for it,
    the flag --dtype or a preset."""
    bf16 = card.capability >= (8, 0)
    if asked != "auto":
        if asked == "bf16" and card.device == "cuda" and not bf16:
            raise Refusal(f"{by} asks for bf16, which {card.name} (compute capability "
                          f"{capability(card)}) only emulates; give --dtype auto")
        if asked == "fp16" and card.device == "cpu":
            raise Refusal(f"{by} asks for fp16, and there is no GPU here: the CPU computes in fp32 "
                          f"or bf16; give --dtype auto, or plan for a card that is not here with "
                          f"train.py --dry-run --card t4, or v100")
        return DTYPES[asked], _("asked for by {flag}", flag=by)
    if card.device == "cpu":
        return torch.float32, _("the fastest type on a CPU")
    if bf16:
        return torch.bfloat16, _("compute capability {version} has bf16 in hardware",
                                 version=capability(card))
    return torch.float16, _("compute capability {version} has no bf16 (8.0 and up do)",
                            version=capability(card))


def recorded_dtype(card: Card, asked: str, recorded: str) -> torch.dtype:
    """The dtype that a flag names. Without a flag, the dtype that the run recorded; if this card
    does not compute in it, the card's own."""
    if asked == "auto" and recorded != "auto":
        with suppress(Refusal):
            return training_dtype(card, recorded)[0]
    return training_dtype(card, asked)[0]


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def capability(card: Card) -> str:
    """7.5, as NVIDIA writes it."""
    return ".".join(map(str, card.capability))
