"""The command line of a run, built from Config's fields.

A flag overrides the preset, and the preset overrides the default. Each field of Config is a flag,
written with - or _ (`--micro-batch`, `--micro_batch`). The field's trailing comment is its help.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
import tomllib
import types
import typing
from itertools import pairwise
from pathlib import Path

from phogpt_raw.cards import known_card, this_card
from phogpt_raw.config import Config, flag
from phogpt_raw.files import expanded
from phogpt_raw.refusal import Refusal

PRESETS = Path(__file__).parent / "presets"
# A command line may have only one flag of each pair. If the command line has one flag of a pair,
# the preset's value for the second flag of this pair is not used.
EITHER = (("steps", "epochs"), ("batch_size", "batch_tokens"), ("val", "hold_out"))
ADAPTERS_OWN = ("rank", "alpha", "dropout", "targets")  # fields whose values come from --adapter
SEVERAL = tuple[str, ...]  # the type of a field whose flag may be given several times
CARDS = {"T4": "t4", "V100": "v100"}  # {part of a GPU's name: the name of its preset}


def comments() -> dict[str, str]:
    """{field name: its trailing comment, which is the help text}."""
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE)
    return dict(lines)


def field_type(field: dataclasses.Field) -> type:
    """The type of a field without None: int for both `int` and `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not type(None))
    return field.type


class Help(argparse.HelpFormatter):
    """A formatter that wraps the paragraphs of a description. It does not change indented lines,
    which are commands."""

    def _fill_text(self, text, width, indent):
        parts = [part if part.startswith(" ") else "\n".join(self._split_lines(part, width))
                 for part in text.strip("\n").split("\n\n")]
        return "\n\n".join(parts)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reads flags written with - or _. It reports an error in one line and
    suggests the most similar flag."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": Help,
                            "usage": "%(prog)s [options]", **settings})

    def parse_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        flags = args.index("--") if "--" in args else len(args)
        args[:flags] = map(with_hyphens, args[:flags])
        self.refuse_empty(args[:flags])
        return super().parse_args(args, namespace)

    def refuse_empty(self, args: list[str]) -> None:
        """Raise Refusal for a flag with an empty value, for example `--out "$NAME"` if NAME is not
        set."""
        for action in self._actions:
            for name in action.option_strings:
                empty = f"{name}=" in args or (
                    action.nargs != 0 and any(pair == (name, "") for pair in pairwise(args)))
                if empty and action.default != "":
                    raise Refusal(f"{name}: is empty; give a value, or leave it out")

    def error(self, message):
        unknown = message.partition("unrecognized arguments: ")[2].partition("=")[0].split()
        meant = self.nearest(unknown[0]) if unknown else None
        if meant:
            raise Refusal(f"{unknown[0]}: no such flag; did you mean {meant}?")
        if unknown and not unknown[0].startswith("-"):
            advice = "write each value after its flag, and several words in quotes; see --help"
        else:
            advice = "see --help"
        raise Refusal(f"{message}; {advice}")

    def nearest(self, unknown: str) -> str | None:
        """The listed flag with the spelling most similar to `unknown`; None if none is similar."""
        shown = [name for action in self._actions if action.help is not argparse.SUPPRESS
                 for name in action.option_strings if name.startswith("--")]
        longer = [name for name in shown if name.startswith(unknown) and unknown.startswith("--")]
        found = longer or difflib.get_close_matches(unknown, shown, 1, 0.7)
        return found[0] if found else None


def with_hyphens(argument: str) -> str:
    """The argument with - instead of _ in the name of a flag. The value of a flag does not change.
    An argument that is not a flag does not change.

    >>> with_hyphens("--hold_out=a_b"), with_hyphens("a_b")
    ('--hold-out=a_b', 'a_b')
    """
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def share_or_count(text: str) -> float:
    """The argparse type of --hold-out. It reads a count (32) or a share (0.05 or 5%).

    >>> share_or_count("5%"), share_or_count("32")
    (0.05, 32.0)
    """
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if math.isnan(value) or (text.endswith("%") and value >= 100):
        raise argparse.ArgumentTypeError(f"{text} is neither a count (32) nor a share (0.05 or 5%)")
    return value / 100 if text.endswith("%") else value


TYPES = {"hold_out": share_or_count}  # {field: the function that reads the flag's text}
METAVARS = {str: "TEXT", int: "N", float: "X"}


def parser(description: str) -> Parser:
    """A parser with one flag for each field of Config, grouped by the headings in Config."""
    built = Parser(description=description, argument_default=argparse.SUPPRESS)
    nano, help_texts = read_preset("nano"), comments()
    groups = {}
    for title, names in headings().items():
        groups |= dict.fromkeys(names, built.add_argument_group(title))
    for field in dataclasses.fields(Config):
        group, kind = groups[field.name], field_type(field)
        help_text = help_texts[field.name].replace("%", "%%")
        default = {True: "on", False: None}.get(field.default, field.default) \
            if kind is bool else field.default
        defaults = [] if default is None else [f"default {default}"]
        if field.name in nano:
            defaults.append(f"{nano[field.name]} for nano")
        if defaults:
            help_text += f" ({', '.join(defaults)})"
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
               dict(action="append", metavar="FILE") if kind == SEVERAL else
               dict(type=TYPES.get(field.name, kind), metavar=METAVARS[kind]))
        group.add_argument(f"--{flag(field.name)}", help=help_text, **how)
    return built


def headings() -> dict[str, list[str]]:
    """{heading: names of its fields}; a heading is a comment line in Config."""
    found, names = {}, []
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            names = found[heading[1]] = []
        elif field := re.match(r"    (\w+): ", line):
            names.append(field[1])
    return {title: names for title, names in found.items() if names}


def from_command_line(arguments: list[str] | None, description: str) -> Config:
    """The Config of a command line; raises Refusal for flags that are not valid."""
    given = vars(parser(description).parse_args(arguments))
    preset = given.pop("preset", None) or preset_for(
        given.get("model", Config.model), given.get("card"))
    if preset and not preset.endswith(".toml"):
        preset = preset.lower()  # T4 means t4
    values = {} if preset in (None, "none") else read_preset(preset)
    if "pack_len" in given and not {**values, **given}.get("packing", True):
        raise Refusal(f"--pack-len {given['pack_len']}: has no effect with --no-packing; leave out "
                      f"one of them")
    if any({"batch_size", "batch_tokens"} <= set(source) for source in (given, values)):
        raise Refusal("--batch-size and --batch-tokens: give one of them")
    for pair in EITHER:
        if set(pair) & set(given):
            values = {name: value for name, value in values.items() if name not in pair}
    if given.get("adapter"):
        for name in ADAPTERS_OWN:
            if name in given:
                raise Refusal(f"--{name}: the adapter of --adapter has its own value; leave out "
                              f"--{name}, or leave out --adapter to train a new one")
    return Config(preset=preset, **{**values, **given})


def preset_for(model: str, card: str | None) -> str | None:
    """The name of the preset if --preset is not given. The model nano has its own preset, with a
    higher learning rate. For other models the preset depends on the GPU that --card names, or else
    on this computer's GPU. Returns None if this GPU has no preset."""
    if model == "nano":
        return "nano"
    name = (known_card(card) if card else this_card()).name
    return next((preset for part, preset in CARDS.items() if part in name), None)


def asked_by(config: Config, field: str) -> str:
    """The flag that a setting comes from, for messages: `--preset t4` or `--dtype`."""
    preset = config.preset
    if preset not in (None, "none") and read_preset(preset).get(field) == getattr(config, field):
        return f"--preset {preset}"
    return f"--{flag(field)}"


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(preset: str) -> dict:
    """{field: value} of a preset, which is a name in presets/ or the path of a TOML file. Raises
    Refusal for an unknown key or a value of the wrong type."""
    file = expanded(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not file.is_file():
        raise Refusal(f"--preset {preset}: no such preset; choose from "
                      f"{', '.join(preset_names())}, none, or name a .toml file")
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # the file is not TOML, or not UTF-8
        raise Refusal(f"{file}: is not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(Config) if field.name != "preset"}
    for key, value in values.items():
        if key not in fields:
            raise Refusal(f"{file}: unknown key {key}; known are {', '.join(fields)}")
        kind = field_type(fields[key])
        if kind == SEVERAL and isinstance(value, str | list) and all(
                isinstance(name, str) for name in value):
            continue
        elif kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kind:
            raise Refusal(f"{file}: {key} = {value!r} should be {kind.__name__}")
    return values
