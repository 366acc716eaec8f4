"""megatron_mup: tensor-, pipeline- and data-parallel pretraining in which hyperparameters transfer across sizes."""

__version__ = "0.1.0"
