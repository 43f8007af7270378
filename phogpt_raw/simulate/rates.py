"""Speeds and memory of the GPUs that can be simulated, each with its source.

A rate is a range if its sources differ, or if a part of it is assumed.
"""

from dataclasses import dataclass

from phogpt_raw.cards import GIB, KNOWN_CARDS, Card, known_card

MIB = 2**20


@dataclass(frozen=True)
class Rates:
    """The sustained rates of a card, each as (low, high).

    matmul: FLOP/s of 16-bit matrix products. attention: the attention kernel's rate as a fraction
    of the rate `matmul`. bandwidth: bytes read and written per second. launch: seconds between two
    kernels of a CUDA graph. host: seconds that Python needs to launch one kernel eagerly.
    """

    matmul: tuple[float, float]
    attention: tuple[float, float]
    bandwidth: tuple[float, float]
    launch: tuple[float, float]
    host: tuple[float, float]
    source: str


@dataclass(frozen=True)
class Known:
    """A GPU that can be simulated: `card` as a run would see it, and its rates."""

    card: Card
    rates: Rates


T = 1e12
# `host` on Colab. Colab's CPU cores are 2 to 4 times slower than the cores on which `host` was
# measured.
COLAB = (50e-6, 150e-6)
EFFICIENT = "attention 15 % of the matmul rate (measured on an H200 with this kernel) to 40 " \
            "(assumed)"
KNOWN = {
    "t4": Known(KNOWN_CARDS["t4"], Rates(
        (24 * T, 24 * T), (0.15, 0.4), (0.22 * T, 0.32 * T), (2e-6, 5e-6), COLAB,
        "24 TFLOP/s sustained of 65 under its 70 W cap (NVIDIA, forums.developer.nvidia.com/t/"
        f"264462); bandwidth 220 (arXiv 1903.07486) to 320 GB/s (data sheet); {EFFICIENT}; memory "
        "as Colab shows it")),
    "v100": Known(KNOWN_CARDS["v100"], Rates(
        (80 * T, 112 * T), (0.15, 0.4), (0.726 * T, 0.843 * T), (2e-6, 5e-6), COLAB,
        "matmul 80 TFLOP/s (assumed) to 112 (PCIe data sheet; SXM2 125); bandwidth 726 to 843 "
        f"GB/s measured by clpeak, of 900; {EFFICIENT}; memory 16 GB, reported")),
    "l4": Known(KNOWN_CARDS["l4"], Rates(
        (60 * T, 97 * T), (0.15, 0.4), (0.21 * T, 0.3 * T), (2e-6, 4e-6), (36e-6, 100e-6),
        "half to four fifths of 121 TFLOP/s, 70 to 100 % of 300 GB/s (data sheet; shares assumed); "
        f"{EFFICIENT}")),
    "a100": Known(KNOWN_CARDS["a100"], Rates(
        (190 * T, 250 * T), (0.15, 0.4), (1.1 * T, 1.4 * T), (2e-6, 3e-6), (36e-6, 100e-6),
        "60 to 80 % of 312 TFLOP/s, 70 to 90 % of 1,555 GB/s (data sheet; shares assumed); "
        f"{EFFICIENT}")),
    "h200": Known(KNOWN_CARDS["h200"], Rates(
        (645 * T, 675 * T), (0.4, 0.4), (3.6 * T, 3.6 * T), (2e-6, 2e-6), (36e-6, 36e-6),
        "matmul as measured, 645 TFLOP/s in fp16 to 675 in bf16; the others fitted to 24 measured "
        "steps (LOG.md)")),
}
CONTEXT = 0.81 * GIB  # bytes of CUDA's context with its kernels, on an H200; smaller GPUs need less


def known(name: str) -> Known:
    """A card and its rates by the card's short name. Raises Refusal for an unknown name."""
    known_card(name)
    return KNOWN[name.lower()]


def matmul_workspace(card: Card) -> int:
    """Bytes of the workspace that torch allocates for cuBLAS at the first matrix product and keeps.

    On Hopper the workspace has 32 MiB. On other cards it consists of two buffers of 4 MiB and eight
    buffers of 16 KiB. The source is CUDABlas.cpp of torch 2.10 to 2.13.
    """
    return 32 * MIB if card.capability[0] == 9 else 8320 * 1024
