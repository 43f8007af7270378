"""Damage a file of a base, an adapter or a run, then use the files; one mutation at a time.

    python tests/mutate.py base 0 100      mutations 0 to 99 of a base's files

The damaged files are used in a forked copy of one process that has imported all modules. The copy
may use 20 s of CPU time and 1 GiB of additional memory. It must end in one of two ways: with one
line of error and status 2, or with the result of the undamaged files. Another result is allowed in
two cases: the mutation gave a valid value, or it changed weights in a file without a checksum.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

SECONDS, BYTES = 20, 2**30
SET = [None, True, False, 0, 1, -1, 3, 2**31, 10**18, 0.5, -0.5, math.nan, math.inf, 1e300, "",
       "text", "../../../etc/passwd", "/etc/passwd", "é" * 500, [], {}, [1], [None], {"a": 1},
       ["text"], "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ raise_exception('no') }}",
       "(", "a{0,99999}{0,99999}"]
TEXTS = ["[" * 100_000, '{"a":' * 50_000, "1" * 5000, "null", "[]", "{}", '"text"', "", "\0" * 64,
         '{"a": 1e400}', "\ufeff{}", "true"]


KINDS = {".json": ["json", "json", "json", "bytes", "text"],
         ".safetensors": ["header", "header", "bytes", "bytes", "nan"],
         ".jsonl": ["bytes", "bytes", "lines"]}


def mutate(folder: Path, names: list[str], dice: random.Random) -> tuple[str, bool]:
    """Damage one file of a folder; return (a description, whether this may change the result)."""
    file = folder / dice.choice(names)
    kind = dice.choice(KINDS.get(file.suffix, ["bytes"]))
    what, other = {"json": change_json, "text": change_text, "bytes": change_bytes,
                   "header": change_header, "nan": put_nan, "lines": change_lines}[kind](file, dice)
    return f"{file.name}: {what}", other


def places(value, path=()) -> list[tuple]:
    """The paths of the values in nested dicts and lists.

    Of each list only the first three values are included.
    """
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for n in range(min(3, len(value))):
            found += places(value[n], (*path, n))
    return found


def changed(content, dice: random.Random) -> tuple[str, bool]:
    """Change or delete one value in place; return (a description, whether this may be valid)."""
    by_depth = [p for p in places(content) if len(p) <= 2] or [("a",)]
    path = dice.choice(by_depth)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]] if by_depth != [("a",)] else None
    if dice.random() < 0.2:
        del inner[path[-1]]
        return f"{path} deleted", True  # the field may have a default
    new = dice.choice(SET)
    inner[path[-1]] = new
    plain = isinstance(new, int | float) and math.isfinite(new) and new >= 0
    numbers = (isinstance(old, int | float) or old is None) and plain
    same = type(new) is type(old) or numbers or new is None
    return f"{path}: {str(old)[:40]!r} -> {str(new)[:40]!r}", same


def change_json(file: Path, dice: random.Random) -> tuple[str, bool]:
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict | list) or not content:
        return change_text(file, dice)
    what, other = changed(content, dice)
    file.unlink()  # if the file is a link, its target must not change
    file.write_text(json.dumps(content), "utf-8")
    return what, other


def change_text(file: Path, dice: random.Random) -> tuple[str, bool]:
    text = dice.choice(TEXTS)
    file.unlink()
    file.write_text(text, "utf-8")
    return f"is {text[:20]!r}", text in ("{}", "\ufeff{}")


def change_lines(file: Path, dice: random.Random) -> tuple[str, bool]:
    lines = file.read_text("utf-8").splitlines()
    lines[dice.randrange(len(lines))] = dice.choice(TEXTS)[:2000] or "x"
    file.write_text("\n".join(lines), "utf-8")
    return "one line changed", False


def change_bytes(file: Path, dice: random.Random) -> tuple[str, bool]:
    data = bytearray(file.read_bytes())
    how = dice.choice(["flip", "cut", "empty", "gone", "append", "zeros", "noise"])
    at = dice.randrange(len(data)) if data else 0
    if how == "flip" and data:
        data[at] ^= 1 << dice.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "append":
        data += dice.randbytes(dice.randrange(1, 200))
    elif how == "zeros":
        data[at:at + 64] = bytes(min(64, len(data) - at))
    elif how == "noise":
        data[at:at + 64] = dice.randbytes(min(64, len(data) - at))
    elif how == "empty":
        data.clear()
    file.unlink()
    if how != "gone":
        file.write_bytes(data)
    return f"{how} at {at}", True  # the byte may belong to a template's text or to a weight


def header_of(data: bytes) -> tuple[dict, bytes]:
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + length]), data[8 + length:]


def change_header(file: Path, dice: random.Random) -> tuple[str, bool]:
    header, rest = header_of(file.read_bytes())
    what, _ = changed(header, dice)
    text = json.dumps(header).encode()
    file.unlink()
    length = dice.choice([len(text)] * 5 + [0, 10**12, 2**63, len(text) - 1])
    file.write_bytes(struct.pack("<Q", length) + text + rest)
    return f"header {what}, length {length}", "__metadata__" in what


def put_nan(file: Path, dice: random.Random) -> tuple[str, bool]:
    header, _ = header_of(file.read_bytes())
    header.pop("__metadata__", None)
    name = dice.choice(sorted(header))
    entry, data = header[name], bytearray(file.read_bytes())
    width = {"F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
    start = len(data) - max(e["data_offsets"][1] for e in header.values())
    begin, end = entry["data_offsets"]
    at = start + begin + width * dice.randrange((end - begin) // width)
    data[at:at + width] = b"\xff" * width  # NaN in each of these dtypes
    file.unlink()
    file.write_bytes(data)
    return f"NaN in {name}", False


# -- programs that use the files


class Base:
    """Ask a base one question."""

    def __init__(self, place: Path):
        import checkpoints

        self.whole = place / "base"
        checkpoints.write_checkpoint(self.whole, kind="safetensors", shards=2)
        self.names = sorted(f.name for f in self.whole.iterdir() if f.is_file())

    def use(self, folder: Path) -> None:
        import generate

        generate.main(["--model", str(folder), "--max-new-tokens", "6", "--dtype", "fp32", "Phở?"])


class Adapter(Base):
    """Ask a base with an adapter one question."""

    def __init__(self, place: Path):
        from phogpt_raw.model.adapters import new_adapters
        from phogpt_raw.model.weights import load_base

        super().__init__(place)
        base, self.whole = self.whole, place / "adapter"
        model, _ = load_base(str(base), nf4=False, device="cpu")
        adapters = new_adapters(model, rank=2, alpha=4, base=str(base))
        adapters.flat.data.normal_(std=0.1)
        adapters.save(self.whole)
        self.names = ["adapter_config.json", "adapter_model.safetensors"]

    def use(self, folder: Path) -> None:
        import generate

        generate.main(["--adapter", str(folder), "--max-new-tokens", "6", "--dtype", "fp32",
                       "Phở?"])


class Run:
    """Resume a run from its newest undamaged checkpoint.

    train.py checks each file by a checksum or a comparison, so the result must not change.
    """

    def __init__(self, place: Path):
        import checkpoints
        from conftest import SMALL, breaking_off, command_line, write_rows

        import train

        base = place / "base"
        checkpoints.write_checkpoint(base)
        self.whole = place / "run"
        self.settings = {**SMALL, "--model": base, "--data": write_rows(place / "rows.jsonl"),
                         "--save-every": 2, "--steps": 6, "--eval-every": 0, "--eval-answers": 0}
        self.command_line = command_line
        real = train.lr_at
        train.lr_at = breaking_off(real, 5, KeyboardInterrupt())
        assert ran(lambda: self.use(self.whole), place / "said")[0] == 130
        train.lr_at = real
        self.names = [*(str(f.relative_to(self.whole)) for f in self.whole.rglob("*") if f.is_file()
                        and ("checkpoint-4" in str(f) or f.name in (
                            "config.json", "row_hashes.json", "metrics.jsonl")))]

    def use(self, folder: Path) -> None:
        import train

        train.main(self.command_line(self.settings, ["--out", folder]))
        print((folder / "adapter_model.safetensors").read_bytes().hex())


USES = {"base": Base, "adapter": Adapter, "run": Run}


def ran(use, said: Path) -> tuple[int, str]:
    """Run `use` in a forked process; return (exit status, output).

    The status is -N if signal N killed the process.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            use()
            status = 0
        except SystemExit as left:
            status = left.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text("utf-8", errors="replace")


def faults(what: str, numbers: range, place: Path) -> list[str]:
    """Test the mutations with these numbers; return one line of text for each failure."""
    import bitsandbytes  # noqa: F401  imported once, before the process is forked
    import peft  # noqa: F401
    import torch

    import generate  # noqa: F401
    import train  # noqa: F401
    from phogpt_raw.show import plots

    # drawing is slow, and it reads only metrics.jsonl
    plots.pictures = lambda *_: (b"<svg/>", b"PNG")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    use = USES[what](place)
    good = result(ran_on(use, place, None)[2])
    found = []
    for number in numbers:
        done, other, (status, said) = ran_on(use, place, random.Random(f"{what} {number}"))
        lines = said.strip().splitlines()
        refused = status == 2 and lines and lines[-1].startswith("error: ") and (
            "Traceback" not in said)
        equal = status == 0 and result((status, said)) == good
        if not (refused or equal or (status == 0 and other and what != "run")):
            last = lines[-1][:300] if lines else ""
            found.append(f"{what} {number}: {done}: status {status}: {last}")
    return found


def result(ended: tuple[int, str]) -> str:
    """The last line of the output: an answer, or the bytes of an adapter."""
    return ended[1].strip().splitlines()[-1] if ended[1].strip() else ""


def ran_on(use, place: Path, dice: random.Random | None):
    folder = place / "mutated" / "run"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(use.whole, folder)
    done, other = mutate(folder, use.names, dice) if dice else ("nothing", False)
    return done, other, ran(lambda: use.use(folder), place / "said")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    with tempfile.TemporaryDirectory() as scratch:
        wrong = faults(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), Path(scratch))
    print("\n".join(wrong))
    sys.exit(bool(wrong))
