"""Evenkeel: pretraining on DeepSpeed with the variance of every weight under control."""

__version__ = "0.1.0"
