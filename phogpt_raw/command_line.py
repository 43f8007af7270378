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

from phogpt_raw.config import Config, flag
from phogpt_raw.refusal import Refusal

PRESETS = Path(__file__).parent / "presets"
# Of these one is given; a flag takes the place of either in a preset.
EITHER = (("steps", "epochs"), ("batch_size", "batch_tokens"), ("val", "hold_out"))


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
    """Flags for every field, with - or _, plus --preset."""
    built = Parser(description=description, argument_default=argparse.SUPPRESS,
                   allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("--preset", metavar="P", help=f"{', '.join(preset_names())} or a TOML file")
    for field in dataclasses.fields(Config):
        names = dict.fromkeys([f"--{flag(field.name)}", f"--{field.name}"])
        help_text = comments()[field.name].replace("%", "%%")
        if field.default is not None:
            help_text += f" (default {field.default})"
        kind = field_type(field)
        if kind is bool:
            built.add_argument(*names, action=argparse.BooleanOptionalAction, help=help_text)
            built.add_argument(f"--no_{field.name}", dest=field.name, action="store_false",
                               help=argparse.SUPPRESS)  # argparse makes --no-… alone
        else:
            built.add_argument(*names, type=kind, metavar=kind.__name__.upper(), help=help_text)
    return built


def from_command_line(arguments: list[str] | None, description: str) -> Config:
    """The Config of a command line; Refusal for whatever cannot be."""
    given = vars(parser(description).parse_args(arguments))
    preset = given.pop("preset", None)
    if preset is None and given.get("model", Config.model) == "nano":
        preset = "nano"  # the embedded base wants another learning rate than a 7B does
    values = read_preset(preset) if preset else {}
    if any({"batch_size", "batch_tokens"} <= set(source) for source in (given, values)):
        raise Refusal("--batch-size and --batch-tokens: give one of them")
    for pair in EITHER:
        if set(pair) & set(given):
            values = {name: value for name, value in values.items() if name not in pair}
    return Config(**{**values, **given})


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def read_preset(preset: str) -> dict:
    """The keys of presets/<preset>.toml, or of a TOML file; unknown keys are refused."""
    file = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not file.is_file():
        raise Refusal(f"--preset {preset}: no such preset; there is {', '.join(preset_names())}, "
                      f"or name a .toml file")
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise Refusal(f"{file}: not TOML ({error})") from None
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in values.items():
        if key not in fields:
            raise Refusal(f"{file}: unknown key {key}; known are {', '.join(fields)}")
        kind = field_type(fields[key])
        if kind is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not kind:
            raise Refusal(f"{file}: {key} = {value!r} should be {kind.__name__}")
    return values
