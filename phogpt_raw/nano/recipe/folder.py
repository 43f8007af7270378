"""A base's folder as VinAI ships it: config.json, weights under llm-foundry's names, tokenizer."""

import argparse
import json
import shutil
from pathlib import Path

import torch

from phogpt_raw.model.phogpt import PhoGPT

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def vinai_config(args: argparse.Namespace, vocab_size: int, max_seq_len: int) -> dict:
    """config.json with VinAI's fields; learned_pos_emb too, which MPT ignores under ALiBi."""
    return {
        "architectures": ["MPTForCausalLM"],
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0.0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "auto_map": {
            "AutoConfig": "configuration_mpt.MPTConfig",
            "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
        },
        "d_model": args.d_model,
        "emb_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "expansion_ratio": args.expansion_ratio,
        "init_config": {
            "emb_init_std": None,
            "emb_init_uniform_lim": None,
            "fan_mode": "fan_in",
            "init_div_is_residual": True,
            "init_gain": 0.0,
            "init_nonlinearity": "relu",
            "init_std": None,
            "name": "kaiming_normal_",
            "verbose": 0,
        },
        "init_device": "cpu",
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": max_seq_len,
        "model_type": "mpt",
        "n_heads": args.heads,
        "n_layers": args.layers,
        "no_bias": False,
        "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.2",
        "use_cache": False,
        "verbose": 0,
        "vocab_size": vocab_size,
    }


def write_base(folder: Path, model: PhoGPT, config: dict, data: Path, report: dict) -> None:
    """The folder as VinAI ships it (weights in bf16, no lm_head), and pretraining.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.bfloat16().cpu().contiguous() for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(folder / "config.json", config)
    write_json(folder / "pretraining.json", report)
    for name in TOKENIZER_FILES:
        shutil.copyfile(data / name, folder / name)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
