"""Random checkpoints in VinAI's format, of any size: shards, index, config.json as shipped.

    python tests/checkpoints.py 7b5 DIR      two bf16 .bin shards, 15 GB; never committed
    python tests/checkpoints.py 4b DIR
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from phogpt_raw.model.phogpt import PUBLISHED, ModelConfig, PhoGPT

NANO = Path(__file__).parents[1] / "phogpt_raw" / "nano" / "base"
SIZES = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
SHAPES = {
    **{name: {size: getattr(shape, size) for size in SIZES} for name, shape in PUBLISHED.items()},
    "tiny": dict(d_model=64, n_heads=8, n_layers=2, vocab_size=4096, max_seq_len=128),
}


def vinai_config(**shape) -> dict:
    """config.json with VinAI's fields and values; `shape` overrides (attn_config is merged)."""
    attention = dict(alibi=True, alibi_bias_max=8, attn_impl="torch", attn_pdrop=0.0,
                     attn_type="multihead_attention", attn_uses_sequence_id=False, clip_qkv=None,
                     prefix_lm=False, qk_ln=False, softmax_scale=None)
    return {
        "architectures": ["MPTForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig",
                     "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "emb_pdrop": 0.0, "embedding_fraction": 1.0, "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in", "init_gain": 0.0,
                        "init_nonlinearity": "relu", "init_div_is_residual": True,
                        "init_std": None, "emb_init_std": None, "emb_init_uniform_lim": None,
                        "verbose": 0},
        "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "model_type": "mpt",
        "no_bias": False, "norm_type": "low_precision_layernorm", "resid_pdrop": 0.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.30.2", "use_cache": False,
        "verbose": 0,
        **shape,
        "attn_config": {**attention, **shape.get("attn_config", {})},
    }


def random_tensors(config: dict, seed: int = 0, dtype=torch.bfloat16, device="cpu") -> dict:
    """Every tensor of the checkpoint: biases and norms are random too, so that a lost one shows."""
    with torch.device("meta"):
        model = PhoGPT(ModelConfig.from_json(config))
    dice = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=dice, device=device, dtype=torch.float32)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.02 if p.dim() == 2 else 0.1
        tensors[name] = (centre + scale * noise).to("cpu", dtype)
    return tensors


def write_checkpoint(folder: Path, config: dict | None = None, *, tensors: dict | None = None,
                     shards: int = 1, kind: str = "bin", dtype=torch.bfloat16,
                     device="cpu") -> dict:
    """Write config, tokenizer (nano's) and weights to `folder`; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or vinai_config(**SHAPES["tiny"])
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder / name)
    tensors = tensors or random_tensors(config, dtype=dtype, device=device)
    names, stem = list(tensors), {"bin": "pytorch_model", "safetensors": "model"}[kind]
    sizes = torch.tensor([t.numel() for t in tensors.values()]).cumsum(0)
    shard_of = ((sizes - 1) * shards // sizes[-1]).tolist()
    index = {}
    for shard in range(shards):
        file = f"{stem}.{kind}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{kind}"
        part = {n: tensors[n] for n, s in zip(names, shard_of, strict=True) if s == shard}
        index |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            from safetensors.torch import save_file

            save_file(part, folder / file)
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        (folder / f"{stem}.{kind}.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2))
    return tensors


if __name__ == "__main__":
    name, target = sys.argv[1:]
    fast = "cuda" if torch.cuda.is_available() else "cpu"
    write_checkpoint(Path(target), vinai_config(**SHAPES[name]), shards=2 if name == "7b5" else 1,
                     device=fast)
