"""Small corpora and plain-Python definitions that the fast code is compared with."""

from pathlib import Path

import numpy as np

from megatron_mup.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter


def write_dataset(prefix: Path, lengths: list[int], dtype=np.uint16, start: int = 0) -> IndexedDataset:
    """One sequence per document; token t of the whole corpus is ``start + t``: every token tells where it is from."""
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for length in lengths:
            writer.add_document(np.arange(start, start + length))
            start += length
    return IndexedDataset(prefix)


def plain_indices(lengths, first, last, num_samples, seq_length, seed):
    """Megatron's document, sample and shuffle index, token by token."""
    per_epoch = sum(lengths[first:last])
    epochs = 1
    while epochs * per_epoch < num_samples * seq_length + 1:
        epochs += 1
    separate = False
    if epochs > 1:
        sans_final = ((epochs - 1) * per_epoch - 1) // seq_length
        separate = num_samples - sans_final < int(0.80 * ((per_epoch - 1) // seq_length))
    random = np.random.RandomState(seed)
    documents = []
    for count in [epochs - 1, 1] if separate else [epochs]:
        part = np.array(list(range(first, last)) * count, dtype=np.int32)
        random.shuffle(part)
        documents += part.tolist()
    where = [(d, offset) for d, document in enumerate(documents) for offset in range(lengths[document])]
    total = (epochs * per_epoch - 1) // seq_length
    samples = [(0, 0)] + [where[k * seq_length] for k in range(1, total + 1)]
    shuffle = []
    for low, high in [(0, sans_final), (sans_final, total)] if separate else [(0, total)]:
        part = np.array(range(low, high), dtype=np.uint32)
        random.shuffle(part)
        shuffle += part.tolist()
    return documents, samples, shuffle, epochs, separate


def plain_blend(weights, size):
    """The greedy blend, as it is defined."""
    counts = [0] * len(weights)
    datasets, samples = [], []
    for i in range(size):
        errors = [weight * max(float(i), 1.0) - count for weight, count in zip(weights, counts, strict=True)]
        best = errors.index(max(errors))
        datasets.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return datasets, samples
