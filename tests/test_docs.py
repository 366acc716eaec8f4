"""What the documentation shows works: its commands parse, its flags exist, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_mup.config import ConfigError, parse_config
from megatron_mup.config.aliases import ALIASES
from megatron_mup.config.fields import settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
SCRIPT = re.compile(r"(?:\S*/)?(pretrain|tools/\w+)\.py$")
ELLIPSES = {"...", "…"}

OTHERS = {
    *("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--max-restarts", "--signals-to-handle"),
    *("--index-url", "--nodes", "--ntasks", "--ntasks-per-node", "--signal", "--requeue"),
    *("--target", "--rm", "--gpus", "--ipc", "--ulimit", "--volume", "--workdir", "--user", "--build-arg"),
    *("--model", "--model_args", "--tasks"),
    *("--partitions", "--keep-sequential-samples", "--split-sentences", "--keep-newlines", "--vocab-file"),
    *("--merge-file", "--find-optimal-num-workers"),
}
"""Flags of torchrun, pip, SLURM, docker and lm_eval that pages show, and of Megatron-LM that they say are refused."""

OF_THE_PARSER = {"--config", "--print-config", "--name", "--no-name"}
"""What is no setting, and placeholders in sentences about flags as such."""


class AskedError(Exception):
    """A tool came to parse its flags."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(tool: str) -> argparse.ArgumentParser | None:
    """The parser that a tool makes; None for one that has no flags but those of `pretrain.py`."""

    def asked(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise AskedError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        spec = importlib.util.spec_from_file_location(f"docs_tool_{tool}", ROOT / "tools" / f"{tool}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, asked)
        try:
            module.main(["--print-config"])
        except AskedError as found:
            return found.parser
    return None


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser | None]:
    """By tool. Nothing is required, for pages shorten commands."""
    found = {tool: parser_of(tool) for tool in TOOLS}
    for parser in found.values():
        for part in (*parser._actions, *parser._mutually_exclusive_groups) if parser is not None else ():
            part.required = False
    return found


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of those under it."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(options, action.choices.values()))
    return found


def blocks(text: str) -> Iterator[str]:
    """Contents of fenced and of indented code."""
    for fenced in re.finditer(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield fenced[1]
    yield from (found[0] for found in re.finditer(r"(?:^    \S.*\n(?:^ {4,}.*\n)*)", without_fences(text), re.M))


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Script and arguments of each command of a page that calls one of ours."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            starts = re.match(r"\s*(\S*python|torchrun|docker|srun)\s", line)
            words = shlex.split(line, comments=True) if starts else []
            script = next((i for i, word in enumerate(words) if SCRIPT.match(word)), None)
            if script is not None:
                match = SCRIPT.match(words[script])
                assert match is not None
                arguments = [word for word in words[script + 1 :] if word not in ELLIPSES]
                end = next((i for i, word in enumerate(arguments) if word in (">", "|")), len(arguments))
                found.append((match[1].removeprefix("tools/"), arguments[:end]))
    return found


def check_recipe_flags(argv: list[str]) -> None:
    """Parses flags of `pretrain.py`. Recipes that the reader is to write are left out."""
    kept = list(argv)
    for place in reversed([i for i, word in enumerate(argv) if word == "--config"]):
        file = ROOT / argv[place + 1].replace("/opt/megatron_mup/", "")
        kept[place : place + 2] = ["--config", str(file)] if file.is_file() else []
    parse_config(kept)


COMMANDS = [(page.name, *command) for page in PAGES for command in commands(page)]


def test_commands_are_found():
    assert {script for _, script, _ in COMMANDS} >= {"pretrain", "preprocess_data", "generate", "coord_check", "plan"}
    assert len(COMMANDS) >= 25


@pytest.mark.parametrize(("page", "script", "argv"), COMMANDS, ids=[f"{page}-{script}" for page, script, _ in COMMANDS])
def test_commands_parse(page, script, argv, parsers):
    rest = argv
    parser = parsers[script] if script != "pretrain" else None
    if parser is not None:
        try:
            _, rest = parser.parse_known_args(argv)
        except SystemExit:
            pytest.fail(f"{page}: tools/{script}.py does not take {' '.join(argv)}")
    check_recipe_flags(rest)


def test_a_misspelt_command_is_found(parsers):
    with pytest.raises(pytest.fail.Exception):
        test_commands_parse("page", "evaluate", ["--load", "x", "--data-path", "y", "--max-tokens", "many"], parsers)
    for script, argv in (("pretrain", []), ("evaluate", ["--load", "x", "--data-path", "y"])):
        with pytest.raises(ConfigError, match="--losd"):
            test_commands_parse("page", script, [*argv, "--losd", "x"], parsers)


def test_recipes_parse(tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 3\n")
    recipes = [found for page in PAGES for found in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert recipes
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(recipe)
        parse_config(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, parsers):
    ours = {setting.flag for setting in settings().values()}
    switches = {f"--no-{s.flag[2:]}" for s in settings().values() if s.kind == "bool"}
    tools = set().union(*(options(parser) for parser in parsers.values() if parser is not None))
    benchmarks = {
        flag
        for file in (ROOT / "benchmarks").glob("*.py")
        for flag in re.findall(r'"(--[a-z][\w-]*)"', file.read_text(encoding="utf-8"))
    }
    known = ours | switches | tools | benchmarks | OTHERS | OF_THE_PARSER | {f"--{alias}" for alias in ALIASES}
    shown = re.findall(r"(?<![\w-])--[a-z][\w-]*\*?", page.read_text(encoding="utf-8"))
    # `--mup-base-*` and the like stand for several.
    assert sorted({flag for flag in shown if not flag.endswith(("*", "-"))} - known) == []


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", without_fences(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        # The site has the pages of docs/ only.
        assert page.parent.name != "docs" or target.is_relative_to(ROOT / "docs"), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    assert sorted(files(site["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
