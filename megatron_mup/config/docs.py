"""``python -m megatron_mup.config.docs > docs/configuration.md``: the reference of all settings."""

from __future__ import annotations

import sys
from typing import Any

from megatron_mup.config.aliases import ALIASES
from megatron_mup.config.fields import Setting, sections, settings

_HEAD = """# Configuration

<!-- Made by `python -m megatron_mup.config.docs > docs/configuration.md`; change the dataclasses, not this file. -->

Every setting is a flag and a key of a YAML recipe:

```bash
torchrun --nproc-per-node 8 pretrain.py --config recipe.yaml --tensor-model-parallel-size 2 --lr 3e-3
```

```yaml
base: other.yaml          # optional: start from another recipe, relative to this file
model:                    # keys stand in their section, or flat
  num_layers: 12
  swiglu: true
optimizer: {optimizer: muon, lr: 3e-3}
train_iters: 1000
```

- Flags are kebab-case, keys have underscores; each understands the other's spelling too, and the names at the end of
  this page.
- The command line wins over recipes, later `--config` over earlier ones, a recipe over its base.
- A switch `--name` has its opposite `--no-name`; in a recipe it is true or false. `None` (in a recipe `null`) is the
  default of settings that say so.
- `--print-config` shows the resolved run as a recipe, and leaves.
- A mistake ends the run before it starts, with the setting, its value, the reason and what to do. A setting that
  changes nothing in a run is a warning.
"""


def reference() -> str:
    """The whole page."""
    parts = [_HEAD]
    for section, cls in sections().items():
        title = (cls.__doc__ or section).strip().rstrip(".")
        parts.append(f"\n## {title}\n\nSection `{section}`.\n\n| flag | takes | default | |\n|---|---|---|---|\n")
        parts += [_row(setting) for setting in settings().values() if setting.section == section]
    parts.append("\n## Names from Megatron-LM and Xmodel-2.5\n\nUnderstood too.\n\n| flag | stands for |\n|---|---|\n")
    for alias in ALIASES.values():
        value = f" {alias.only or 'VALUE'}" if alias.takes_value or alias.renames else ""
        parts.append(f"| `--{alias.flag}{value}` | {_cell(alias.meaning)} |\n")
    return "".join(parts)


def _row(setting: Setting) -> str:
    takes = "switch" if setting.kind == "bool" else setting.accepts.removesuffix(", or None").removeprefix("one of ")
    return f"| `{setting.flag}` | {_cell(takes)} | {_default(setting.default)} | {_cell(setting.help)} |\n"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, ()) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
