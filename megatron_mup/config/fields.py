"""Every setting as data: name, section, type, default and help, read from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError

Kind = Literal["bool", "int", "float", "str", "choice", "tuple"]

_NOUNS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("text", "texts")}


@dataclass(frozen=True)
class Setting:
    """One field of one section.

    Attributes:
        item: type of the value, or of a tuple's items.
        count: number of values after the flag; None means any number, 0 means a switch.
        choices: what a ``choice`` may be.
    """

    name: str
    section: str
    kind: Kind
    item: type
    optional: bool
    count: int | None
    choices: tuple[Any, ...]
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """Command-line spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def accepts(self) -> str:
        """What the flag takes, in words."""
        one, many = _NOUNS.get(self.item, ("a value", "values"))
        if self.kind == "bool":
            text = "true or false"
        elif self.kind == "choice":
            text = "one of " + ", ".join(map(str, self.choices))
        elif self.kind == "tuple":
            text = many if self.count is None else f"{self.count} {many}"
        else:
            text = one
        return f"{text}, or None" if self.optional else text

    @property
    def example(self) -> str:
        """The flag with some value that it takes."""
        if self.kind == "choice" or self.default not in (None, ()):
            return self.shown(self.choices[0] if self.choices else self.default)
        one = {int: "8", float: "0.5"}.get(self.item, "NAME")
        return " ".join([self.flag, *[one] * (self.count or 1)])

    def shown(self, value: Any) -> str:
        """The flag with a value, as one would type it."""
        if isinstance(value, bool):
            return self.flag if value else f"--no-{self.flag[2:]}"
        if isinstance(value, (tuple, list)):
            return " ".join([self.flag, *map(str, value)])
        return f"{self.flag} {value}"

    def checked(self, value: Any, where: str) -> Any:
        """A plain value (of JSON or YAML) as this setting's type.

        Raises:
            ConfigError: the value has another type; ``where`` says which file or mapping it is from.
        """
        if value is None and self.optional:
            return None
        if self.kind == "tuple":
            fits = isinstance(value, (list, tuple)) and self.count in (None, len(value))
            if fits and all(_is(self.item, each) for each in value):
                return tuple(self.item(each) for each in value)
        elif self.kind == "choice":
            for choice in self.choices:
                if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                    return choice
        elif _is(self.item, value):
            return self.item(value)
        raise ConfigError(f"{where}: {self.name}: {value!r}", f"{self.name} takes {self.accepts}", "correct the value")


def _is(kind: type, value: Any) -> bool:
    """Whether ``value`` is a ``kind``; an int that a float can hold is a float, a bool is no number."""
    if kind is float and type(value) is int:
        return abs(value) < 2**1023
    return type(value) is kind


def _docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            found[field.target.id] = " ".join(text.split())
    return found


def _setting(section: str, field: dataclasses.Field[Any], hint: Any, text: str) -> Setting:
    """Reads one field's type."""
    args = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = type(None) in args
    (hint,) = (a for a in args if a is not type(None))
    kind: Kind
    item: type
    choices: tuple[Any, ...] = ()
    count: int | None = 1
    if get_origin(hint) is Literal:
        kind, choices = "choice", get_args(hint)
        item = type(choices[0])
    elif get_origin(hint) is tuple:
        kind, items = "tuple", get_args(hint)
        item, count = items[0], None if items[-1] is Ellipsis else len(items)
    else:
        kind, item = hint.__name__, hint
        count = 0 if hint is bool else 1
    return Setting(field.name, section, kind, item, optional, count, choices, field.default, text)


@cache
def settings() -> Mapping[str, Setting]:
    """All settings by name, in the order of the sections. Names are unique over sections, since flags are flat."""
    found: dict[str, Setting] = {}
    for section, cls in sections().items():
        hints, docs = get_type_hints(cls), _docstrings(cls)
        for field in dataclasses.fields(cls):
            if field.name in found:
                raise TypeError(f"{field.name} stands in both {found[field.name].section} and {section}")
            found[field.name] = _setting(section, field, hints[field.name], docs[field.name])
    return types.MappingProxyType(found)


@cache
def sections() -> Mapping[str, type]:
    """Dataclass of each section of ``Config``."""
    return types.MappingProxyType(get_type_hints(Config))


def value_of(config: Config, name: str) -> Any:
    """A setting's value in a configuration."""
    return getattr(getattr(config, settings()[name].section), name)


def told(config: Config, *names: str) -> str:
    """Settings with their values as flags: the ``what`` of an error."""
    return ", ".join(settings()[name].shown(value_of(config, name)) for name in names)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``; one that it abbreviates comes first."""
    names = {each.casefold(): each for each in sorted(known)}
    if len(name) > 2 and (longer := [n for n in names if n.startswith(name.casefold())]):
        return names[min(longer, key=len)]
    close = difflib.get_close_matches(name.casefold(), names, n=1)
    return names[close[0]] if close else None


def as_number(text: str) -> float | None:
    """The number that a word is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, rising."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def multiples(value: int, of: int) -> str:
    """The multiples of ``of`` around ``value``, in words."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def choices(values: list[int]) -> str:
    """A few numbers in words, of many the smallest."""
    shown = [str(value) for value in values[:8]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
