"""The training and the held-out examples of a run, from its files or from nano's bundled pairs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from phogpt_raw.config import Config
from phogpt_raw.data.prompt import TEMPLATES, Example, choose_template, encode_row
from phogpt_raw.data.rows import read_rows
from phogpt_raw.refusal import Refusal

PAIRS = Path(__file__).parents[1] / "nano" / "pairs"


@dataclass(frozen=True)
class DataFile:
    """A file that was read: its name without the path, and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Examples:
    """Encoded rows, the held-out ones' questions as typed, the template, why, and the files: `file`
    of the training rows, `held_out_file` where the held-out ones come from another."""

    train: list[Example]
    held_out: list[Example]
    questions: list[str]
    template: str
    template_reason: str
    source: str
    file: DataFile | None = None
    held_out_file: DataFile | None = None


def load_examples(tokenizer, config: Config) -> Examples:
    """Read, encode and divide; Refusal where there is no data or nothing is left to train on."""
    data, val = config.data, config.val
    if data is None and config.model == "nano":
        data = str(PAIRS / "train.jsonl")
        val = val or (None if config.hold_out else str(PAIRS / "heldout.jsonl"))
    if data is None:
        raise Refusal("--data: name a file of rows, such as --data rows.jsonl with lines "
                      '{"prompt": "…", "response": "…"}')
    name, reason = choose_template(tokenizer, config.template)
    rows, held_out = read_rows(data), read_rows(val) if val else []
    if config.hold_out:
        if config.hold_out >= len(rows):
            raise Refusal(f"--hold-out {config.hold_out}: {data} has only {len(rows)} rows")
        dice = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(rows), generator=dice).tolist()
        held_out = [rows[i] for i in order[: config.hold_out]]
        rows = [rows[i] for i in sorted(order[config.hold_out :])]
    train, kept_out = (
        [encode_row(tokenizer, TEMPLATES[name], row, config.max_len) for row in part]
        for part in (rows, held_out)
    )
    return Examples(train, kept_out, [row.prompt for row in held_out], name, reason,
                    Path(data).name, identify(data), identify(val) if val else None)


def identify(path: str) -> DataFile:
    file = Path(path).expanduser()
    with file.open("rb") as content:
        return DataFile(file.name, hashlib.file_digest(content, "sha256").hexdigest())
