"""Data: indexed datasets, sample order, blends, loaders, tokenizers and preprocessing.

The modules are imported by name, so that the command-line tools start without torch.
"""
