"""Malformed configurations made from the dataclasses: each ends in a ConfigError, none in anything else."""

import contextlib
import random

import pytest
import yaml
from config_cases import GOOD

from megatron_mup.config import ConfigError, ParsedConfig, from_dict, parse_config, resolved, validate
from megatron_mup.config.bounds import BOUNDS
from megatron_mup.config.fields import Setting, sections, settings

RANDOM = random.Random(0)


def whole_way(argv: list[str], world_size: int = 1) -> ParsedConfig:
    """What the trainer does before it starts."""
    parsed = parse_config(argv)
    validate(parsed.config, world_size, parsed.explicit)
    return parsed


def bad_words(setting: Setting) -> list[list[str]]:
    """Command lines that this setting can't have."""
    flag = setting.flag
    if setting.kind == "bool":
        return [[flag, "maybe"], [f"{flag}=3"]]
    lines = [[flag]]
    if setting.count is not None:
        lines.append([flag, *["1"] * (setting.count + 1)])
    if setting.item in (int, float) or setting.kind == "choice":
        lines += [[flag, word] for word in ("twelve", "", "1e", "0x10", "--")]
        lines += [[flag, "None"]] if not setting.optional else []
    if setting.item is int:
        lines += [[flag, "1.5"], [flag, "1e6"], [flag, "9" * 5000]]
    if setting.name in BOUNDS:
        beyond = "-7" if BOUNDS[setting.name].low >= 0 else "7"
        lines += [[flag, *[word] * (setting.count or 1)] for word in ("nan", "inf", "-1e999", beyond)]
    return [*lines, [flag[:-1] + "q", "1"], [flag + "-x=1"]]


ON_THE_LINE = [line for setting in settings().values() for line in bad_words(setting)]


def test_there_are_enough():
    assert len(ON_THE_LINE) >= 200


@pytest.mark.parametrize("name", settings())
def test_malformed_on_the_command_line(name, capfd):
    for line in bad_words(settings()[name]):
        with pytest.raises(ConfigError) as caught:
            whole_way(line)
        assert caught.value.what
        assert caught.value.why
        assert caught.value.fix, line
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("section", sections())
def test_malformed_in_recipes_and_checkpoints(section, tmp_path):
    path = tmp_path / "r.yaml"
    for setting in settings().values():
        if setting.section != section:
            continue
        values = [{"a": 1}, [[1]], [None], {1: 2}]
        if setting.kind != "tuple":
            values.append(["a", "b"])
        if setting.kind != "bool":
            values.append(True)
        for value in values:
            path.write_text(yaml.safe_dump({section: {setting.name: value}}))
            with pytest.raises(ConfigError):
                whole_way(["--config", str(path)])
            with pytest.raises(ConfigError):
                from_dict({section: {setting.name: value}}, "checkpoint")


WORDS = ["0", "1", "2", "3", "7", "8", "1e-3", "0.5", "-1", "None", "nan", "", "a", "a,b", "1,1,1", "64", "\0", "ä"]


def scrambled(names: list[str]) -> list[str]:
    """A command line of settings with words that may or may not do."""
    argv: list[str] = []
    for name in names:
        setting = settings()[name]
        if setting.kind == "bool":
            argv.append(setting.flag if RANDOM.random() < 0.7 else f"--no-{setting.flag[2:]}")
        elif setting.kind == "choice":
            argv += [setting.flag, str(RANDOM.choice(setting.choices))]
        else:
            numbers = [word for word in WORDS if word.isdigit() or (setting.item is float and "." in word)]
            pool = WORDS if RANDOM.random() < 0.1 or setting.item is str else numbers
            argv += [setting.flag, *RANDOM.choices(pool, k=setting.count or RANDOM.randint(1, 3))]
    return argv


def test_scrambled_configurations_run_or_are_refused():
    refused = passed = 0
    for _ in range(150):
        argv = scrambled(RANDOM.sample(list(settings()), RANDOM.randint(1, 5)))
        world_size = RANDOM.choice([1, 2, 3, 8, 64])
        with contextlib.suppress(ConfigError):
            refused += 1
            parsed = whole_way([*GOOD, *argv], world_size)
            refused -= 1
            passed += 1
            shown = resolved(parsed.config, world_size)
            assert validate(from_dict(shown, "resolved"), world_size) == []
    assert refused > 50
    assert passed > 10


def test_none_of_two_hundred_starts_a_process_group(monkeypatch, capfd):
    """The whole program: one message and exit code 2."""
    from megatron_mup.training.main import main

    def start(*_: object) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr("megatron_mup.training.main.init_process_group", start)
    for line in random.Random(1).sample(ON_THE_LINE, 200):
        assert main([*GOOD, *line]) == 2, line
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: "), line
        assert err.count("error: ") == err.count("fix: ") == 1, line
        assert "Traceback" not in err
