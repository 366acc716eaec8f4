"""Synthetic data: learnable, endless, and the same on every rank and in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.gpt_dataset import DocumentOptions, make_sample

NOISE = 0.1
EOD_SHARE = 1 / 16
_MULTIPLIER, _INCREMENT = 5, 3


class MockDataset:
    """Noisy affine sequences: the next token is ``(5 x + 3) mod m``, or with probability 0.1 any of the m tokens.

    m is the largest power of two up to 256 that fits the vocabulary, so that the affine map visits every token. A model
    that has learnt the map reaches a loss of about 0.325 + 0.1 ln(m) nats. Each sample is drawn from a counter-based
    generator on (seed, split, sample number) and depends on nothing else.

    Args:
        seq_length: tokens per sample.
        vocab_size: number of ids, at least 2.
        num_samples: length of the dataset.
        seed: of the run.
        split: number of the split; another split has other samples.
        options: treatment of documents; where it names an EOD id, one noise token in sixteen is that id.
    """

    def __init__(
        self,
        seq_length: int,
        vocab_size: int,
        num_samples: int,
        seed: int,
        split: int,
        options: DocumentOptions,
    ) -> None:
        """Prepares the powers of the map."""
        self.seq_length = seq_length
        self.modulus = 2 ** min(8, vocab_size.bit_length() - 1)
        self.options = options
        self._num_samples = num_samples
        self._key = np.asarray([seed % 2**64, split], dtype=np.uint64)
        power, total = [1], [0]
        for _ in range(seq_length):
            power.append(power[-1] * _MULTIPLIER % self.modulus)
            total.append((total[-1] * _MULTIPLIER + _INCREMENT) % self.modulus)
        self._power, self._total = np.asarray(power), np.asarray(total)

    def __len__(self) -> int:
        """Number of samples."""
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """One sample, shaped as those of ``GPTDataset``."""
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, index, 0]))
        length = self.seq_length + 1
        fresh = generator.random(length) < NOISE
        fresh[0] = True
        noise = generator.integers(0, self.modulus, length)
        positions = np.arange(length)
        last_fresh = np.maximum.accumulate(np.where(fresh, positions, 0))
        age = positions - last_fresh
        text = (self._power[age] * noise[last_fresh] + self._total[age]) % self.modulus
        if self.options.eod is not None:
            text[fresh & (generator.random(length) < EOD_SHARE)] = self.options.eod
        return make_sample(text, self.options)
