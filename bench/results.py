"""Save and load results of the benches. Each run with --save writes a JSON file to bench/results.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from phogpt_raw.cards import Card, dtype_name
from phogpt_raw.config import Config

RESULTS = Path(__file__).parent / "results"


def load(what: str) -> list[dict]:
    """The saved results of a bench, oldest first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda f: (f.stem[-10:], f.name))
    found = [json.loads(file.read_text("utf-8")) for file in files]
    return [result for result in found if result["what"] == what]


def save(what: str, card: Card, options, dtype: torch.dtype, rows: list[dict],
         source: str = "measured", **more) -> Path:
    """Write bench/results/<what>-<card>-<model>-<dtype>-<date>.json; return its path.

    more: further fields of the result.
    """
    parts = [what, *([] if source == "measured" else [source]), card.name.replace(" ", "-"),
             Path(options.model).name, dtype_name(dtype)]
    if options.attention != "auto":
        parts.append(options.attention)
    if options.rank != Config.rank:
        parts.append(f"rank-{options.rank}")
    if options.label:
        parts.append(options.label)
    file = RESULTS / f"{'-'.join(parts)}-{date.today()}.json"
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=RESULTS.parent).stdout.strip()
    content = {
        "what": what, "source": source, "card": asdict(card),
        "versions": {name: version(name) for name in packages}, "commit": commit or None,
        "date": str(date.today()), "label": options.label, "command": "python bench/" + " ".join(
            [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": options.model, "dtype": dtype_name(dtype), "rank": options.rank,
        "optimizer": options.optimizer, **more,
        "rows": rows,
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
