"""What the user gave, collected from command line and recipes under the settings' own names."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mup.config.aliases import ALIASES, Alias
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import Setting, nearest, settings

RUN_FLAGS = ("config", "print-config", "help")
"""Flags of the command line that are no settings."""


@dataclass(frozen=True)
class Given:
    """One setting that the user gave.

    Attributes:
        tokens: the value as words of a command line; ``True`` or ``False`` for a switch.
        spelling: the flag that was used, kebab-case without dashes.
        where: what an error about it begins with, e.g. ``--num-layers x`` or ``r.yaml:3: num_layers: x``.
    """

    setting: Setting
    tokens: tuple[str, ...]
    spelling: str
    where: str

    @property
    def argv(self) -> list[str]:
        """The same in canonical flags. The ``=`` keeps a value that starts with a dash a value."""
        flag = self.setting.flag
        if self.setting.kind == "bool":
            return [flag if self.tokens == ("True",) else f"--no-{flag[2:]}"]
        if len(self.tokens) == 1:
            return [f"{flag}={self.tokens[0]}"]
        return [flag, *self.tokens]


@dataclass
class Source:
    """Settings from one place: the command line, or one recipe.

    Attributes:
        given: by setting name.
        used: aliases that were used, with what an error about them begins with.
    """

    given: dict[str, Given] = field(default_factory=dict)
    used: list[tuple[Alias, str]] = field(default_factory=list)

    def add(self, key: str, tokens: tuple[str, ...], where: str) -> None:
        """Records a setting or alias; ``key`` is kebab-case without dashes, a switch's token is ``True`` or ``False``.

        Raises:
            ConfigError: a number of values that the flag does not take, or two spellings that say different things.
        """
        setting, negated, alias = find(key)
        if setting is not None:
            spelling = key.removeprefix("no-") if negated else key
            self._record(Given(setting, _counted(setting, tokens, negated, where), spelling, where))
        elif alias is not None:
            self._add_alias(alias, tokens, where)

    def _add_alias(self, alias: Alias, tokens: tuple[str, ...], where: str) -> None:
        if not alias.takes_value and tokens == ("False",):
            return
        if alias.refused:
            raise ConfigError(where, alias.refused, "drop it")
        self.used.append((alias, where))
        for name, words in _meant(alias, tokens, where).items():
            self._record(Given(settings()[name], words, alias.flag, where))

    def _record(self, new: Given) -> None:
        old = self.given.get(new.setting.name)
        if old is not None and old.spelling != new.spelling and old.tokens != new.tokens:
            raise ConfigError(
                f"{old.where} and {new.where}", f"both set {new.setting.flag}, to different values", "give one of them"
            )
        self.given[new.setting.name] = new


def find(key: str) -> tuple[Setting | None, bool, Alias | None]:
    """The setting that a kebab-case key names, whether it is its negation, or the alias that it names."""
    name = key.replace("-", "_")
    if name in settings():
        return settings()[name], False, None
    switch = settings().get(name.removeprefix("no_"))
    if name.startswith("no_") and switch is not None and switch.kind == "bool":
        return switch, True, None
    return None, False, ALIASES.get(key)


def is_switch(key: str) -> bool:
    """Whether a known key takes no value on the command line."""
    setting, _, alias = find(key)
    if alias is not None and alias.renames:
        setting = settings()[alias.renames]
    if setting is not None:
        return setting.kind == "bool"
    return alias is not None and not alias.takes_value


def suggestion(key: str, more: tuple[str, ...] = ()) -> str | None:
    """The known key most like an unknown one, kebab-case without dashes."""
    switches = (f"no-{s.flag[2:]}" for s in settings().values() if s.kind == "bool")
    return nearest(key, [*(s.flag[2:] for s in settings().values()), *switches, *ALIASES, *more])


def _counted(setting: Setting, tokens: tuple[str, ...], negated: bool, where: str) -> tuple[str, ...]:
    """The tokens, when there are as many as the setting takes."""
    if setting.kind == "bool":
        return (str((tokens == ("True",)) != negated),)
    if setting.count is None or len(tokens) == setting.count or (setting.optional and tokens == ("None",)):
        return tokens
    if not tokens:
        raise ConfigError(where, f"needs a value: {setting.accepts}", f"write {setting.example}")
    raise ConfigError(where, f"takes {setting.accepts}; got {len(tokens)} values", f"write {setting.example}")


def _meant(alias: Alias, tokens: tuple[str, ...], where: str) -> dict[str, tuple[str, ...]]:
    """The settings that an alias with these values stands for."""
    if alias.renames:
        return {alias.renames: _counted(settings()[alias.renames], tokens, False, where)}
    if not alias.takes_value:
        return {name: (value,) for name, value in alias.sets.items()}
    if len(tokens) != 1:
        fix = f"write --{alias.flag} {alias.only or 'NUMBER'}"
        raise ConfigError(where, f"takes one value; got {len(tokens)}", fix)
    if alias.convert is not None:
        try:
            return {name: (value,) for name, value in alias.convert(tokens[0]).items()}
        except ValueError:
            known, example = alias.takes
            raise ConfigError(where, f"takes {known}", f"write --{alias.flag} {example}, for example") from None
    if tokens[0] != alias.only:
        raise ConfigError(where, f"only {alias.only} works here: {alias.note}", f"drop --{alias.flag}")
    return {}
