"""From a configuration to datasets, and from datasets to the batches of one rank."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mup.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.data.blend import Dataset, build_blend, parse_data_path
from megatron_mup.data.gpt_dataset import DocumentOptions, GPTDataset, parse_split
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.data.mock import MockDataset
from megatron_mup.data.tokenizer import build_tokenizer

SPLITS = ("training", "validation", "test")
WHOLE = (0.0, 1.0)
FIELDS = {"tokens": torch.int64, "labels": torch.int64, "position_ids": torch.int64, "document_ids": torch.int32}


def build_datasets(
    config: Config, num_train_samples: int, num_valid_samples: int, num_test_samples: int, vocab_size: int
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Training, validation and test dataset of a run.

    Args:
        config: the run; ``data``, ``training.seq_length`` and ``training.seed`` are read.
        num_train_samples: samples the whole run takes. The sample order depends on it beyond one epoch and in blends.
        num_valid_samples: samples all evaluations take together; 0 for no validation.
        num_test_samples: samples the final test takes; 0 for none.
        vocab_size: number of token ids, unpadded.

    Returns:
        One dataset per split; None where no sample is asked for.

    Raises:
        ConfigError: no data or two kinds of it, files that cannot be read, or a split that receives nothing.
    """
    data, seq_length, seed = config.data, config.training.seq_length, config.training.seed
    requested = (num_train_samples, num_valid_samples, num_test_samples)
    options = _document_options(config)
    if options.eod is not None and not 0 <= options.eod < vocab_size:
        raise ConfigError(
            f"end-of-document id {options.eod}",
            f"the vocabulary has {vocab_size} ids",
            "set --eod-token-id or --vocab-size",
        )
    sources = _sources(config)
    if sources is None:
        if vocab_size < 2:
            raise ConfigError(f"--vocab-size {vocab_size}", "--mock-data needs two tokens or more", "raise it")
        mocks = [
            MockDataset(seq_length, vocab_size, count, seed, split, options) if count else None
            for split, count in enumerate(requested)
        ]
        return mocks[0], mocks[1], mocks[2]

    opened: dict[str, IndexedDataset] = {}
    shared_cache = Path(data.data_cache_path) if data.data_cache_path else None

    def build(split: int) -> Dataset | None:
        if not requested[split]:
            return None
        source, fractions = sources[split], sources[split].fractions
        if not source.items:
            raise ConfigError(
                f"{SPLITS[split]} split",
                f"{requested[split]} samples are asked of it, but it has no data",
                f"set {source.flag}, or ask nothing of it (--eval-iters 0)",
            )

        def build_one(prefix: str, num_samples: int | None) -> GPTDataset:
            if prefix not in opened:
                opened[prefix] = IndexedDataset(prefix)
            return GPTDataset(
                opened[prefix],
                fractions,
                num_samples,
                seq_length,
                seed,
                vocab_size=vocab_size,
                options=options,
                cache=shared_cache or Path(prefix).absolute().parent / "index_cache",
                name=SPLITS[split],
            )

        prefixes, weights = parse_data_path(source.items, source.flag)
        if source.per_split and len(prefixes) == 1:
            weights = None  # as Megatron does: a lone dataset of a split is not a blend
        return build_blend(prefixes, weights, requested[split], build_one, shared_cache)

    return build(0), build(1), build(2)


@dataclass(frozen=True)
class _Source:
    """Where one split takes its data from."""

    items: Sequence[str]
    flag: str
    fractions: tuple[float, float]
    per_split: bool


def _sources(config: Config) -> tuple[_Source, ...] | None:
    """Data of the three splits; None for mock data."""
    data = config.data
    own = {
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    given = [flag for flag, items in {"--data-path": data.data_path, **own}.items() if items]
    if data.mock_data:
        if given:
            raise ConfigError(f"--mock-data with {given[0]}", "a run has one kind of data", "drop one of the two")
        return None
    if not given:
        raise ConfigError("--data-path", "no data is given", "set --data-path PREFIX, or --mock-data for a trial")
    if data.data_path:
        if len(given) > 1:
            raise ConfigError(
                f"--data-path with {given[1]}",
                "--data-path is divided by --split, the others are whole splits",
                "use one or the other",
            )
        return tuple(_Source(data.data_path, "--data-path", part, False) for part in parse_split(data.split))
    return tuple(_Source(items, flag, WHOLE, True) for flag, items in own.items())


def _document_options(config: Config) -> DocumentOptions:
    """Treatment of documents; finds the EOD id where the run needs one."""
    data, eod = config.data, config.data.eod_token_id
    needed = {
        "--reset-position-ids": data.reset_position_ids,
        "--reset-attention-mask": data.reset_attention_mask,
        "--eod-mask-loss": data.eod_mask_loss,
    }
    flag = next((name for name, wanted in needed.items() if wanted), None)
    if flag is None:
        return DocumentOptions(eod=eod)
    if eod is None and data.tokenizer_type is not None:
        eod = build_tokenizer(data.tokenizer_type, data.tokenizer_model, config.model.vocab_size).eod
    if eod is None:
        raise ConfigError(flag, "the end-of-document id is not known", "set --eod-token-id or --tokenizer-type")
    return DocumentOptions(eod=eod, reset_position_ids=data.reset_position_ids, eod_mask_loss=data.eod_mask_loss)


Batch = dict[str, torch.Tensor]


@dataclass
class _Step:
    """A step under way: its tensors and the tasks that fill them."""

    key: tuple[int, int]
    batch: Batch
    tasks: list[Future[None]]


class BatchLoader:
    """The samples of one data-parallel rank, step by step; the next step loads in the background.

    The position in the data is the number of samples consumed by all ranks together and nothing else: a run can resume
    with another data-parallel size and sees the same samples in the same steps.

    Args:
        dataset: samples by number.
        micro_batch_size: sequences per rank in one forward pass.
        data_parallel_rank: this rank among the data-parallel ones.
        data_parallel_size: number of data-parallel ranks.
        seed: of the reshuffling of ``cyclic``.
        dataloader_type: ``single`` reads the dataset once in its order; ``cyclic`` forever, permuted anew each epoch.
        num_workers: loading threads; 0 loads in the call.
        pin_memory: page-locked tensors, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        dataloader_type: Literal["single", "cyclic"] = "single",
        num_workers: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Starts the loading threads; nothing is read yet."""
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self._seed = seed
        self._cyclic = dataloader_type == "cyclic"
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._next: _Step | None = None
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._orders_lock = threading.Lock()

    def batches(self, consumed_samples: int, global_batch_size: int) -> Batch:
        """The samples of one step for this rank.

        Of the step's samples ``consumed .. consumed + global_batch_size``, micro-batch j of rank r takes
        ``[j * mbs * dp + r * mbs, j * mbs * dp + (r + 1) * mbs)``.

        Args:
            consumed_samples: samples all ranks took before this step.
            global_batch_size: samples of this step; may change from call to call.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` [num_microbatches * mbs, seq] int64; ``document_ids`` likewise,
            int32; ``sample_index`` [num_microbatches * mbs] int64, the running number of each sample in the run.

        Raises:
            ConfigError: the batch does not divide among the ranks, the data is used up, or a sample cannot be read.
        """
        self._check(consumed_samples, global_batch_size)
        step, self._next = self._next, None
        if step is None or step.key != (consumed_samples, global_batch_size):
            _cancel(step)
            step = self._start(consumed_samples, global_batch_size)
        try:
            for task in step.tasks:
                task.result()
        except BaseException:
            _cancel(step)
            raise
        following = consumed_samples + global_batch_size
        if self._pool is not None and (self._cyclic or following + global_batch_size <= len(self.dataset)):
            self._next = self._start(following, global_batch_size)
        return step.batch

    def close(self) -> None:
        """Stops the background loading. The loader cannot be used afterwards."""
        _cancel(self._next)
        self._next = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        """The loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the loader."""
        self.close()

    def _check(self, consumed: int, size: int) -> None:
        share = self.micro_batch_size * self.data_parallel_size
        if size <= 0 or size % share:
            raise ConfigError(
                f"--global-batch-size {size}",
                f"is no multiple of --micro-batch-size x data-parallel size = {self.micro_batch_size} x "
                f"{self.data_parallel_size}",
                f"use a multiple of {share}, in --rampup-batch-size too",
            )
        if not self._cyclic and consumed + size > len(self.dataset):
            raise ConfigError(
                f"samples {consumed} to {consumed + size}",
                f"the dataset was built with {len(self.dataset)}",
                "raise --train-samples or --train-iters, or use --dataloader-type cyclic",
            )

    def _start(self, consumed: int, size: int) -> _Step:
        """Allocates a step and has it filled: in the background, or here without workers."""
        mbs = self.micro_batch_size
        starts = consumed + np.arange(0, size, mbs * self.data_parallel_size) + self.data_parallel_rank * mbs
        numbers = (starts[:, None] + np.arange(mbs)).reshape(-1)
        batch: Batch = {"sample_index": torch.from_numpy(numbers)}
        if self._pin_memory:
            batch["sample_index"] = batch["sample_index"].pin_memory()
        for name, dtype in FIELDS.items():
            shape = (len(numbers), self.dataset.seq_length)
            batch[name] = torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)
        step = _Step((consumed, size), batch, [])
        for row in range(0, len(numbers), mbs):
            if self._pool is None:
                self._fill(batch, row)
            else:
                step.tasks.append(self._pool.submit(self._fill, batch, row))
        return step

    def _fill(self, batch: Batch, row: int) -> None:
        """Loads one micro-batch into its rows."""
        for i in range(row, row + self.micro_batch_size):
            sample = self.dataset[self._dataset_index(int(batch["sample_index"][i]))]
            for name in FIELDS:
                batch[name][i].numpy()[:] = sample[name]

    def _dataset_index(self, number: int) -> int:
        """Where the run's sample ``number`` lies in the dataset."""
        if not self._cyclic:
            return number
        epoch, position = divmod(number, len(self.dataset))
        with self._orders_lock:
            if epoch not in self._orders:
                # A step can straddle two epochs, so the neighbour stays.
                self._orders = {other: order for other, order in self._orders.items() if abs(other - epoch) == 1}
                self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self.dataset))
            return int(self._orders[epoch][position])


def _cancel(step: _Step | None) -> None:
    for task in step.tasks if step is not None else ():
        task.cancel()
