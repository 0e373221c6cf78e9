"""Evenkeel: pretraining on DeepSpeed with the variance of every weight under control."""
