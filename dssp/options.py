"""Options: dataclass fields that check their values, read and write JSON, and make the flags of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

GROUPS = {
    "data": "what to learn from",
    "model": "the network",
    "search": "how weights and architecture are trained",
    "training": "how the derived network is trained",
    "pruning": "how edges leave the search space",
    "retraining": "the derived network, trained from scratch after the search",
    "run": "where and how it runs",
}

EXIT_STATUS = (
    "Exit status: 0 finished; 1 a failure that one line on stderr explains; 2 a wrong command line; 75 stopped by "
    "SIGTERM, SIGINT or SIGUSR1 with everything saved: the same command with --resume continues. A second signal ends "
    "the process at once."
)
NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


class ConfigError(ValueError):
    """A field with a value that cannot be. `field` names it, `reason` says what came and what was expected."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


def option(default: Any, help: str, group: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A configuration field: its default, its help, its group in `--help`, and the bounds of its value (inclusive)."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "low": low, "high": high})


C = TypeVar("C", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every configuration can do. Raises ConfigError (a ValueError) for a value that cannot be."""

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        presets = self._preset_names()
        for field in dataclasses.fields(self):
            value = _checked(field, types[field.name], getattr(self, field.name), field.name in presets)
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], fields: object) -> C:
        """The configuration that `to_dict` wrote. Raises ValueError naming the field that is unknown or wrong."""
        if not isinstance(fields, dict):
            raise ValueError(f"configuration: expected an object, got {type(fields).__name__}")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(str(name), f"unknown field, expected one of {', '.join(known)}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in fields:
                raise ConfigError(name, "missing")
        return cls(**fields)

    def resolve(self: C) -> C:
        """A copy in which every None that has a preset for the space or the data set is filled."""
        return dataclasses.replace(self, **{k: v for k, v in self._presets().items() if getattr(self, k) is None})

    def _presets(self) -> dict[str, Any]:
        """What resolve() puts where a field is None."""
        return {}

    @classmethod
    def _preset_rows(cls) -> dict[str, dict[str, tuple[Any, Any]]]:
        """Presets as the help shows them: those by data set under "", then by space those it has of its own."""
        return {}

    @classmethod
    def _preset_names(cls) -> set[str]:
        """The fields that may be left to resolve()."""
        return {field for presets in cls._preset_rows().values() for field in presets}


def flags(fields: Mapping[str, Any]) -> list[str]:
    """The command line that sets these fields."""
    names = {name: f"--{name.replace('_', '-')}" for name in fields}
    return [
        names[name] if value is True else f"{names[name]}={value}"
        for name, value in fields.items()
        if value is not None and value is not False
    ]


def _preset_help(config: type[Options], field: str) -> str:
    """The presets of a field, where there are any: by data set, then those that a space has of its own."""
    parts = []
    for space, presets in config._preset_rows().items():
        values = presets.get(field)
        if values is not None and None not in values:  # where one is None, the help says it
            digits, others = values
            shown = f"digits {digits}, others {others}" if digits != others else f"default {digits}"
            parts.append(f" ({space}: {shown})" if space else f" ({shown})")
    return "".join(parts)


def _kind(hint: Any) -> tuple[type, tuple[str, ...] | None, bool]:
    """A field's type as (bool, int, float or str; its choices, if it has any; whether None is allowed)."""
    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    kind = next(option for option in options if option is not NoneType)
    if get_origin(kind) is Literal:
        return str, get_args(kind), NoneType in options
    return kind, None, NoneType in options


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any, has_preset: bool) -> Any:
    """`value` if it is of the field's type and within its bounds; a whole number becomes float where that is wanted."""
    kind, choices, optional = _kind(hint)
    if value is None and (optional or has_preset):
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(field.name, f"expected {NAMES[kind]}, got {value!r}")
    if choices and value not in choices:
        raise ConfigError(field.name, f"expected one of {', '.join(choices)}, got {value!r}")
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None and value < low:
        raise ConfigError(field.name, f"expected at least {low}, got {value}")
    if high is not None and value > high:
        raise ConfigError(field.name, f"expected at most {high}, got {value}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the page of usage."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains every flag)\n")


def parse_options(config: type[C], prog: str, description: str, argv: Sequence[str] | None) -> C:
    """The configuration on the command line `python -m prog`; a bad one ends the process with one line."""
    parser = options_parser(config, prog, description)
    try:
        parsed = config(**vars(parser.parse_args(argv)))
        parsed.resolve()  # a flag may contradict a preset
    except ConfigError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.reason}")
    return parsed


def options_parser(config: type[Options], prog: str, description: str, without: Collection[str] = ()) -> _Parser:
    """The command line of a configuration as a parser of the fields that are given, all but some."""
    prog = f"python -m {prog}"
    parser = _Parser(
        prog=prog, usage=f"{prog} [flags]", description=description, epilog=EXIT_STATUS, allow_abbrev=False
    )
    types = get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.name not in without]
    for group, subject in GROUPS.items():
        members = [field for field in fields if field.metadata["group"] == group]
        section = parser.add_argument_group(group, subject) if members else None
        for field in members:
            has_preset = field.name in config._preset_names()
            explanation = field.metadata["help"] + _preset_help(config, field.name)
            _add_flag(section or parser, field, types[field.name], explanation, has_preset)
    return parser


def _add_flag(
    section: argparse._ActionsContainer, field: dataclasses.Field[Any], hint: Any, explanation: str, has_preset: bool
) -> None:
    flag, (kind, choices, _) = f"--{field.name.replace('_', '-')}", _kind(hint)
    required = field.default is dataclasses.MISSING
    if kind is not bool and field.default is not None and not required and not has_preset:
        explanation += f" (default {field.default})"
    explanation = explanation.replace("%", "%%")
    if kind is bool:
        section.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=explanation)
        return
    metavar = {int: "N", float: "X", str: field.name.split("_")[-1].upper()}[kind]
    section.add_argument(
        flag,
        type=kind,
        choices=choices,
        metavar=None if choices else metavar,
        required=required,
        default=argparse.SUPPRESS,
        help=explanation,
    )
