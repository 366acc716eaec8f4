"""Data and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or weights and prefixes in turn."""
    train_data_path: tuple[str, ...] = ()
    """The same for the training split alone; instead of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """The same for the validation split alone."""
    test_data_path: tuple[str, ...] = ()
    """The same for the test split alone."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test, by document."""
    data_cache_path: str | None = None
    """Folder of the index caches. Default: beside the data."""
    mock_data: bool = False
    """Synthetic tokens instead of a corpus."""
    tokenizer_type: (
        Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer"] | None
    ) = None
    """Kind of tokenizer. Default: none, then --vocab-size must be given."""
    tokenizer_model: str | None = None
    """File or folder of the tokenizer."""
    eod_token_id: int | None = None
    """End-of-document id. Default: the tokenizer's."""
    reset_position_ids: bool = False
    """Positions start at zero in each document."""
    reset_attention_mask: bool = False
    """No attention across documents."""
    eod_mask_loss: bool = False
    """No loss where the input is the end-of-document token."""
    dataloader_type: Literal["single", "cyclic"] = "single"
    """single: one pass in index order; cyclic: reshuffled each epoch."""
    num_workers: int = 2
    """Loading threads per rank; 0 loads between steps."""
