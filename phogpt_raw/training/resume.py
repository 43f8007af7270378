"""Check whether a run can be started or resumed in a folder.

A resumed run must have the same settings and the same data rows as at its start. A new run must not
overwrite files of other programs. A run records its settings in config.json, and a hash of each row
in row_hashes.json. Data files may be renamed or moved, but the rows must stay the same.
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

# Settings that may change when a run is resumed. Settings that are not in FREE must not change.
FREE = {"preset", "data", "val", "map", "strict", "too_long", "data_cache", "inspect", "json",
        "hold_out", "out", "dry_run", "steps", "epochs", "eval_every", "eval_answers",
        "answer_tokens", "patience", "save_every", "keep", "max_minutes", "tensorboard",
        "max_skipped",
        "micro_batch", "packing", "pack_len", "recompute", "capture", "loss_mib", "nf4_cache"}
ANOTHER = "name another --out"
ROWS = "row_hashes.json"  # a hash of each data row, written at the start of the run


def record_run(folder: Path, config: Config, examples: Examples, *, base_weights: str | None,
               run: str) -> None:
    """Write the run's settings and row hashes. A resumed run is compared with them.

    base_weights: the result of base_hash. run: the result of `identity`.
    """
    configuration.save(config, folder / "config.json", base_weights=base_weights, run=run)
    write_text(folder / ROWS, json.dumps(row_hashes(examples), indent=0) + "\n")


def row_hashes(examples: Examples) -> dict[str, list[str]]:
    return {part: [fingerprint(example) for example in getattr(examples, part)]
            for part in ("train", "held_out")}


def identity(config: Config, examples: Examples, base_weights: str) -> str:
    """A hash of the base, the rows and the settings that must stay the same when a run is resumed.

    Each checkpoint records this hash. It shows whether a checkpoint was copied from another run.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items()
                if name not in FREE}
    text = json.dumps([settings, row_hashes(examples), base_weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recorded_identity(folder: Path) -> str:
    """The identity that the run in a folder has recorded. It is "" if there is no run, if its
    config.json is damaged, or if an older version wrote config.json without an identity."""
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
            raise Refusal(f"--out {folder}: contains a {name} that does not belong to a run and "
                          f"would be overwritten; name another --out")


def check_same(folder: Path, config: Config, examples: Examples) -> None:
    """Raise Refusal if the run in the folder was started with other settings or other rows."""
    file = folder / "config.json"
    if not file.is_file():
        raise Refusal(f"{file}: missing, so this run cannot be resumed; name another --out, and "
                      f"give the newest checkpoint of {folder} as --adapter")
    # config.json lacks a setting that is newer than the run. The run used the setting's default.
    before = dataclasses.asdict(Config()) | read_object(file, ANOTHER)
    now = dataclasses.asdict(config)
    different = [name for name in now.keys() - FREE
                 if whole_path(name, before[name]) != whole_path(name, now[name])]
    if different:
        name = most_likely_typed(different, before, now)
        raise Refusal(f"--out {folder}: this run started {as_typed(name, before[name])}, not "
                      f"{as_typed(name, now[name])}; keep the old setting, or name another --out")
    check_rows(folder, before, now, examples)


def most_likely_typed(different: list[str], before: dict, now: dict) -> str:
    """The one of the different settings that a message should name.

    A preset changes several settings. So the model comes first, and then a setting that now differs
    from its default. If there is neither, the preset is named, if it differs too.
    """
    changed = sorted(name for name in different if now[name] != getattr(Config(), name))
    if "model" in different:
        return "model"
    if not changed and before["preset"] != now["preset"]:
        return "preset"
    return (changed or sorted(different))[0]


def as_typed(name: str, value) -> str:
    """A setting as text for a message: the flag that a user types for it.

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
    """Raise Refusal if the base's weights or its config.json have changed since the run started."""
    began = read_object(folder / "config.json", ANOTHER).get("base_weights")
    if began and began != base_weights:
        raise Refusal(f"--out {folder}: the weights or the config.json of --model {config.model} "
                      f"have changed since this run started; use the unchanged base, or name "
                      f"another --out")


def whole_path(name: str, value):
    """The value of a setting for a comparison. The path of a folder becomes absolute."""
    if name in ("model", "adapter") and value and expanded(value).is_dir():
        return str(expanded(value).resolve())
    return value


def check_rows(folder: Path, before: dict, now: dict, examples: Examples) -> None:
    """Raise Refusal if the rows differ from the rows at the start of the run.

    before, now: the settings at the start and now. The message counts the changed rows and
    names the first new one. If --hold-out has changed, the message names this flag instead.
    """
    file = folder / ROWS
    if not file.is_file():  # an older version recorded no row hashes
        return
    began = read_object(file, ANOTHER)
    for part in ("train", "held_out"):
        if not (isinstance(began.get(part), list)
                and all(isinstance(row, str) for row in began[part])):
            raise Refusal(f"{file}: does not contain row hashes; {ANOTHER}")
    for part, name in (("train", "training"), ("held_out", "held-out")):
        change = changes(began[part], getattr(examples, part))
        if change and before["hold_out"] != now["hold_out"]:
            raise Refusal(f"--out {folder}: this run started {with_hold_out(before)}; "
                          f"{with_hold_out(now)} other rows are held out; keep the old setting, or "
                          f"name another --out")
        if change:
            raise Refusal(f"--out {folder}: its {name} rows have changed since it started: "
                          f"{change}; give the same rows, or name another --out")


def with_hold_out(settings: dict) -> str:
    share = settings["hold_out"]
    return "without --hold-out" if share is None else f"with --hold-out {share:g}"


def changes(began: list[str], examples: list[Example]) -> str:
    """The differences between `examples` and the row hashes `began` from the start of the run, as
    text; empty if there are none."""
    now = [fingerprint(example) for example in examples]
    if now == began:
        return ""
    before = Counter(began)
    added, removed = Counter(now) - before, before - Counter(now)
    if not added and not removed:
        return f"the same {len(now):,} rows in another order"
    parts = []
    new = Counter({row: count for row, count in added.items() if row not in before})
    if new:
        first = next(e for e, row in zip(examples, now, strict=True) if row in new)
        parts.append(f"{new.total():,} new or edited (the first: {first.where})")
    if copies := (added - new).total():
        parts.append(f"{copies:,} more copies of the same rows")
    if removed:
        parts.append(f"{removed.total():,} missing")
    return f"{', '.join(parts)} (rows at the start: {len(began):,}, now: {len(now):,})"
