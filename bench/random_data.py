"""For benches and tests: random weights and random rows in the shape of a PhoGPT."""

from collections.abc import Iterator

import torch

from phogpt_raw.data.batches import Window
from phogpt_raw.data.packing import Packing
from phogpt_raw.data.prompt import Example, next_tokens
from phogpt_raw.model.checkpoint_format import parameter_shapes
from phogpt_raw.model.phogpt import ModelConfig, PhoGPT
from phogpt_raw.model.weights import frozen, place


def random_tensors(
    shape: ModelConfig,
    *,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    zero_biases: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every parameter of the shape. A tensor is created when requested.

    Matrices have normally distributed values with standard deviation 0.02. Biases and norms are
    random too, so that a test notices if a bias or a norm is lost. Their standard deviation is 0.1,
    and norm weights have mean 1. zero_biases=True gives biases of 0 and norm weights of 1, as in an
    untrained model.

    The values depend on `seed` and on the kind of device. They are drawn in fp32, so the embedding,
    which is the largest tensor, temporarily needs 4 bytes per element (4.1 GB for 7B5).
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, size in parameter_shapes(shape).items():
        if zero_biases and len(size) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(size, value, dtype=dtype, device=device)
        else:
            yield name, random_tensor(name, size, generator).to(dtype)


def random_tensor(name: str, size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A tensor of normally distributed values, in fp32 on the generator's device."""
    mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    deviation = 0.02 if len(size) == 2 else 0.1
    noise = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
    return noise.mul_(deviation).add_(mean)


def random_base(shape: ModelConfig, dtype: torch.dtype, device: str) -> PhoGPT:
    """A frozen PhoGPT with random NF4 weights. It is as large and as fast as a trained model."""
    with torch.device("meta"):
        phogpt = PhoGPT(shape)
    for name, tensor in random_tensors(shape, seed=0, device=device):
        place(phogpt, name, tensor, nf4=True, dtype=dtype, device=torch.device(device))
    return frozen(phogpt, nf4=True, device=device)


def random_rows(vocabulary: int, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Rows of random token ids, without the ids of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (rows, length), generator=generator).tolist()


def window_of(rows: list[list[int]], documents: int = 1) -> Window:
    """Make an accumulation window, which holds the examples of one step, from rows of token ids.

    Each row is cut into `documents` examples of equal length. The rest of the row is padding. All
    tokens of an example except its first carry loss.
    """
    length = len(rows[0]) // documents
    pieces = [ids[n * length : (n + 1) * length] for ids in rows for n in range(documents)]
    packing = Packing((len(rows[0]),), longest=length, most=documents) if documents > 1 else None
    return Window([Example(ids, next_tokens(ids, start=1)) for ids in pieces], 3, packing)
