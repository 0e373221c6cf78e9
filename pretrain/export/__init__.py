"""Conversion of a training checkpoint to a Hugging Face folder: read the masters, fold the methods, write, prove."""
