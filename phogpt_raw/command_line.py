"""The command line of a run, built from Config's fields: default < preset < flag.

A field of Config is a flag (`--micro-batch` or `--micro_batch`) and its trailing comment is the
help text, so there is no second list to keep in step.
"""

import argparse
import dataclasses
import inspect
import re
import tomllib
import types
import typing
from pathlib import Path

from phogpt_raw.cards import known_card, this_card
from phogpt_raw.config import Config, flag
from phogpt_raw.files import expanded
from phogpt_raw.refusal import Refusal

PRESETS = Path(__file__).parent / "presets"
# Of these one is given; a flag takes the place of either in a preset.
EITHER = (("steps", "epochs"), ("batch_size", "batch_tokens"), ("val", "hold_out"))
ADAPTERS_OWN = ("rank", "alpha", "dropout", "targets")  # fields that --adapter decides
SEVERAL = tuple[str, ...]  # a flag that may be given several times
CARDS = {"T4": "t4", "V100": "v100"}  # part of a GPU's name: its preset


def comments() -> dict[str, str]:
    """Each field's trailing comment, which is its help text."""
    lines = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE)
    return dict(lines)


def field_type(field: dataclasses.Field) -> type:
    """int for `int` and for `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not type(None))
    return field.type


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refusal(f"{message}; see --help")


def parser(description: str) -> Parser:
    """A flag for every field, with - or _, in the groups of Config's own headings."""
    built = Parser(usage="%(prog)s [options]", description=description,
                   argument_default=argparse.SUPPRESS, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    nano = read_preset("nano")
    groups = {}
    for title, names in headings().items():
        groups |= dict.fromkeys(names, built.add_argument_group(title))
    for field in dataclasses.fields(Config):
        group, kind = groups[field.name], field_type(field)
        help_text = comments()[field.name].replace("%", "%%")
        defaults = [] if field.default is None else [f"default {field.default}"]
        if field.name in nano:
            defaults.append(f"{nano[field.name]} for nano")
        if defaults:
            help_text += f" ({', '.join(defaults)})"
        shown, spelled = f"--{flag(field.name)}", f"--{field.name}"
        hidden = dict(dest=field.name, help=argparse.SUPPRESS)  # --help lists each flag once
        if kind is bool:
            group.add_argument(shown, action=argparse.BooleanOptionalAction, help=help_text)
            group.add_argument(f"--no_{field.name}", action="store_false", **hidden)
        elif kind == SEVERAL:
            group.add_argument(shown, action="append", metavar="NAME", help=help_text)
        else:
            group.add_argument(shown, type=kind, metavar=kind.__name__.upper(), help=help_text)
        if spelled != shown:
            how = dict(action="store_true") if kind is bool else dict(type=kind)
            group.add_argument(spelled, **how, **hidden)
    return built


def headings() -> dict[str, list[str]]:
    """Config's fields under the comments that stand above them."""
    found, names = {}, []
    for line in inspect.getsource(Config).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            names = found[heading[1]] = []
        elif field := re.match(r"    (\w+): ", line):
            names.append(field[1])
    return {title: names for title, names in found.items() if names}


def from_command_line(arguments: list[str] | None, description: str) -> Config:
    """The Config of a command line; Refusal for whatever cannot be."""
    given = vars(parser(description).parse_args(arguments))
    preset = given.pop("preset", None) or preset_for(
        given.get("model", Config.model), given.get("card"))
    values = {} if preset in (None, "none") else read_preset(preset)
    if any({"batch_size", "batch_tokens"} <= set(source) for source in (given, values)):
        raise Refusal("--batch-size and --batch-tokens: give one of them")
    for pair in EITHER:
        if set(pair) & set(given):
            values = {name: value for name, value in values.items() if name not in pair}
    if given.get("adapter"):
        for name in ADAPTERS_OWN:
            if name in given:
                raise Refusal(f"--{name}: an adapter has its own; leave the flag out with "
                              f"--adapter, or start a new adapter without it")
    return Config(preset=preset, **{**values, **given})


def preset_for(model: str, card: str | None) -> str | None:
    """The preset where none is named: nano's, for it wants another learning rate than a 7B; else
    that of --card or of the GPU at hand, None for a GPU without one."""
    if model == "nano":
        return "nano"
    name = (known_card(card) if card else this_card()).name
    return next((preset for part, preset in CARDS.items() if part in name), None)


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(preset: str) -> dict:
    """The keys of presets/<preset>.toml, or of a TOML file; unknown keys are refused."""
    file = expanded(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not file.is_file():
        raise Refusal(f"--preset {preset}: no such preset; there is {', '.join(preset_names())}, "
                      f"or name a .toml file")
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise Refusal(f"{file}: not TOML ({error})") from None
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
