"""A trained model in one process: load it from any training layout, sample text, score a corpus."""

from megatron_mup.inference.load import LoadedModel, load_model
from megatron_mup.inference.sample import logits_of, sample, stream
from megatron_mup.inference.score import bits_per_byte, total_loss

__all__ = ["LoadedModel", "bits_per_byte", "load_model", "logits_of", "sample", "stream", "total_loss"]
