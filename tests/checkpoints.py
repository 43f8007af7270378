"""Write random checkpoints of any size in VinAI's format: shards, their index and config.json.

    python tests/checkpoints.py 7b5 DIR      two bf16 .bin shards, 15 GB; do not commit them
    python tests/checkpoints.py 4b DIR
"""

import sys
from pathlib import Path

import torch

from bench import random_data
from phogpt_raw.model import checkpoint_format
from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig

NANO = Path(__file__).parents[1] / "phogpt_raw" / "nano" / "base"
SIZES = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
SHAPES = {
    **{name: {size: getattr(shape, size) for size in SIZES} for name, shape in PUBLISHED.items()},
    "tiny": dict(d_model=64, n_heads=8, n_layers=2, vocab_size=4096, max_seq_len=128),
}


def vinai_config(**fields) -> dict:
    """VinAI's config.json as a dict.

    `fields` must give every field in SIZES. `fields` may also override further fields.
    """
    shape = ModelConfig(**{size: fields.pop(size) for size in SIZES})
    return checkpoint_format.vinai_config(shape, **fields)


def random_tensors(config: dict, seed: int = 0, dtype=torch.bfloat16, device="cpu") -> dict:
    """Every tensor of a checkpoint.

    Biases and the weights of norms are random too, so that a test notices a missing bias or norm.
    """
    shape = ModelConfig.from_json(config)
    pairs = random_data.random_tensors(shape, seed=seed, device=device, dtype=dtype)
    return {name: tensor.cpu() for name, tensor in pairs}


def write_checkpoint(folder: Path, config: dict | None = None, *, tensors: dict | None = None,
                     shards: int = 1, kind: str = "bin", dtype=torch.bfloat16,
                     device="cpu") -> dict:
    """Write the config, nano's tokenizer and the weights to `folder`; return the tensors."""
    config = config or vinai_config(**SHAPES["tiny"])
    tensors = tensors or random_tensors(config, dtype=dtype, device=device)
    checkpoint_format.write_checkpoint(folder, config, tensors, shards=shards, kind=kind,
                                       tokenizer=NANO)
    return tensors


def main(name: str, folder: str) -> None:
    """Write a checkpoint of a published shape; only one shard is in memory at a time."""
    config = vinai_config(**SHAPES[name])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = random_data.random_tensors(ModelConfig.from_json(config), seed=0, device=device)
    checkpoint_format.write_checkpoint(Path(folder), config, tensors, tokenizer=NANO,
                                       shards=2 if name == "7b5" else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
