"""Several indexed datasets in one folder to a single one."""

from __future__ import annotations

from pathlib import Path

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path


def find_prefixes(folder: Path) -> list[Path]:
    """Prefixes of all datasets in a folder, sorted by name.

    Raises:
        ConfigError: no folder, no dataset in it, or one half of a pair.
    """
    if not folder.is_dir():
        raise ConfigError(f"--input {folder}", "is no folder", "give the folder of the .bin and .idx files")
    names = sorted({path.name[:-4] for path in folder.iterdir() if path.suffix in (".bin", ".idx")})
    if not names:
        raise ConfigError(f"--input {folder}", "holds no .bin and .idx files", "give the folder that does")
    return [folder / name for name in names]


def merge_datasets(folder: Path, output_prefix: Path) -> IndexedDataset:
    """Writes the documents of all datasets in ``folder``, one dataset after the other in the order of their names.

    Args:
        folder: where the ``.bin`` and ``.idx`` pairs lie.
        output_prefix: the new dataset; if it lies in ``folder`` it must not exist yet.

    Returns:
        The new dataset.

    Raises:
        ConfigError: a dataset is damaged or of another dtype, or the output cannot be written.
    """
    prefixes = find_prefixes(folder)
    if any(prefix.resolve() == output_prefix.resolve() for prefix in prefixes):
        raise ConfigError(
            f"--output-prefix {output_prefix}",
            f"exists in the input folder, as {bin_path(output_prefix).name} or {idx_path(output_prefix).name}",
            "use another name or remove it",
        )
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    with IndexedDatasetWriter(output_prefix, parts[0].dtype) as writer:
        for part in parts:
            writer.add_dataset(part)
    return IndexedDataset(output_prefix)
