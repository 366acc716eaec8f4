"""Reads ``--pipeline-model-parallel-layout``: what each pipeline stage holds, written out as in Megatron-LM."""

from __future__ import annotations

import re

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told

EXAMPLE = "Et*3|(tt|)*2t*3L"
_REPEATED = re.compile(r"(?:\(([^()]*)\)|([EtL|]))\*(\d+)")
_LONGEST = 100_000


def layout_stages(config: Config) -> tuple[tuple[int, int], ...] | None:
    """Range ``[start, end)`` of layers of each stage that the layout names, in order; None without a layout.

    Raises:
        ConfigError: a layout that can't be read, or that isn't the model's.
    """
    layout = config.parallel.pipeline_model_parallel_layout
    if layout is None:
        return None
    stages = _expanded(config, layout).split("|")
    _check_ends(config, stages)
    layers, held = config.model.num_layers, sum(stage.count("t") for stage in stages)
    if held != layers:
        raise ConfigError(
            told(config, "pipeline_model_parallel_layout", "num_layers"),
            f"its stages hold {held} layers, the model has {layers}",
            "write one t for each layer",
        )
    ranges, end = [], 0
    for stage in stages:
        ranges.append((end, end + stage.count("t")))
        end = ranges[-1][1]
    return tuple(ranges)


def _expanded(config: Config, layout: str) -> str:
    """The layout without commas, parentheses and repetitions."""
    text = layout.replace(",", "").replace(" ", "")
    if "m" in text:
        raise _wrong(config, "m stands for multi-token prediction, which the model doesn't have", "leave m out")
    while (found := _REPEATED.search(text)) is not None:
        repeated = (found[1] if found[1] is not None else found[2]) * min(int(found[3]), _LONGEST)
        text = text[: found.start()] + repeated + text[found.end() :]
        if len(text) > _LONGEST:
            raise _wrong(config, "it is longer than any model", f"write it like '{EXAMPLE}'")
    text = re.sub(r"\(([EtL|]*)\)", r"\1", text)
    strange = sorted(set(text) - set("EtL|"))
    if strange:
        raise _wrong(config, f"it can't be read at {' '.join(strange)}", f"write it like '{EXAMPLE}'")
    return text


def _check_ends(config: Config, stages: list[str]) -> None:
    """The embedding comes first, the loss last, each once, and no stage is empty."""
    whole = "".join(stages)
    if whole.count("E") != 1 or not stages[0].startswith("E"):
        raise _wrong(config, "the first stage starts with the embedding, and no other holds it", "write one E, first")
    if whole.count("L") != 1 or not stages[-1].endswith("L"):
        raise _wrong(config, "the last stage ends with the loss, and no other holds it", "write one L, at the end")
    if "" in stages:
        raise _wrong(config, f"stage {stages.index('')} holds nothing", "give it a layer, or take away one |")


def _wrong(config: Config, why: str, fix: str) -> ConfigError:
    return ConfigError(told(config, "pipeline_model_parallel_layout"), why, fix)
