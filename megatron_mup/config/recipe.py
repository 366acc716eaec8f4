"""YAML recipes: settings by section or flat, on top of an optional base recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import nearest, sections, settings
from megatron_mup.config.given import Source, find, is_switch, suggestion

_BOOL, _NULL, _TEXT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
_PLAIN = {_BOOL, _NULL, _TEXT, *(f"tag:yaml.org,2002:{t}" for t in ("int", "float", "timestamp", "value"))}


def read_recipe(path: str | Path, above: tuple[Path, ...] = ()) -> list[Source]:
    """A recipe and those that it is based on, the base first.

    Args:
        path: YAML file. Its keys are flags with underscores or dashes, aliases included, flat or below their section;
            ``base: other.yaml`` (relative to the file) names a recipe to start from.
        above: recipes that are based on this one.

    Raises:
        ConfigError: with file and line.
    """
    file = Path(path)
    root = _compose(file, f"--config {path}" if not above else f"{above[-1]}: base: {path}")
    if root is None or root.tag == _NULL:
        return [Source()]
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            _at(file, root), "a recipe is a mapping of settings", "write lines like `lr: 3e-3`, or sections of them"
        )
    source, bases = Source(), []
    for key, node in _entries(file, root):
        if key.value == "base":
            bases = _base(file, node, above)
        elif _kebab(key).replace("-", "_") in sections() and (isinstance(node, yaml.MappingNode) or node.tag == _NULL):
            for inner, value in _entries(file, node) if isinstance(node, yaml.MappingNode) else []:
                _add(source, file, inner, value, _kebab(key).replace("-", "_"))
        else:
            _add(source, file, key, node, None)
    return [*bases, source]


def _compose(file: Path, what: str) -> yaml.Node | None:
    """The file's node tree, merge keys resolved; nodes keep their lines and the text as written."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(what, f"not UTF-8 text (byte {error.start})", "give a YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(what, f"cannot be read: {reason}", "correct the path") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        for node in [root, *(value for _, value in root.value)] if isinstance(root, yaml.MappingNode) else []:
            if isinstance(node, yaml.MappingNode):
                _refuse_doubles(file, node)
                loader.flatten_mapping(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{file}{line}", f"not valid YAML: {error.problem}", "correct the line or the one above"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(file), f"not valid YAML: {' '.join(str(error).split())}", "correct the file") from None
    except RecursionError:
        raise ConfigError(str(file), "nested too deeply", "a recipe has sections and settings, no deeper") from None
    return root


def _refuse_doubles(file: Path, node: yaml.MappingNode) -> None:
    """YAML would take the last of two equal keys without a word."""
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(_at(file, key), "a key is the name of a setting", "write `name: value`")
        first = seen.setdefault(_kebab(key), value)
        # A section may share its name with one of its settings: `optimizer: muon` beside `optimizer: {lr: ...}`.
        if first is not value and isinstance(first, yaml.MappingNode) == isinstance(value, yaml.MappingNode):
            raise ConfigError(f"{_at(file, key)}: {key.value}", "stands twice in this file", "drop one of the two")


def _entries(file: Path, node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Keys and values of a mapping; of keys that a merge brought in too, the file's own is last and wins."""
    last = {
        _kebab(key) + ("/" if isinstance(value, yaml.MappingNode) else ""): (key, value) for key, value in node.value
    }
    return list(last.values())


def _base(file: Path, node: yaml.Node, above: tuple[Path, ...]) -> list[Source]:
    if not isinstance(node, yaml.ScalarNode) or node.tag != _TEXT:
        raise ConfigError(f"{_at(file, node)}: base", "takes the path of one recipe", "write `base: other.yaml`")
    chain = (*above, file.resolve())
    base = file.parent / node.value
    if base.resolve() in chain:
        raise ConfigError(f"{_at(file, node)}: base: {node.value}", "is based on this file again", "break the circle")
    return read_recipe(base, chain)


def _add(source: Source, file: Path, key: yaml.ScalarNode, node: yaml.Node, section: str | None) -> None:
    """Records one entry."""
    name, at = _kebab(key), _at(file, key)
    setting, negated, alias = find(name)
    if setting is None and alias is None:
        raise _unknown(at, key.value, section)
    target = settings()[alias.renames] if alias is not None and alias.renames else setting
    if section is not None and target is not None and target.section != section:
        raise ConfigError(
            f"{at}: {key.value}", f"stands in section {section}", f"move it to section {target.section}, or outside all"
        )
    where = f"{at}: {key.value}: {_text(node)}"
    accepts = "true or false" if target is None or negated else target.accepts
    if is_switch(name):
        if not isinstance(node, yaml.ScalarNode) or node.tag != _BOOL:
            raise ConfigError(where, "takes true or false", f"write `{key.value}: true`")
        source.add(name, ("True" if node.value.lower() in ("true", "yes", "on") else "False",), where)
        return
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for item in items:
        if not isinstance(item, yaml.ScalarNode) or item.tag not in _PLAIN:
            raise ConfigError(where, f"takes {accepts}", "give a plain value")
        if item.tag == _BOOL and target is not None and target.item is str and target.kind != "choice":
            raise ConfigError(where, "is true or false to YAML, but must be text", f'quote it: "{item.value}"')
        if item.tag == _NULL and (isinstance(node, yaml.SequenceNode) or target is None or not target.optional):
            raise ConfigError(where, f"is empty; takes {accepts}", "give a value, or drop the line")
    source.add(name, tuple("None" if item.tag == _NULL else item.value for item in items), where)


def _unknown(at: str, key: str, section: str | None) -> ConfigError:
    found = suggestion(key.replace("_", "-"), () if section else tuple(s.replace("_", "-") for s in sections()))
    if key.replace("-", "_") in sections():
        return ConfigError(f"{at}: {key}", "is a section", f"write its settings below `{key}:`, indented")
    if found is None:
        known = nearest(key, sections())
        fix = f"use {known}" if known else "see docs/configuration.md for all keys"
    else:
        fix = f"use {found.replace('-', '_')}"
    return ConfigError(f"{at}: {key}", "no such setting", fix)


def _kebab(key: yaml.ScalarNode) -> str:
    return str(key.value).replace("_", "-")


def _at(file: Path, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_text(item) for item in node.value) + "]"
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "{...}"
