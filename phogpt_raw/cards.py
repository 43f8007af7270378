"""What a GPU is to a training run: above all, which dtype it computes in, and why.

The surprise: `torch.cuda.is_bf16_supported()` says yes on a T4 and a V100, because it counts
emulation. Only the compute capability tells: bf16 has hardware from 8.0 (Ampere) on.
"""

from dataclasses import dataclass

import torch

from phogpt_raw.refusal import Refusal

MIB, GIB = 2**20, 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Card:
    """A device as the run sees it; memory_gib is what a process can use, 0 for the CPU."""

    name: str
    device: str
    capability: tuple[int, int] = (0, 0)
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a card sustains, (low, high) where sources differ or there is none.

    matmul: FLOP/s of 16-bit matrix products; attention: its kernel's, as a share of these;
    bandwidth: bytes/s, read and written; launch: seconds from one kernel of a CUDA graph to the
    next; host: seconds that Python takes to name one eagerly.
    """

    matmul: tuple[float, float]
    attention: tuple[float, float]
    bandwidth: tuple[float, float]
    launch: tuple[float, float]
    host: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Known:
    """A card that need not be here: `card` as a run would see it, `rates` for the simulation."""

    card: Card
    rates: Rates


T = 1e12
COLAB = (50e-6, 150e-6)  # its cores are two to four times slower than those the 36 us are from
EFFICIENT = "attention 15 % of the matmul rate (measured on an H200 with this kernel) to 40 " \
            "(assumed)"
KNOWN = {
    "t4": Known(Card("Tesla T4", "cuda", (7, 5), 14.56), Rates(
        (24 * T, 24 * T), (0.15, 0.4), (0.22 * T, 0.32 * T), (2e-6, 5e-6), COLAB,
        "24 TFLOP/s sustained of 65 under its 70 W cap (NVIDIA, forums.developer.nvidia.com/t/"
        f"264462); bandwidth 220 (arXiv 1903.07486) to 320 GB/s (data sheet); {EFFICIENT}; memory "
        "as Colab shows it")),
    "v100": Known(Card("Tesla V100-SXM2-16GB", "cuda", (7, 0), 15.77), Rates(
        (80 * T, 112 * T), (0.15, 0.4), (0.726 * T, 0.843 * T), (2e-6, 5e-6), COLAB,
        "matmul 80 TFLOP/s (assumed) to 112 (PCIe data sheet; SXM2 125); bandwidth 726 to 843 "
        f"GB/s measured by clpeak, of 900; {EFFICIENT}; memory 16 GB, reported")),
    "l4": Known(Card("NVIDIA L4", "cuda", (8, 9), 22.0), Rates(
        (60 * T, 97 * T), (0.15, 0.4), (0.21 * T, 0.3 * T), (2e-6, 4e-6), (36e-6, 100e-6),
        "half to four fifths of 121 TFLOP/s, 70 to 100 % of 300 GB/s (data sheet; shares assumed); "
        f"{EFFICIENT}")),
    "a100": Known(Card("NVIDIA A100-SXM4-40GB", "cuda", (8, 0), 39.4), Rates(
        (190 * T, 250 * T), (0.15, 0.4), (1.1 * T, 1.4 * T), (2e-6, 3e-6), (36e-6, 100e-6),
        "60 to 80 % of 312 TFLOP/s, 70 to 90 % of 1,555 GB/s (data sheet; shares assumed); "
        f"{EFFICIENT}")),
    "h200": Known(Card("NVIDIA H200", "cuda", (9, 0), 139.8), Rates(
        (645 * T, 675 * T), (0.4, 0.4), (3.6 * T, 3.6 * T), (2e-6, 2e-6), (36e-6, 36e-6),
        "matmul as measured, 645 TFLOP/s in fp16 to 675 in bf16; the others fitted to 24 measured "
        "steps (LOG.md)")),
}
CONTEXT = 0.81 * GIB  # of CUDA, kernels loaded; an H200's. Smaller on cards of fewer processors


def known_card(name: str) -> Known:
    """A card by its short name; Refusal for one that is not in the list."""
    if name.lower() not in KNOWN:
        raise Refusal(f"--card {name}: choose from {', '.join(KNOWN)}")
    return KNOWN[name.lower()]


def matmul_workspace(card: Card) -> int:
    """Bytes that torch takes for cuBLAS at its first product and keeps (CUDABlas.cpp, torch 2.10 to
    2.13: 32 MiB on Hopper, else two buffers of 4 MiB and eight of 16 KiB)."""
    return 32 * MIB if card.capability[0] == 9 else 8320 * 1024


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
        properties.total_memory / 2**30,
    )


def runs_on(built: str, arch: str) -> bool:
    """Machine code runs on its own major generation, from its minor version on; PTX also later."""
    kind, b = built.split("_")
    b, a = int(b.rstrip("af")), int(arch.split("_")[1])
    return b <= a and (kind == "compute" or b // 10 == a // 10)


def training_dtype(card: Card, asked: str = "auto") -> tuple[torch.dtype, str]:
    """The compute dtype on `card`, with the reason that the start card prints."""
    bf16 = card.capability >= (8, 0)
    if asked != "auto":
        if asked == "bf16" and card.device == "cuda" and not bf16:
            raise Refusal(
                f"--dtype bf16: {card.name} (compute capability {capability(card)}) only emulates "
                f"bf16; use --dtype fp16 or leave the flag out"
            )
        if asked == "fp16" and card.device == "cpu":
            raise Refusal("--dtype fp16: the CPU computes in fp32 or bf16; leave the flag out, "
                          "or say --dtype auto where a preset asks for it")
        return DTYPES[asked], "asked for by --dtype"
    if card.device == "cpu":
        return torch.float32, "the CPU has no faster one"
    if bf16:
        return torch.bfloat16, f"compute capability {capability(card)} has bf16 in hardware"
    return torch.float16, f"compute capability {capability(card)} has no bf16 (8.0 and up do)"


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def capability(card: Card) -> str:
    """7.5, as NVIDIA writes it."""
    return ".".join(map(str, card.capability))
