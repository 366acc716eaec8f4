"""Look into checkpoints: what they are of, what their tensors look like, and whether they are intact.

python tools/inspect_checkpoint.py show runs/my-model
python tools/inspect_checkpoint.py tensors runs/my-model --match linear_qkv
python tools/inspect_checkpoint.py recipe runs/my-model > recipe.yaml
python tools/inspect_checkpoint.py verify runs/my-model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mup.checkpoint.dcp import read_tensor
from megatron_mup.checkpoint.files import checkpoints
from megatron_mup.checkpoint.load import find, open_checkpoint
from megatron_mup.checkpoint.verify import verify_all
from megatron_mup.config import ConfigError, changed, from_dict, to_yaml

DAMAGED, MISTAKE = 1, 2
RECIPE_SECTIONS = ("model", "moe", "parametrization")


def located(folder: str, step: int | None) -> Path:
    """The checkpoint of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = find(folder, step)
    if path is None:
        raise ConfigError(folder, "holds no checkpoint", "give the folder that --save named")
    return path


def show(folder: str, step: int | None) -> Iterator[str]:
    """The manifest in a few lines."""
    path = located(folder, step)
    facts, metadata = open_checkpoint(path)
    tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    weights = [v.size.numel() for k, v in tensors.items() if k.startswith("model/")]
    yield f"{path}"
    yield f"  iteration {facts.iteration:,}, {facts.consumed_samples:,} samples consumed"
    yield f"  {sum(weights):,} parameters in {len(weights)} tensors; {len(tensors) - len(weights)} of optimizer state"
    yield f"  {sum(facts.files.values()):,} bytes in {len(facts.files)} files"
    yield f"  saved on {' x '.join(f'{axis} {size}' for axis, size in facts.layout.items())}"
    yield f"  by {', '.join(f'{name} {version}' for name, version in facts.versions.items())}"
    if facts.extra.get("huggingface"):
        yield f"  converted from a {facts.extra['huggingface']['model_type']} of Hugging Face"
    yield "  settings other than the defaults:"
    for section, values in changed(facts.config).items():
        yield f"    {section}: {', '.join(f'{name} {value}' for name, value in values.items())}"
    others = [str(number) for number, other in checkpoints(path.parent).items() if other != path]
    yield f"  other checkpoints beside it: {', '.join(others) or 'none'}"


def tensors(folder: str, step: int | None, match: str) -> Iterator[str]:
    """Name, shape, precision, root mean square and largest entry of every tensor, read one by one."""
    path = located(folder, step)
    _, metadata = open_checkpoint(path)
    yield f"{'rms':>10} {'max':>10}  {'dtype':8} {'shape':20} name"
    for key, facts in metadata.state_dict_metadata.items():
        if match in key and isinstance(facts, TensorStorageMetadata):
            tensor = read_tensor(path, metadata, key)
            value = tensor.double()
            rms, largest = value.square().mean().sqrt().item(), value.abs().max().item()
            shape = "x".join(map(str, tensor.shape)) or "1"
            odd = "" if torch.isfinite(value).all() else "  NOT FINITE"
            yield f"{rms:10.4g} {largest:10.4g}  {str(tensor.dtype)[6:]:8} {shape:20} {key}{odd}"


def recipe(folder: str, step: int | None) -> str:
    """What a run must say to go on with the model, as a recipe for ``--config``."""
    facts, _ = open_checkpoint(located(folder, step))
    from_dict(facts.config, folder)
    wanted = {section: values for section, values in changed(facts.config).items() if section in RECIPE_SECTIONS}
    tokenizer = {k: v for k, v in changed(facts.config).get("data", {}).items() if k.startswith("tokenizer_")}
    return to_yaml(wanted | ({"data": tokenizer} if tokenizer else {}))


def verify(folder: str) -> int:
    """Prints what is wrong with each checkpoint, and the last good one; returns the exit code."""
    verdicts = verify_all(Path(folder))
    if not verdicts:
        raise ConfigError(folder, "holds no checkpoint", "give the folder that --save named")
    for verdict in verdicts:
        state = "DAMAGED" if verdict.problems else "good"
        print(f"{verdict.path.name}: {state}, {verdict.checked:,} bytes compared")
        for problem in verdict.problems:
            print(f"  {problem}")
    good = [verdict.path for verdict in verdicts if not verdict.problems]
    print(f"last good checkpoint: {good[-1] if good else 'none'}")
    return DAMAGED if len(good) < len(verdicts) else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, 1 for a damaged checkpoint, 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    for name, does in (
        ("show", "what a checkpoint is of"),
        ("tensors", "shape, precision and size of every tensor"),
        ("recipe", "the settings of its model, for --config"),
        ("verify", "compare every checkpoint of the folder with its checksums"),
    ):
        way = ways.add_parser(name, help=does)
        way.add_argument("folder", help="folder of checkpoints, as --save named it")
        if name != "verify":
            way.add_argument("--ckpt-step", type=int, help="iteration (default: the latest)")
        if name == "tensors":
            way.add_argument("--match", default="model/", help="part of the name (default: model/)")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.way == "verify":
            return verify(arguments.folder)
        if arguments.way == "recipe":
            print(recipe(arguments.folder, arguments.ckpt_step), end="")
            return 0
        if arguments.way == "show":
            lines = show(arguments.folder, arguments.ckpt_step)
        else:
            lines = tensors(arguments.folder, arguments.ckpt_step, arguments.match)
        for line in lines:
            print(line)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
