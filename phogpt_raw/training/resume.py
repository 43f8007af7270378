"""Check that a run may be resumed in a folder: same settings, same rows, no files of other
programs.

A run records its settings in config.json and a hash of each of its rows in row_hashes.json. The
files of the rows may be renamed or moved; the rows themselves must stay the same.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

from phogpt_raw import config as configuration
from phogpt_raw.config import Config
from phogpt_raw.data.examples import Examples, fingerprint
from phogpt_raw.data.prompt import Example
from phogpt_raw.files import LOCK, SIGN, expanded, read_object, write_text
from phogpt_raw.model.adapter_config import run_record
from phogpt_raw.refusal import Refusal

# Settings that may differ when a run is resumed. Any other change would make it another run.
FREE = {"preset", "data", "val", "map", "strict", "too_long", "data_cache", "inspect", "json",
        "hold_out", "out", "dry_run", "steps", "epochs", "eval_every", "eval_answers",
        "answer_tokens", "patience", "save_every", "keep", "max_minutes", "tensorboard",
        "max_skipped",
        "micro_batch", "packing", "pack_len", "recompute", "capture", "loss_mib", "nf4_cache"}
ANOTHER = "name another --out"
ROWS = "row_hashes.json"  # of the rows with which the run began


def record_run(folder: Path, config: Config, examples: Examples, *, base_weights: str | None,
               run: str) -> None:
    """Write the settings and row hashes with which a later start is compared. base_weights: of
    base_hash; run: of identity."""
    configuration.save(config, folder / "config.json", base_weights=base_weights, run=run)
    write_text(folder / ROWS, json.dumps(row_hashes(examples), indent=0) + "\n")


def row_hashes(examples: Examples) -> dict[str, list[str]]:
    return {part: [fingerprint(example) for example in getattr(examples, part)]
            for part in ("train", "held_out")}


def identity(config: Config, examples: Examples, base_weights: str) -> str:
    """A hash of what must stay the same when a run is resumed: settings, rows and base. Each
    checkpoint records it. So a checkpoint that was copied from another run is noticed."""
    settings = {name: value for name, value in dataclasses.asdict(config).items()
                if name not in FREE}
    text = json.dumps([settings, row_hashes(examples), base_weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recorded_identity(folder: Path) -> str:
    """The identity of the run in a folder; "" if there is no run, or its config.json is damaged or
    older than identities."""
    with suppress(Refusal):
        return str((run_record(folder / "config.json") or {}).get("run", ""))
    return ""


def check_place(folder: Path) -> None:
    """Raise Refusal if a new run would overwrite files that do not belong to a run."""
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"--out {folder}: is a file; name a folder")
    with suppress(Refusal):
        if run_record(folder / "config.json"):  # the run was killed before its first checkpoint
            return
    lock = folder / LOCK
    foreign = lock.is_file() and lock.read_bytes() not in (b"", SIGN)
    for name in ("config.json", ROWS, "metrics.jsonl", "adapter_config.json", "loss.svg",
                 "loss.png", *([LOCK] if foreign else [])):
        if os.path.lexists(folder / name):
            raise Refusal(f"--out {folder}: holds a {name} that is not a run's, and the run would "
                          f"write over it; name another --out")


def check_same(folder: Path, config: Config, examples: Examples) -> None:
    """Raise Refusal where the folder's run has other settings or other rows."""
    file = folder / "config.json"
    if not file.is_file():
        raise Refusal(f"{file}: missing, so this run cannot go on; name another --out, and the "
                      f"newest checkpoint of {folder} with --adapter")
    # A run that is older than a setting has this setting's default.
    before = dataclasses.asdict(Config()) | read_object(file, ANOTHER)
    now = dataclasses.asdict(config)
    for name in sorted(now.keys() - FREE):
        if whole_path(name, before[name]) != whole_path(name, now[name]):
            raise Refusal(
                f"--out {folder}: this run began {as_typed(name, before[name])}, not "
                f"{as_typed(name, now[name])}; go on with the same, or name another --out"
            )
    check_rows(folder, before, now, examples)


def as_typed(name: str, value) -> str:
    """A setting as the flag that is typed for it.

    >>> as_typed("seed", 5), as_typed("nf4", False), as_typed("val", None)
    ('with --seed 5', 'with --no-nf4', 'without --val')
    """
    flag = f"--{configuration.flag(name)}"
    if getattr(Config(), name) is True:
        flag, value = f"--no-{configuration.flag(name)}", not value
    if value is None or value is False:
        return f"without {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"


def check_base(folder: Path, config: Config, base_weights: str) -> None:
    """Raise Refusal where the base holds other weights or another config.json than when the run
    began."""
    began = read_object(folder / "config.json", ANOTHER).get("base_weights")
    if began and began != base_weights:
        raise Refusal(f"--out {folder}: the weights or the config.json of --model {config.model} "
                      f"have changed since this run began; go on over the same, or name another "
                      f"--out")


def whole_path(name: str, value):
    """A setting in the form that is compared: for a folder its absolute path."""
    if name in ("model", "adapter") and value and expanded(value).is_dir():
        return str(expanded(value).resolve())
    return value


def check_rows(folder: Path, before: dict, now: dict, examples: Examples) -> None:
    """Raise Refusal where the rows are not those with which the run began, and say which; where
    another flag divides them (before and now: the settings), name the flag."""
    file = folder / ROWS
    if not file.is_file():  # a run from before row hashes were recorded
        return
    began = read_object(file, ANOTHER)
    for part in ("train", "held_out"):
        if not (isinstance(began.get(part), list)
                and all(isinstance(row, str) for row in began[part])):
            raise Refusal(f"{file}: does not hold the hashes of rows; {ANOTHER}")
    for part, name in (("train", "training"), ("held_out", "held-out")):
        change = changes(began[part], getattr(examples, part))
        if change and before["hold_out"] != now["hold_out"]:
            raise Refusal(f"--out {folder}: this run began {with_hold_out(before)}; "
                          f"{with_hold_out(now)} other rows are held out; go on as it began, or "
                          f"name another --out")
        if change:
            raise Refusal(f"--out {folder}: its {name} rows have changed since it began: {change}; "
                          f"go on with the same rows, or name another --out")


def with_hold_out(settings: dict) -> str:
    share = settings["hold_out"]
    return "without --hold-out" if share is None else f"with --hold-out {share:g}"


def changes(began: list[str], examples: list[Example]) -> str:
    """The differences from the row hashes with which a run began; empty if there are none."""
    now = [fingerprint(example) for example in examples]
    if now == began:
        return ""
    added, removed = Counter(now) - Counter(began), Counter(began) - Counter(now)
    if not added and not removed:
        return f"the same {len(now):,} rows in another order"
    parts = []
    if added:
        first = next(e for e, known in zip(examples, now, strict=True) if known in added)
        parts.append(f"{added.total():,} new or edited (the first: {first.where})")
    if removed:
        parts.append(f"{removed.total():,} gone")
    return f"{', '.join(parts)} (rows then: {len(began):,}, now: {len(now):,})"
