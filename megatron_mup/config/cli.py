"""Command line and recipes to a ``Config``. tyro makes flags, help and types from the dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from megatron_mup.config.aliases import ALIASES
from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import as_number, nearest, sections, settings, value_of
from megatron_mup.config.given import RUN_FLAGS, Given, Source, find, is_switch, suggestion
from megatron_mup.config.recipe import read_recipe


@dataclass(frozen=True)
class ParsedConfig:
    """A configuration as the user gave it, not validated yet.

    Attributes:
        explicit: names of the settings on the command line, and of those in recipes that differ from the default.
        print_config: whether to show the resolved run and leave.
        warnings: aliases that were given and change nothing.
    """

    config: Config
    explicit: frozenset[str]
    print_config: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Help(Config):
    """Pretrain a GPT. Flags carry Megatron-LM's names; a YAML recipe (--config) has the same keys, with underscores."""

    config: tuple[str, ...] = ()
    """Recipe to start from; the command line wins over it. Given again, later ones win over earlier ones."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the resolved run as YAML and leave."""


def parse_config(argv: Sequence[str], default: Config | None = None) -> ParsedConfig:
    """Reads flags and the recipes that they name.

    Args:
        argv: flags, without the program's name.
        default: configuration to start from.

    Raises:
        ConfigError: unknown flag or key, bad value, contradicting spellings, unreadable recipe.
        SystemExit: after printing the help for ``--help``.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        _print_help()
        raise SystemExit(0)
    line, recipes, print_config = _read_argv(argv)
    sources = [source for path in recipes for source in read_recipe(path)]
    merged: dict[str, Given] = {}
    for source in [*sources, line]:
        merged |= source.given
    config = _convert(merged.values(), default or Config())
    explicit = frozenset(line.given) | {n for n in merged if value_of(config, n) != settings()[n].default}
    used = {alias.flag: (alias, where) for source in [*sources, line] for alias, where in source.used}
    warnings = []
    for alias, where in used.values():
        if alias.needs and alias.needs not in merged:
            flag = settings()[alias.needs].flag
            raise ConfigError(where, f"needs {flag}", f"add {flag} N")
        if alias.excludes and value_of(config, alias.excludes[0]) == alias.excludes[1]:
            other = settings()[alias.excludes[0]].shown(alias.excludes[1])
            raise ConfigError(f"{where}, {other}", "contradict each other", "drop one of them")
        if alias.note and alias.convert is None:
            warnings.append(f"{where} changes nothing: {alias.note}")
    return ParsedConfig(config, explicit, print_config, tuple(warnings))


def _read_argv(argv: Sequence[str]) -> tuple[Source, list[str], bool]:
    """Settings, recipe paths, and whether --print-config was given."""
    line, recipes, print_config = Source(), [], False
    for flag, values in _grouped(argv):
        key = flag[2:].replace("_", "-")
        shown = " ".join([flag, *values])
        if key == "config":
            if len(values) != 1:
                raise ConfigError(shown, "takes the path of one recipe", "write --config FILE.yaml")
            recipes.append(values[0])
        elif key == "print-config" or is_switch(key):
            if values:
                off = f", or --no-{key} to turn it off" if find(key)[0] is not None and not find(key)[1] else ""
                raise ConfigError(shown, "takes no value", f"write --{key}{off}")
            print_config |= key == "print-config"
            if key != "print-config":
                line.add(key, ("True",), shown)
        elif find(key) == (None, False, None):
            raise _unknown(flag, key)
        else:
            setting, _, _ = find(key)
            if not values and setting is not None and setting.count is None:
                raise ConfigError(shown, f"needs a value: {setting.accepts}", f"write {setting.example}")
            line.add(key, tuple(values), shown)
    return line, recipes, print_config


def _grouped(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with the words that follow them."""
    groups: list[tuple[str, list[str]]] = []
    for arg in argv:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            groups.append((flag, [value] if equals else []))
        elif re.match(r"-[A-Za-z]", arg) and as_number(arg) is None:
            raise _unknown(arg, arg[1:].replace("_", "-"))
        elif not groups:
            raise ConfigError(arg, "stands before any flag", "write --flag value; a recipe is given with --config FILE")
        else:
            groups[-1][1].append(arg)
    return groups


def _unknown(flag: str, key: str) -> ConfigError:
    known = suggestion(key, RUN_FLAGS)
    return ConfigError(flag, "no such flag", f"use --{known}" if known else "see --help for all flags")


def _convert(given: Iterable[Given], default: Config) -> Config:
    """The values through tyro's parser, a section at a time: parsers are quick to make only when small."""
    entries: dict[str, list[Given]] = {}
    for entry in given:
        entries.setdefault(entry.setting.section, []).append(entry)
    built = {}
    for section, group in entries.items():
        cls, start = sections()[section], getattr(default, section)
        built[section] = _tyro(cls, [word for entry in group for word in entry.argv], start)
        if isinstance(built[section], str):
            # tyro says what is wrong for people only; asking it again per setting finds the guilty one.
            bad = [entry for entry in group if isinstance(_tyro(cls, entry.argv, start), str)]
            raise _bad_value(bad[0]) if bad else ConfigError(f"section {section}", built[section], "see --help")
    return dataclasses.replace(default, **built)


def _tyro(cls: type, argv: list[str], default: Any) -> Any:
    """An instance of ``cls``, or what tyro printed when it refused."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit:
        return printed.getvalue().strip() or "refused"


def _bad_value(entry: Given) -> ConfigError:
    setting, value = entry.setting, " ".join(entry.tokens)
    close = nearest(value, map(str, setting.choices))
    fix = f"write {setting.shown(close)}" if close else f"write {setting.example}, for example"
    return ConfigError(entry.where, f"{setting.flag} takes {setting.accepts}", fix)


def _print_help() -> None:
    with contextlib.suppress(SystemExit):
        tyro.cli(_Help, args=["--help"], config=(tyro.conf.OmitArgPrefixes,))
    print("\nflags of Megatron-LM and Xmodel-2.5 that are understood too:")
    width = max(map(len, ALIASES)) + 4
    for alias in ALIASES.values():
        print(f"  --{alias.flag:<{width - 2}}{alias.meaning}")
